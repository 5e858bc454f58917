"""WaterSIC, ours and as published: what the theory promises, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from ptq.errors import InputError
from ptq.grids.scaled import RowScaled
from ptq.limit import limit_error
from ptq.problem import LayerProblem
from ptq.rate import quantize_to_rate
from tests.conftest import random_problem


def gaussian(out: int, width: int, seed: int = 0) -> LayerProblem:
    """Gaussian weights, inputs with a power-law spectrum in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, width, generator=generator)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -1.5
    return LayerProblem("gaussian", W, basis * spectrum @ basis.mT)


def test_a_quarter_of_a_bit_above_the_limit(choice) -> None:
    """½ log2(2πe/12) at high rates; GPTQ with one step is off by the spread of the cells as well."""
    problem, bits = gaussian(2048, 32), 4.0
    limit = limit_error(problem.H, problem.T, bits)
    gaps = {}
    for method, grid in (("watersic", "entropy_columns"), ("gptq", "entropy")):
        codes, fitted = quantize_to_rate(choice("method", method), problem, choice("grid", grid), bits, None)
        gaps[method] = math.log2(problem.relative_error(fitted.values(codes)) / limit)
    assert gaps["watersic"] == pytest.approx(0.2546, abs=0.05)
    assert gaps["watersic"] < gaps["gptq"]


def test_the_residual_of_successive_rounding_is_inside_the_cube(choice) -> None:
    problem = gaussian(40, 24)
    method = choice("method", "watersic_paper", shrink=False, most_rounds=0, damping=0.0)
    codes, grid = method.quantize_layer(problem, choice("grid", "entropy_columns"), 3, None)
    assert isinstance(grid, RowScaled)
    L = torch.linalg.cholesky(problem.H[0])
    residual = (problem.T - grid.values(codes))[0].double() @ L
    # the widths of the cells, c, are one for all inputs
    steps = grid.inner.scale[0, 0].double() * float(grid.inner.inner.step)
    widths = steps * L.diagonal()
    torch.testing.assert_close(widths, widths.mean().expand(24), rtol=1e-3, atol=0)
    assert float(residual.abs().max()) <= 0.5 * float(widths.max()) * 1.01
    assert float(residual.abs().max()) > 0.4 * float(widths.max())


def test_factors_of_rows_and_columns_lower_the_error(choice) -> None:
    problem = gaussian(300, 24)
    errors = []
    for overrides in ({"shrink": False, "most_rounds": 0}, {"shrink": True, "most_rounds": 0}, {}):
        method = choice("method", "watersic_paper", **overrides)
        codes, grid = quantize_to_rate(method, problem, choice("grid", "entropy_columns"), 2.0, None)
        errors.append(problem.relative_error(grid.values(codes)))
    assert errors[0] > errors[1] >= errors[2] * 0.999


def test_weak_inputs_are_deleted(choice) -> None:
    problem = gaussian(30, 12)
    gains = torch.ones(12, dtype=torch.float64)
    gains[[2, 7]] = 1e-3
    problem = LayerProblem("weak", problem.W, problem.H * gains[:, None] * gains)
    codes, grid = choice("method", "watersic_paper").quantize_layer(
        problem, choice("grid", "entropy_columns"), 4, None
    )
    assert not bool(codes[..., [2, 7]].any())
    assert bool(codes[..., [0, 1, 3]].any())
    assert problem.relative_error(grid.values(codes)) < 0.1


def test_trials_of_one_layer_share_their_factorisation(choice, monkeypatch) -> None:
    from ptq.methods import watersic

    calls = []
    original = watersic.prepare
    monkeypatch.setattr(watersic, "prepare", lambda *a, **k: calls.append(1) or original(*a, **k))
    quantize_to_rate(
        choice("method", "watersic"), random_problem(60, 20), choice("grid", "entropy_columns"), 1.7, None
    )
    assert len(calls) == 1  # the ridge needs the weight of inputs only


@pytest.mark.parametrize("grid", ["affine", "entropy", "entropy_rows"])
def test_published_watersic_refuses_other_grids(choice, grid: str) -> None:
    with pytest.raises(InputError, match="use grid=entropy_columns"):
        choice("method", "watersic_paper").check_grid(choice("grid", grid))


def test_row_scales_are_refused_with_a_way_out(choice) -> None:
    with pytest.raises(InputError, match="neither range nor row scales"):
        choice("method", "watersic").check_grid(choice("grid", "entropy_rows"))


def test_sweeps_with_a_rate_term_lower_the_error_of_a_correlated_layer_at_its_rate(choice) -> None:
    """Not the limit's high rates: at one bit, where most codes are 0 and what a code costs differs most."""
    problem, grid = random_problem(96, 64, seed=3), choice("grid", "entropy")
    errors = {}
    for sweeps in (0, 2):
        method = choice("method", "watersic", sweeps=sweeps, ridge=0.0)
        codes, fitted = quantize_to_rate(method, problem, grid, 1.0, None)
        stored = sum(fitted.storage_bits(codes).values()) / problem.W.numel()
        assert stored == pytest.approx(1.0, abs=0.006)
        errors[sweeps] = problem.relative_error(fitted.values(codes))
    assert errors[2] < 0.98 * errors[0]
