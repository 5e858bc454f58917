"""Relaxations: constants, starts, gradients, ends, on every kind of grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.grids.affine import AffineGrid
from ptq.grids.grid import Grid
from ptq.grids.row_widths import RowWidths
from ptq.solvers.grid_variables import GridForm, GridVariables
from ptq.solvers.soft_rounding import Kind, Softening, place, relax
from tests.conftest import random_problem

GRIDS = ["affine", "affine_float", "symmetric", "codebook", "power", "ptnq", "ptnq_function", "normal_float"]
TWO_CODES = [Kind.sigmoid, Kind.progressive, Kind.clipped_offset]


def softening(kind: Kind, **changes: object) -> Softening:
    values = {
        "regularisation": 0.01,
        "beta": (20.0, 2.0),
        "warmup": 0.2,
        "soft_fractions": [0.5, 0.1] if kind is Kind.progressive else [],
    }
    return Softening(kind=kind, **{**values, **changes})


def affine(code_min: int = 0, code_max: int = 3, scale: float = 0.5, zero: float = 1.0) -> AffineGrid:
    return AffineGrid(
        scale=torch.full((1, 1, 1), scale, dtype=torch.float64),
        zero_point=torch.full((1, 1, 1), zero, dtype=torch.float64),
        offset=None,
        code_min=code_min,
        code_max=code_max,
        bits=2,
        in_features=5,
        group_size=None,
        parameter_bits=32,
        per_tensor=False,
    )


def fitted(choice, name: str, bits: int = 3) -> tuple[Grid, Tensor]:
    problem = random_problem(4, 18)
    return choice("grid", name).fit(problem.T, bits, None, problem.H), problem.T


def test_place_on_an_affine_grid_is_the_real_code() -> None:
    """Values −0.5, 0, 0.5, 1: floor, not truncation, below zero; outside the range beyond the ends."""
    T = torch.tensor([[[-0.1, 0.6, 1.0, 1.7, -1.2]]], dtype=torch.float64)
    assert_close(place(affine(), T), T / 0.5 + 1)


def test_first_h_reproduces_the_float_weights_and_the_constants_are_adarounds() -> None:
    T = torch.tensor([[[-0.1, 0.6, 0.95, 0.2, -0.45]]], dtype=torch.float64)
    grid = affine()
    rounding = relax(softening(Kind.sigmoid), grid, T, grid.round(T))
    assert_close(rounding.values(grid), T)
    r = T / 0.5 - (T / 0.5).floor()
    assert_close(rounding.V, -torch.log(1.2 / (r + 0.1) - 1))
    # Σ 1 − |2h − 1|^β with β = 20 at the end of the warm-up and 2 at the end
    assert rounding.regulariser(0.1) is None
    assert_close(rounding.regulariser(0.2), 0.01 * (1 - (2 * r - 1).abs() ** 20).sum())
    assert_close(rounding.regulariser(0.6), 0.01 * (1 - (2 * r - 1).abs() ** 11).sum())
    assert_close(rounding.regulariser(1.0), 0.01 * (1 - (2 * r - 1).abs() ** 2).sum())


def test_clipped_after_h_is_added() -> None:
    """A saturated weight keeps the end of the range whatever its h, and the other codes never leave it."""
    T = torch.tensor([[[-5.0, -0.6, 0.9, 1.1, 9.0]]], dtype=torch.float64)
    grid = affine()
    for h in (0.0, 1.0):
        rounding = relax(softening(Kind.clipped_offset), grid, T, grid.round(T))
        rounding.V = torch.full_like(T, h)
        codes = rounding.codes(grid)
        assert codes.flatten().tolist()[::4] == [0, 3]
        assert bool(((codes >= 0) & (codes <= 3)).all())
        assert_close(rounding.values(grid), grid.values(codes))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("name", GRIDS)
def test_starts_at_the_given_codes(choice, kind: Kind, name: str) -> None:
    """Untrained, every relaxation ends as the codes it was given, whether these are the nearest or not."""
    grid, T = fitted(choice, name)
    nearest = grid.round(T)
    flip = torch.rand(T.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    moved = torch.where(flip, (nearest + 1).clamp_max(grid.code_max), nearest)
    for codes in (nearest, moved):
        rounding = relax(softening(kind), grid, T, codes)
        assert torch.equal(rounding.codes(grid), codes)
        assert rounding.values(grid).shape == T.shape
    if kind not in TWO_CODES:  # straight-through: what is seen is the hard value
        assert_close(rounding.values(grid), grid.values(moved))


@pytest.mark.parametrize("name", [g for g in GRIDS if g != "ptnq_function"])
def test_gradients_by_finite_differences(choice, name: str) -> None:
    """Of the soft value, in V and in every parameter of the grid."""
    grid, T = fitted(choice, name)
    grid = grid.with_parameters({n: p.double() for n, p in grid.parameters().items()})
    rounding = relax(softening(Kind.sigmoid), grid, T, grid.round(T))
    variables = GridVariables(grid, GridForm.relative, trained=True)
    direction = torch.randn(T.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value() -> Tensor:
        return (rounding.values(variables.grid()) * direction).sum()

    leaves = [rounding.V.requires_grad_(True), *variables.requires_grad()]
    slopes = torch.autograd.grad(value(), leaves)
    for leaf, slope in zip(leaves, slopes, strict=True):
        along = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            leaf += 1e-6 * along
            after = value()
            leaf -= 2e-6 * along
            before = value()
            leaf += 1e-6 * along
        assert_close((after - before) / 2e-6, (slope * along).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("name", [*GRIDS, "ptnq_channel", "entropy"])
def test_nearly_every_weight_has_a_gradient(choice, kind: Kind, name: str) -> None:
    """On every kind of grid; without one are weights that a range cuts off."""
    grid, T = fitted(choice, name)
    rounding = relax(softening(kind, soft_fractions=[0.99]), grid, T, grid.round(T))
    rounding.V.requires_grad_(True)
    (rounding.values(grid) * torch.randn_like(T)).sum().backward()
    assert float((rounding.V.grad != 0).double().mean()) > 0.8


@pytest.mark.parametrize("kind", [Kind.signed_offset, Kind.weights, Kind.division, Kind.full_range])
def test_straight_through_gradients(kind: Kind) -> None:
    """dŵ/dV is the step (in the weights' own units where V is one), and a scale's that of LSQ."""
    T = torch.tensor([[[-0.1, 0.6, 0.9, 0.2, 5.0]]], dtype=torch.float64)
    grid = affine()
    rounding = relax(softening(kind), grid, T, grid.round(T))
    scale = grid.scale.clone().requires_grad_(True)
    rounding.V.requires_grad_(True)
    W_hat = rounding.values(grid.with_parameters({"scale": scale}))
    slope_V, slope = torch.autograd.grad(W_hat.sum(), [rounding.V, scale])
    inside = torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64)
    expected = {Kind.signed_offset: 0.5 * inside, Kind.weights: inside, Kind.division: -T[0, 0] * inside}
    if kind is Kind.full_range:
        assert_close(slope_V[0, 0], torch.full((5,), 0.5, dtype=torch.float64))
        assert_close(slope.sum(), (rounding.codes(grid) - 1).sum().double())
    else:
        assert_close(slope_V[0, 0], expected[kind])
        lsq = torch.where(inside > 0, rounding.codes(grid)[0, 0] - 1 - T[0, 0] / 0.5, 2.0)
        assert_close(slope.sum(), lsq.sum())


def test_full_range_moves_by_several_codes_and_offsets_do_not() -> None:
    T = torch.zeros(1, 1, 5, dtype=torch.float64)
    grid = affine()
    for kind, reached in ((Kind.full_range, 3), (Kind.clipped_offset, 2), (Kind.signed_offset, 2)):
        rounding = relax(softening(kind), grid, T, grid.round(T))  # code 1
        rounding.V = rounding.V + 7
        rounding.advance(0.5, grid)
        assert int(rounding.codes(grid).max()) == reached


def test_progressive_hardening_follows_its_fractions(choice) -> None:
    grid, T = fitted(choice, "affine_float")
    rounding = relax(softening(Kind.progressive, soft_fractions=[0.75, 0.25]), grid, T, grid.round(T))
    assert rounding.learned is not None
    soft = [float(rounding.learned.double().mean())]
    for progress in (0.2, 0.5, 0.6, 0.99, 1.0):
        rounding.advance(progress, grid)
        soft.append(0 if rounding.learned is None else float(rounding.learned.double().mean()))
    assert soft == pytest.approx([0.75, 0.75, 0.25, 0.25, 0.25, 0], abs=0.02)
    assert rounding.undecided() == 0
    settled = rounding.codes(grid)
    rounding.V = -rounding.V  # settled weights no longer move
    assert torch.equal(rounding.codes(grid), settled)


def test_progressive_hardening_counts_the_weights_to_learn_only(choice) -> None:
    grid, T = fitted(choice, "affine_float")
    mask = torch.zeros_like(T, dtype=torch.bool)
    mask[..., ::6] = True
    given = mask.clone()
    rounding = relax(softening(Kind.progressive, soft_fractions=[0.75, 0.25]), grid, T, grid.round(T), mask)
    assert int(rounding.learned.sum()) == math.ceil(0.75 * int(mask.sum()))
    assert rounding.undecided() <= 0.75
    rounding.advance(0.5, grid)
    assert int(rounding.learned.sum()) == math.ceil(0.25 * int(mask.sum()))
    assert torch.equal(mask, given)  # the caller's own


def some_widths(choice, name: str) -> tuple[Grid, Tensor]:
    """Rows of two to eight bits, whose narrow ranges cut weights off at both ends."""
    problem = random_problem(8, 40)
    rows = torch.tensor([[2, 2, 3, 8, 4, 2, 3, 8]])
    spec = RowWidths(inner=choice("grid", name), rows=rows, widths=[2, 3, 4, 8])
    return spec.fit(problem.T, 0), problem.T


@pytest.mark.parametrize("kind", [Kind.full_range, Kind.signed_offset])
@pytest.mark.parametrize("name", ["affine_mse", "symmetric"])
def test_no_weight_is_stuck_at_the_end_of_a_narrow_row(choice, kind: Kind, name: str) -> None:
    grid, T = some_widths(choice, name)
    codes = grid.round(T)
    least, most = grid.code_limits()
    assert bool(((codes == least) | (codes == most)).any(-1).all())
    rounding = relax(softening(kind), grid, T, codes)
    rounding.V.requires_grad_(True)
    soft = rounding.values(grid)
    assert_close(soft, grid.values(codes))
    soft.sum().backward()
    inside = rounding.V.grad != 0
    if kind is Kind.signed_offset:  # beyond the end an offset changes nothing
        whole = place(grid, T)
        assert torch.equal(inside, (whole >= least - 0.5) & (whole <= most + 0.5))
        assert not bool(inside.all())
    else:
        assert bool(inside.all())
        with torch.no_grad():
            rounding.V -= 1.0
            rounding.advance(0.5, grid)
        assert bool((least <= rounding.V).all())
        assert torch.equal(rounding.codes(grid), (codes - 1).clamp(least, most).to(codes.dtype))


def test_places_of_a_narrow_row_are_those_of_its_own_grid(choice) -> None:
    grid, T = some_widths(choice, "affine_mse")
    whole = place(grid, T)
    for width, own in grid.grids.items():
        rows = grid.rows[0] == width
        assert_close(whole[:, rows], place(own, T[:, rows]))


@pytest.mark.parametrize("name", ["symmetric", "power_learned"])
def test_a_range_never_becomes_nothing(choice, name: str) -> None:
    grid, _ = fitted(choice, name)
    variables = GridVariables(grid, GridForm.range, trained=True)
    for v in variables.variables.values():
        v -= 5.0
    variables.advance()
    assert_close(variables.grid().scale, 1e-3 * grid.scale)


@pytest.mark.parametrize("form", GridForm)
def test_exponents_of_rows_of_one_width_move_as_logarithms(choice, form: GridForm) -> None:
    grid, _ = some_widths(choice, "power_learned")
    before = {width: own.log_exponent.clone() for width, own in grid.grids.items()}
    variables = GridVariables(grid, form, trained=True)
    for name, v in variables.variables.items():
        v += 0.1 if "log_exponent" in name else 0.0
    for width, own in variables.grid().grids.items():
        assert_close(own.log_exponent, before[width] + 0.1)


def test_weights_that_are_not_learned_stay(choice) -> None:
    grid, T = fitted(choice, "affine_float")
    mask = torch.zeros_like(T, dtype=torch.bool)
    mask[..., ::2] = True
    for kind in (Kind.sigmoid, Kind.full_range, Kind.weights):
        rounding = relax(softening(kind), grid, T, grid.round(T), mask)
        rounding.V = rounding.V + (5.0 if kind is not Kind.weights else float(T.abs().max()) * 4)
        assert torch.equal(rounding.codes(grid)[..., 1::2], grid.round(T)[..., 1::2])
        assert not torch.equal(rounding.codes(grid), grid.round(T))


def test_range_factors_move_the_zero_point() -> None:
    variables = GridVariables(affine(), GridForm.range, trained=True)
    assert_close(variables.grid().scale, affine().scale)
    variables.variables["low"] = torch.full((1, 1, 1), -1.0, dtype=torch.float64)  # low end to zero
    moved = variables.grid()
    assert isinstance(moved, AffineGrid)
    assert_close(moved.values(torch.tensor([[[0, 3]]])), torch.tensor([[[0.0, 1.0]]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": 1.0}, "warmup in"),
        ({"regularisation": -1.0}, "must not be negative"),
        ({"soft_fractions": [0.1, 0.5]}, "fall within"),
        ({"soft_fractions": []}, "fall within"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_wrong_settings(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        softening(Kind.progressive, **changes)


def test_no_weight_is_exactly_undecided_at_the_ends() -> None:
    """V of ±2.4 is the stretched sigmoid's end: h reaches 0 and 1 at finite V."""
    T = torch.tensor([[[0.25, 0.25, 0.25, 0.25, 0.25]]], dtype=torch.float64)
    rounding = relax(softening(Kind.sigmoid), affine(), T, affine().round(T))
    assert rounding.undecided() == 1
    rounding.V = torch.tensor([[[2.5, -2.5, 2.5, -2.5, math.log(11)]]], dtype=torch.float64)
    assert rounding.undecided() == 0
