"""Affine and symmetric grids: what theory promises, storage, odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.grids.affine import AffineGrid, Granularity, Range, Zero
from tests.conftest import random_problem

GRIDS = ["affine", "affine_mse", "affine_float", "symmetric", "affine_release"]


def random_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("group_size", [None, 5, 1], ids=["row", "ragged", "one"])
def test_values_come_back_exactly_and_through_storage(
    choice, name: str, bits: int, group_size: int | None
) -> None:
    W = random_weights(2, 7, 13).float()
    grid = choice("grid", name).fit(W, bits, group_size, torch.eye(13).expand(2, -1, -1))
    codes = grid.round(W)
    values = grid.values(codes)
    assert int(codes.min()) >= grid.code_min
    assert int(codes.max()) <= grid.code_max
    assert_close(grid.round(values), codes)
    tensors, facts = grid.storage(codes)
    again, codes_again = AffineGrid.from_storage(tensors, facts)
    assert torch.equal(codes_again, codes)
    assert torch.equal(again.values(codes_again), values)
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    expected = sum(grid.storage_bits(codes).values())
    assert expected <= stored < expected + 8 * len(tensors)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_error_is_at_most_half_a_step_inside_the_range(choice, bits: int) -> None:
    W = random_weights(1, 9, 40)
    grid = choice("grid", "affine", parameter_bits=32).fit(W, bits)
    error = (W - grid.values(grid.round(W))).abs()
    # the zero point is rounded, so one end may lie half a step outside
    assert float((error / grid.scale).max()) <= 1.0
    lowest = grid.values(torch.full_like(W, grid.code_min))
    highest = grid.values(torch.full_like(W, grid.code_max))
    inside = (lowest <= W) & (highest >= W)
    assert float((error / grid.scale)[inside].max()) <= 0.5 + 1e-6


def test_error_power_falls_by_six_decibels_a_bit(choice) -> None:
    W = torch.rand(1, 4, 20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.3
    powers = []
    for bits in (3, 4, 5, 6):
        grid = choice("grid", "affine_float").fit(W, bits)
        powers.append(float((W - grid.values(grid.round(W))).square().mean().log2()))
    for more, less in zip(powers[1:], powers, strict=False):
        assert 1.8 < less - more < 2.4


@pytest.mark.parametrize("name", ["affine_float", "symmetric", "affine_mse"])
def test_scaling_and_permuting_rows(choice, name: str) -> None:
    W = random_weights(1, 6, 17)
    spec = choice("grid", name, parameter_bits=32)

    def quantized(V: torch.Tensor) -> torch.Tensor:
        grid = spec.fit(V, 3)
        return grid.values(grid.round(V))

    assert_close(quantized(2 * W), 2 * quantized(W))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(quantized(W[:, order]), quantized(W)[:, order])


@pytest.mark.parametrize("rule", [Range.mse, Range.l2_4, Range.gram], ids=lambda r: r.value)
def test_searched_ranges_beat_min_max_under_their_own_rule(choice, rule: Range) -> None:
    problem = random_problem(9, 30)
    fits = {}
    for r in (Range.min_max, rule):
        spec = choice("grid", "affine", range=r.value, parameter_bits=32)
        grid = spec.fit(problem.W, 3, None, problem.H)
        R = problem.W - grid.values(grid.round(problem.W))
        power = 2.4 if rule is Range.l2_4 else 2
        fits[r] = problem.error(problem.W - R) if rule is Range.gram else R.abs().pow(power).sum(-1)
    assert bool((fits[rule] <= fits[Range.min_max] + 1e-12).all())
    assert float(fits[rule].sum()) < float(fits[Range.min_max].sum())


def test_percentile_leaves_the_tails_outside(choice) -> None:
    W = random_weights(1, 3, 1001)
    grid = choice("grid", "affine_float", range="percentile", percentile=90.0, parameter_bits=32).fit(W, 4)
    assert_close(grid.offset[..., 0], W.quantile(0.05, dim=-1))


@pytest.mark.parametrize("name", ["affine", "affine_float", "symmetric", "affine_release"])
@pytest.mark.parametrize("group_size", [None, 4, 7], ids=["row", "four", "ragged"])
def test_refit_is_least_squares_and_never_raises_the_objective(
    choice, name: str, group_size: int | None
) -> None:
    problem = random_problem(5, 18, groups=2)
    grid = choice("grid", name, parameter_bits=32).fit(problem.W, 3, group_size)
    codes = grid.round(problem.W)
    before = problem.error(grid.values(codes))
    after = problem.error(grid.refit(codes, problem.W, problem.H).values(codes))
    assert bool((after <= before * (1 + 1e-9)).all())
    # an unrelated computation: ordinary least squares on the columns that scale and offset multiply
    L = torch.linalg.cholesky(problem.H)
    for g in range(2):
        for row in range(5):
            q = codes[g, row].double()
            if grid.zero_point is not None:
                q = q - grid._columns(grid.zero_point)[g, row].expand(18)
            unit = torch.arange(18) // (group_size or 18)
            basis = [q * (unit == u) for u in range(int(unit[-1]) + 1)]
            basis += (
                [(unit == u).double() for u in range(int(unit[-1]) + 1)] if grid.offset is not None else []
            )
            A = L[g].T @ torch.stack(basis, 1)
            b = L[g].T @ problem.W[g, row]
            residual = b - A @ torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
            assert_close(after[g, row], residual.square().sum(), rtol=1e-5, atol=1e-9)


def test_refit_with_equal_codes_and_dead_inputs_stays_finite(choice) -> None:
    problem = random_problem(3, 6)
    grid = choice("grid", "affine_float").fit(problem.W, 2)
    codes = torch.ones_like(problem.W, dtype=torch.int16)
    H = torch.zeros_like(problem.H)
    for gram in (H, problem.H):
        refitted = grid.refit(codes, problem.W, gram)
        assert bool(torch.isfinite(refitted.values(codes)).all())


def test_a_tensor_grid_has_one_scale(choice) -> None:
    W = random_weights(3, 4, 9)
    grid = choice("grid", "affine", granularity=Granularity.tensor.value).fit(W, 4)
    assert grid.scale.shape == (1, 1, 1)
    codes = grid.round(W)
    refitted = grid.refit(codes, W, torch.eye(9, dtype=torch.float64).expand(3, -1, -1))
    assert refitted.scale.shape == (1, 1, 1)
    with pytest.raises(InputError, match="one scale per layer"):
        choice("grid", "affine", granularity="tensor").fit(W, 4, 3)


@pytest.mark.parametrize("zero", list(Zero), ids=lambda z: z.value)
@pytest.mark.parametrize("constant", [0.0, 0.37, -2.0])
def test_constant_rows_are_exact(choice, zero: Zero, constant: float) -> None:
    W = torch.full((1, 3, 8), constant)
    grid = choice(
        "grid", "affine", zero=zero.value, include_zero=zero is not Zero.float, parameter_bits=32
    ).fit(W, 4)
    error = (W - grid.values(grid.round(W))).abs().max()
    # a symmetric grid has no level at its upper end, so it is exact to half a step only
    assert float(error) <= (abs(constant) / 14 if zero is Zero.none else abs(constant) * 1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_sixteen_bits(choice, name: str) -> None:
    W = random_weights(1, 3, 20)
    grid = choice("grid", name, parameter_bits=32).fit(W, 16, None, torch.eye(20)[None])
    assert float((W - grid.values(grid.round(W))).abs().max()) < 2e-4


def test_a_narrow_row_far_from_zero_is_stored_as_it_is(choice) -> None:
    W = 1 + 0.004 * torch.rand(1, 2, 30, generator=torch.Generator().manual_seed(0))
    grid = choice("grid", "affine_release").fit(W, 8)
    codes = grid.round(W)
    again, codes_again = AffineGrid.from_storage(*grid.storage(codes))
    assert torch.equal(again.values(codes_again), grid.values(codes))
    assert float((W - grid.values(codes)).abs().max()) < 0.005


@pytest.mark.parametrize("bits", [0, 1.5, 17, -2], ids=str)
def test_impossible_bits(choice, bits: float) -> None:
    with pytest.raises(InputError, match=f"integer from 1 to 16.*got {bits:g}"):
        choice("grid", "affine").fit(torch.randn(1, 2, 3), bits)


@pytest.mark.parametrize("group_size", [0, -1])
def test_impossible_group_sizes(choice, group_size: int) -> None:
    with pytest.raises(InputError, match=f"at least 1.*got {group_size}"):
        choice("grid", "affine").fit(torch.randn(1, 2, 3), 4, group_size)
