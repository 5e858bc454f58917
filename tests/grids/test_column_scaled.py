"""Column-scaled grids: the inner grid on W / c, storage, refit against least squares, mixing of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ptq.checkpoint import load, quantized_bytes, save
from ptq.grids.scaled import ColumnScaled
from ptq.layers import quantized_layer
from ptq.problem import LayerProblem
from ptq.solvers.coordinate_descent import Order, coordinate_descent
from ptq.solvers.error_feedback import error_feedback, prepare
from tests.conftest import random_problem

INNER = ["affine", "affine_float", "symmetric"]


def columns(groups: int, inputs: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, 1, inputs, generator=generator, dtype=torch.float64).mul(0.7).exp()


def fitted(choice, inner: str, W: Tensor, bits: int, group_size: int | None, c: Tensor) -> ColumnScaled:
    grid = ColumnScaled(inner=choice("grid", inner).fit(W / c, bits, group_size), scale=c, scale_bits=16)
    return grid.as_stored()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("group_size", [None, 5, 1], ids=["row", "ragged", "one"])
def test_values_come_back_exactly_and_through_storage(choice, inner: str, group_size: int | None) -> None:
    W = random_problem(7, 13, groups=2).W.float()
    grid = fitted(choice, inner, W, 3, group_size, columns(2, 13).float())
    codes = grid.round(W)
    values = grid.values(codes)
    assert_close(grid.round(values), codes)
    assert_close(values / grid.scale, grid.inner.values(codes))
    tensors, facts = grid.storage(codes)
    again, codes_again = ColumnScaled.from_storage(tensors, facts)
    assert torch.equal(codes_again, codes)
    assert torch.equal(again.values(codes_again), values)
    assert (again.code_min, again.code_max, again.shared) == (grid.code_min, grid.code_max, grid.shared)
    inner_bits, bits = grid.inner.storage_bits(codes), grid.storage_bits(codes)
    assert bits == {"codes": inner_bits["codes"], "parameters": inner_bits["parameters"] + 2 * 13 * 16}
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(bits.values()) <= stored < sum(bits.values()) + 8 * len(tensors)


def test_column_by_column_and_row_by_row_is_the_whole(choice) -> None:
    W = random_problem(6, 11, groups=2).W
    grid = fitted(choice, "affine", W, 3, 4, columns(2, 11))
    codes = grid.round(W)
    values = grid.values(codes)
    generator = torch.Generator().manual_seed(0)
    for j in range(11):
        code, value = grid.round_column(W[..., j], j)
        assert_close(code.to(codes.dtype), codes[..., j])
        assert_close(value, values[..., j])
        column = torch.randint(11, (2, 6), generator=generator)
        code, value = grid.round_column(W.gather(-1, column[..., None])[..., 0], column)
        assert_close(code.to(codes.dtype), codes.gather(-1, column[..., None])[..., 0])
        assert_close(value, values.gather(-1, column[..., None])[..., 0])


@pytest.mark.parametrize("inner", INNER)
def test_unit_columns_are_the_inner_grid(choice, inner: str) -> None:
    problem = random_problem(5, 12)
    plain = choice("grid", inner).fit(problem.W, 3, 4)
    grid = fitted(choice, inner, problem.W, 3, 4, torch.ones(1, 1, 12, dtype=torch.float64))
    for order in Order:
        codes = coordinate_descent(problem, grid, sweeps=2, order=order)
        assert torch.equal(codes, coordinate_descent(problem, plain, sweeps=2, order=order))
    assert_close(
        grid.refit(codes, problem.W, problem.H).values(codes),
        plain.refit(codes, problem.W, problem.H).values(codes),
    )


@pytest.mark.parametrize("solver", ["coordinate_descent", "error_feedback"])
def test_solvers_see_the_problem_in_scaled_inputs(choice, solver: str) -> None:
    """Codes for (W, H) on c × grid are those for (W / c, c H c) on the grid itself."""
    problem, c = random_problem(5, 14, groups=2), columns(2, 14)
    grid = fitted(choice, "affine", problem.W, 3, None, c)
    c = grid.scale
    scaled = LayerProblem("scaled", problem.W / c, problem.H * c * c.mT)
    if solver == "coordinate_descent":
        codes = coordinate_descent(problem, grid, sweeps=3)
        expected = coordinate_descent(scaled, grid.inner, sweeps=3)
    else:
        codes, _ = error_feedback(problem, grid, prepare(problem, damping=0.0, act_order=False))
        expected, _ = error_feedback(scaled, grid.inner, prepare(scaled, damping=0.0, act_order=False))
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("group_size", [None, 5], ids=["row", "ragged"])
def test_refit_is_least_squares_and_never_raises_the_objective(
    choice, inner: str, group_size: int | None
) -> None:
    problem = random_problem(4, 12)
    grid = fitted(choice, inner, problem.W, 2, group_size, columns(1, 12))
    grid = replace(
        grid, inner=choice("grid", inner, parameter_bits=32).fit(problem.W / grid.scale, 2, group_size)
    )
    codes = grid.round(problem.W)
    after = problem.error(grid.refit(codes, problem.W, problem.H).values(codes))
    assert bool((after <= problem.error(grid.values(codes)) * (1 + 1e-9)).all())
    # an unrelated computation: values are linear in the inner parameters, so lstsq on their Jacobian
    L = torch.linalg.cholesky(problem.H[0])
    own = {name: p.double() for name, p in grid.inner.parameters().items()}
    names = list(own)

    def values(*parameters: Tensor) -> Tensor:
        return (
            grid.inner.with_parameters(dict(zip(names, parameters, strict=True))).values(codes) * grid.scale
        )

    jacobians = torch.autograd.functional.jacobian(values, tuple(own[n] for n in names))
    for row in range(4):
        A = L.T @ torch.cat([J[0, row, :, 0, row] for J in jacobians], -1)
        b = L.T @ problem.W[0, row]
        residual = b - A @ torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
        assert_close(after[0, row], residual.square().sum(), rtol=1e-5, atol=1e-9)


def test_scaled_where_and_replace_unit_follow_the_inner_grid(choice) -> None:
    W, c = random_problem(4, 10).W, columns(1, 10)
    grid = fitted(choice, "affine", W, 3, 5, c)
    codes = grid.round(W)
    values = grid.values(codes)
    half = grid.scaled(0.5)
    assert_close(half.values(codes), 0.5 * values)
    better = torch.tensor([[True, False, False, True]])
    mixed = half.where(better, grid).values(codes)
    assert_close(mixed, torch.where(better[..., None], 0.5 * values, values))
    unit = fitted(choice, "affine", 2 * W[..., 5:], 3, None, c[..., 5:])
    expected = torch.cat([values[..., :5], unit.values(codes[..., 5:])], -1)
    assert_close(grid.replace_unit(1, unit).values(codes), expected)
    with pytest.raises(ValueError, match="different column scales"):
        grid.where(better, replace(grid, scale=2 * grid.scale))


def test_all_parameters_can_be_trained(choice) -> None:
    W = random_problem(4, 10).W
    grid = fitted(choice, "affine_float", W, 3, 5, columns(1, 10))
    codes = grid.round(W)
    free = {name: p.clone().requires_grad_() for name, p in grid.parameters().items()}
    assert set(free) == {"scale", "offset", "column_scale"}
    grid.with_parameters(free).values(codes).sum().backward()
    for parameter in free.values():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().min()) > 0


def test_a_layer_on_it_is_saved_and_loaded(choice, tmp_path) -> None:
    layer = torch.nn.Conv2d(4, 6, 3, groups=2)
    W = layer.weight.detach().reshape(2, 3, 18)
    grid = fitted(choice, "affine", W, 4, 9, columns(2, 18).float())
    codes = grid.round(W)
    model = torch.nn.Sequential(quantized_layer(layer, grid, codes))
    again = load(save(model, tmp_path), torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2)))
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), model(x))
    assert_close(model[0].weight.reshape(2, 3, 18), grid.values(codes))
    assert quantized_bytes(tmp_path) * 8 == sum(grid.storage_bits(codes).values())
