"""HQQ: the shrinkage by hand, what its half-steps promise, invariances, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.methods.hqq import shrink, unit_means
from ptq.problem import LayerProblem
from tests.conftest import Golden, random_problem


def weights_only(W: Tensor) -> LayerProblem:
    return LayerProblem("weights", W, torch.eye(W.shape[-1], dtype=W.dtype).expand(W.shape[0], -1, -1))


def test_shrink_by_hand() -> None:
    x = torch.tensor([0.0, 4.0, -4.0, 0.25, -1.0], dtype=torch.float64)
    # p = 1/2, β = 2: |x|^(−1/2) / 2 is 1/4 at 4, 1 at 1/4, 1/2 at 1
    assert_close(shrink(x, 2.0, 0.5), torch.tensor([0.0, 3.75, -3.75, 0.0, -0.5], dtype=torch.float64))
    # p = 1 is soft thresholding at 1/β
    assert_close(shrink(x, 4.0, 1.0), torch.nn.functional.softshrink(x, 0.25))


def test_unit_means_of_a_ragged_last_group() -> None:
    x = torch.arange(5.0).reshape(1, 1, 5)
    assert unit_means(x, 2).tolist() == [[[0.5, 2.5, 4.0]]]
    assert unit_means(x, None).tolist() == [[[2.0]]]


@pytest.mark.parametrize("group_size", [None, 8, 5], ids=["row", "eight", "ragged"])
def test_one_step_on_a_unit_by_itself(choice, group_size: int | None) -> None:
    """The offset as the formula for z gives it, unit by unit."""
    W = random_problem(4, 21, groups=2).W
    spec = choice("grid", "affine_float", parameter_bits=32)
    method = choice("method", "hqq", steps=1)
    _, fitted = method.quantize_layer(weights_only(W), spec, 3, group_size)
    for u, unit in enumerate(W.split(group_size or 21, dim=-1)):
        plain = spec.fit(unit, 3)
        s, z, Q = plain.scale, -plain.offset / plain.scale, plain.round(unit).double()
        E = shrink(unit - s * (Q - z), 10.0, 0.7)
        z = (Q - (unit - E) / s).mean(-1, keepdim=True)
        assert_close(fitted.scale[..., u : u + 1], s)
        assert_close(fitted.offset[..., u : u + 1], -s * z, rtol=1e-6, atol=1e-7)


def test_without_shrinkage_steps_never_raise_the_squared_error(choice) -> None:
    """E = 0 leaves an alternation of two exact minimisers of ‖W − Ŵ‖²: codes, then offsets."""
    problem = weights_only(random_problem(12, 40).W)
    spec = choice("grid", "affine_float", parameter_bits=32)
    errors = []
    for steps in (1, 2, 3, 5, 20):
        method = choice("method", "hqq", steps=steps, beta=1e-9)
        codes, grid = method.quantize_layer(problem, spec, 2, 10)
        errors.append(float(problem.error(grid.values(codes)).sum()))
    plain = spec.fit(problem.W, 2, 10)
    errors.insert(0, float(problem.error(plain.values(plain.round(problem.W))).sum()))
    for later, earlier in zip(errors[1:], errors, strict=False):
        assert later <= earlier * (1 + 1e-6)
    assert errors[-1] < 0.95 * errors[0]


def test_rows_stay_apart_and_a_shift_of_a_row_shifts_its_offset(choice) -> None:
    W = random_problem(6, 32).W
    spec = choice("grid", "affine_float", parameter_bits=32)
    method = choice("method", "hqq", steps=4)

    def quantized(V: Tensor) -> Tensor:
        codes, grid = method.quantize_layer(weights_only(V), spec, 3, 8)
        return grid.values(codes)

    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(quantized(W[:, order]), quantized(W)[:, order])
    assert_close(quantized(W + 0.5), quantized(W) + 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [None, 32], ids=["row", "group"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_offsets_beat_min_max_on_the_golden_layer(
    choice, golden: Golden, bits: int, group_size: int | None
) -> None:
    spec = choice("grid", "affine_float")
    codes, grid = choice("method", "hqq").quantize_layer(golden.problem, spec, bits, group_size)
    plain = spec.fit(golden.problem.W, bits, group_size)
    nearest_error = golden.error(plain.values(plain.round(golden.problem.W))[0])
    assert golden.error(grid.values(codes)[0]) < 0.85 * nearest_error
    assert torch.equal(grid.scale, plain.scale)


@pytest.mark.parametrize("grid", ["affine", "symmetric", "affine_release"])
def test_grids_without_a_real_offset_are_refused(choice, grid: str) -> None:
    with pytest.raises(InputError, match=r"real offsets.*use grid=affine_float"):
        choice("method", "hqq").check_grid(choice("grid", grid))


def test_one_offset_per_layer_is_refused(choice) -> None:
    with pytest.raises(InputError, match=r"one per layer.*grid\.granularity=channel"):
        choice("method", "hqq").check_grid(choice("grid", "affine_float", granularity="tensor"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"norm": 0.0}, "norm must be above 0.*got 0"),
        ({"beta": -1.0}, "beta must be positive.*got -1"),
        ({"beta_growth": 0.5}, "beta_growth at least 1.*0.5"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_hyperparameters(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("method", "hqq", **overrides)
