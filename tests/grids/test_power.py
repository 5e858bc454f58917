"""The power grid: its exponent is found and learned, and everything else a grid promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.grids.power import PowerGrid
from tests.conftest import random_problem


def on_a_power_grid(t: float, bits: int = 4) -> Tensor:
    """Weights [1, 6, 40] that lie on a power grid with exponent t, every level used."""
    half = 2 ** (bits - 1) - 1
    u = torch.arange(-half, half + 1, dtype=torch.float64) / half
    index = torch.randint(len(u), (1, 6, 40), generator=torch.Generator().manual_seed(0))
    index[..., : len(u)] = torch.arange(len(u))
    scale = torch.linspace(0.5, 2, 6, dtype=torch.float64)[None, :, None]
    return (u.sign() * u.abs() ** t)[index] * scale


@pytest.mark.parametrize("t", [0.7, 1.0, 1.8, 2.6])
def test_nelder_mead_finds_the_exponent(choice, t: float) -> None:
    grid = choice("grid", "power_learned", evaluations=60, parameter_bits=32).fit(on_a_power_grid(t), 4)
    assert float(grid.log_exponent.exp()) == pytest.approx(t, rel=0.03)


def test_an_exponent_of_its_own_beats_the_start(choice) -> None:
    W = random_problem(8, 48).W
    errors = []
    for evaluations in (0, 30):
        grid = choice("grid", "power_learned", evaluations=evaluations, starts=[3.0]).fit(W, 3)
        errors.append(float((W - grid.values(grid.round(W))).square().sum()))
    assert errors[1] < errors[0]


def test_nearest_columns_refit_and_storage_agree(choice) -> None:
    problem = random_problem(5, 23)
    grid = choice("grid", "power_learned").fit(problem.T, 3, 8, problem.H)
    codes = grid.round(problem.T)
    for j in (0, 7, 8, 22):
        column, values = grid.round_column(problem.T[..., j], j)
        assert torch.equal(column, codes[..., j].long())
        assert_close(values, grid.values(codes)[..., j])
    levels = grid.values(torch.arange(-3, 4)[:, None, None].expand(-1, 5, 23))  # [7, out, in]
    least = (levels - problem.T).abs().amin(0)
    assert_close((grid.values(codes) - problem.T).abs()[0], least)
    better = grid.refit(codes, problem.T, problem.H)
    before, after = (float(problem.error(g.values(codes)).sum()) for g in (grid, better))
    assert after < before
    back, codes_back = PowerGrid.from_storage(*better.storage(codes))
    assert torch.equal(codes_back, codes)
    assert_close(back.values(codes).double(), better.values(codes))
    tensors, _ = better.storage(codes)
    stored = sum(t.numel() * t.element_size() * 8 for t in tensors.values())
    assert 0 <= stored - sum(better.storage_bits(codes).values()) < 8


def test_the_exponent_is_learned_with_the_codes(choice) -> None:
    """From a start that is off, training moves the exponent and lowers the error."""
    problem = random_problem(8, 32, dtype=torch.float32)
    spec = choice("grid", "power_learned", evaluations=0, starts=[2.5])
    changes = {
        "relaxation": "full_range",
        "variables": ["rounding", "grid"],
        "iterations": 200,
        "rounding_rate": 0.01,
        "schedule": "cosine",
        "keep_best": True,
    }
    errors = {}
    for rate in (1.0e-9, 0.01):
        codes, grid = choice("method", "adaround", grid_rate=rate, **changes).quantize_layer(
            problem, spec, 3, None
        )
        errors[rate] = problem.relative_error(grid.values(codes))
        assert (float(grid.log_exponent.exp()) == pytest.approx(2.5, rel=1e-3)) == (rate < 1e-6)
    assert errors[0.01] < 0.98 * errors[1.0e-9]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"starts": [4.0]}, "between least and most"), ({"shrink_steps": 0}, "shrink_steps")],
    ids=["start", "steps"],
)
def test_wrong_settings(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("grid", "power_learned", **overrides)


def test_one_bit_is_refused(choice) -> None:
    with pytest.raises(InputError, match="from 2 to 8 on a power grid"):
        choice("grid", "power_learned").check(1, None)
