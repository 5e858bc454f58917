"""COMQ: what theory promises of its sweeps and scale updates: per tensor, row and group; on convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ptq.api import quantize_model
from ptq.grids.affine import Granularity
from ptq.problem import LayerProblem
from ptq.solvers.coordinate_descent import Order, coordinate_descent
from tests.conftest import Golden, random_problem

GRANULARITIES = [("tensor", None), ("channel", None), ("channel", 8), ("channel", 5)]
NAMES = ["tensor", "row", "eight", "ragged"]
SHAPES = [(1, 7, 21), (3, 4, 18), (6, 1, 9)]
KINDS = ["linear", "grouped", "depthwise"]


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES, ids=NAMES)
@pytest.mark.parametrize(("groups", "out", "inputs"), SHAPES, ids=KINDS)
@pytest.mark.parametrize("grid", ["affine_release", "symmetric", "affine_float"])
def test_scale_updates_never_raise_the_objective(
    choice, grid: str, groups: int, out: int, inputs: int, granularity: str, group_size: int | None
) -> None:
    problem = random_problem(out, inputs, groups=groups)
    fitted = choice("grid", grid, granularity=granularity).fit(problem.W, 2, group_size)
    for scale in (1.0, 0.6):  # a good start and a clipped one
        start = fitted.scaled(scale)
        codes = coordinate_descent(problem, start, sweeps=1, order=Order.greedy)
        before = problem.error(start.values(codes))
        after = problem.error(start.refit(codes, problem.W, problem.H).values(codes))
        if granularity == "tensor":
            assert float(after.sum()) <= float(before.sum()) * (1 + 1e-9)
        else:
            assert bool((after <= before * (1 + 1e-9)).all())
        assert float(after.sum()) < float(before.sum())


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES, ids=NAMES)
def test_no_other_scale_is_better_after_an_update(choice, granularity: str, group_size: int | None) -> None:
    """Group scales of a row interact through H: the joint update leaves no slope in any of them."""
    problem = random_problem(5, 21, groups=2)
    spec = choice("grid", "symmetric", granularity=granularity, parameter_bits=32)
    fitted = spec.fit(problem.W, 2, group_size)
    codes = coordinate_descent(problem, fitted, sweeps=1)

    def slope(grid) -> torch.Tensor:
        scale = grid.scale.clone().requires_grad_()
        R = problem.T - grid.with_parameters({"scale": scale}).values(codes)
        ((R @ problem.H) * R).sum().backward()
        return scale.grad

    refitted = fitted.refit(codes, problem.W, problem.H)
    assert float(slope(refitted).abs().max()) < 1e-4 * float(slope(fitted).abs().max())


def test_the_update_of_one_scale_per_layer_is_the_ratio_of_sums(choice) -> None:
    problem = random_problem(5, 16, groups=2)
    fitted = choice("grid", "symmetric_tensor", parameter_bits=32).fit(problem.W, 3)
    codes = coordinate_descent(problem, fitted, sweeps=1)
    Q = codes.double()
    expected = ((Q @ problem.H) * problem.W).sum() / ((Q @ problem.H) * Q).sum()
    assert_close(
        fitted.refit(codes, problem.W, problem.H).scale, expected.reshape(1, 1, 1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES, ids=NAMES)
@pytest.mark.parametrize("order", list(Order), ids=lambda o: o.value)
@pytest.mark.parametrize("update_scale", [False, True], ids=["fixed", "updated"])
def test_from_the_second_sweep_on_the_error_never_rises(
    choice, golden: Golden, update_scale: bool, order: Order, granularity: str, group_size: int | None
) -> None:
    spec = choice("grid", "affine_release", granularity=granularity)
    errors = []
    for sweeps in (1, 2, 3, 5):
        method = choice("method", "comq_paper", sweeps=sweeps, order=order.value, update_scale=update_scale)
        codes, grid = method.quantize_layer(golden.problem, spec, 2, group_size)
        errors.append(float(golden.problem.error(grid.values(codes)).sum()))
    for later, earlier in zip(errors[1:], errors, strict=False):
        assert later <= earlier * (1 + 1e-9)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_one_scale_per_layer_as_in_the_paper(choice, golden: Golden, bits: int) -> None:
    problem, spec = golden.problem, choice("grid", "symmetric_tensor")
    assert spec.granularity is Granularity.tensor
    errors = []
    for sweeps in (1, 2, 3, 6):
        codes, grid = choice("method", "comq_tensor_paper", sweeps=sweeps).quantize_layer(
            problem, spec, bits, None
        )
        assert grid.scale.shape == (1, 1, 1)
        errors.append(float(problem.error(grid.values(codes)).sum()))
    assert errors == sorted(errors, reverse=True)
    plain = spec.fit(problem.W, bits)
    assert errors[2] < 0.64 * float(problem.error(plain.values(plain.round(problem.W))).sum())
    by_row, row_grid = choice("method", "comq_paper").quantize_layer(
        problem, choice("grid", "symmetric"), bits, None
    )
    assert float(problem.error(row_grid.values(by_row)).sum()) < errors[2]


@pytest.mark.parametrize("order", list(Order), ids=lambda o: o.value)
def test_without_updates_the_scales_are_lambda_times_the_fitted_ones(choice, order: Order) -> None:
    problem = random_problem(6, 18)
    spec = choice("grid", "affine_release")
    method = choice("method", "comq_release", order=order.value, shrink=[0.7], sweeps=3)
    _, grid = method.quantize_layer(problem, spec, 3, 6)
    plain = spec.fit(problem.W, 3, 6)
    assert_close(grid.scale, 0.7 * plain.scale)
    assert torch.equal(grid.zero_point, plain.zero_point)


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES, ids=NAMES)
def test_several_lambdas_keep_the_best_of_each_row_or_of_the_layer(
    choice, golden: Golden, granularity: str, group_size: int | None
) -> None:
    problem, spec = golden.problem, choice("grid", "affine_release", granularity=granularity)

    def errors(shrink: list[float]) -> torch.Tensor:
        method = choice("method", "comq_release", shrink=shrink)
        codes, grid = method.quantize_layer(problem, spec, 2, group_size)
        return problem.error(grid.values(codes))

    single = torch.stack([errors([factor]) for factor in (1.0, 0.8, 0.6)])  # [factors, groups, out]
    if granularity == "tensor":
        assert_close(errors([1.0, 0.8, 0.6]).sum(), single.sum((1, 2)).min())
    else:
        assert_close(errors([1.0, 0.8, 0.6]), single.amin(0))


@pytest.mark.parametrize(("groups", "out", "inputs"), SHAPES[1:], ids=KINDS[1:])
@pytest.mark.parametrize("name", ["comq", "comq_paper", "comq_release"])
@pytest.mark.parametrize("group_size", [None, 5], ids=["row", "ragged"])
def test_groups_of_a_convolution_are_problems_of_their_own(
    choice, name: str, groups: int, out: int, inputs: int, group_size: int | None
) -> None:
    problem = random_problem(out, inputs, groups=groups)
    # a shared stopping rule and a common power of two of float16 scales are all that couples groups
    overrides = {"tolerance": 0.0, "sweeps": 2}
    spec = choice("grid", "affine_release")
    codes, grid = choice("method", name, **overrides).quantize_layer(problem, spec, 3, group_size)
    for g in range(groups):
        alone = LayerProblem("alone", problem.W[g], problem.H[g])
        its_codes, its_grid = choice("method", name, **overrides).quantize_layer(alone, spec, 3, group_size)
        assert torch.equal(its_codes[0], codes[g])
        assert_close(its_grid.values(its_codes)[0], grid.values(codes)[g])


@pytest.mark.parametrize("name", ["comq", "comq_paper", "comq_release", "comq_tensor_paper"])
def test_a_network_of_convolutions(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 6, 1, groups=2),
            nn.Flatten(),
            nn.Linear(6 * 4 * 4, 5),
        ).eval()
        images = torch.randn(40, 3, 8, 8)
    with torch.no_grad():
        wanted = model(images)
        errors = {}
        for method in ("rtn", name):
            grid = "symmetric_tensor" if "tensor" in name else "affine_release"
            student, report = quantize_model(model, [images], method=method, grid=grid, bits=3)
            assert len(report.layers) == 4
            errors[method] = float((student(images) - wanted).norm() / wanted.norm())
    assert errors[name] < 0.9 * errors["rtn"]
