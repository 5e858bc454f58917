"""Codebook grids: k-means against the affine grids, exact refits, storage, odd units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.grids.codebook import CodebookGrid, code_gram, ordered_least_squares
from ptq.grids.grid import Grid
from ptq.grids.kmeans import SortedUnits, scalar_kmeans
from tests.conftest import Golden, random_problem

GRIDS = ["codebook", "codebook_weight", "codebook_tensor"]
SHRINKS = [1 - k * 0.01 for k in range(80)]


def random_weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 5, 1], ids=["row", "ragged", "one"])
def test_values_come_back_exactly_and_through_storage(
    choice, name: str, bits: int, group_size: int | None
) -> None:
    if name == "codebook_tensor" and group_size is not None:
        with pytest.raises(InputError, match=f"takes no group_size; got {group_size}"):
            choice("grid", name).check(bits, group_size)
        return
    W = random_weights(2, 7, 13).float()
    spec = choice("grid", name)
    grid = spec.fit(W, bits, group_size, torch.eye(13).expand(2, -1, -1))
    codes = grid.round(W)
    values = grid.values(codes)
    assert int(codes.min()) >= grid.code_min
    assert int(codes.max()) <= grid.code_max
    assert torch.equal(grid.values(grid.round(values)), values)
    assert bool((grid.levels.diff() >= 0).all())
    tensors, facts = grid.storage(codes)
    again, codes_again = CodebookGrid.from_storage(tensors, facts)
    assert torch.equal(codes_again, codes)
    assert torch.equal(again.values(codes_again), values)
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    expected = sum(grid.storage_bits(codes).values())
    assert expected <= stored < expected + 8 * len(tensors)
    assert spec.size(W, bits, group_size) == grid.storage_bits(codes)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 5])
def test_rounding_a_column_is_rounding(choice, name: str, bits: int) -> None:
    W = random_weights(2, 6, 11).float()
    for group_size in (None,) if name == "codebook_tensor" else (None, 4):
        grid = choice("grid", name).fit(W, bits, group_size, torch.eye(11).expand(2, -1, -1))
        V = 1.3 * random_weights(2, 6, 11, seed=1).float()
        codes, values = grid.round(V), grid.values(grid.round(V))
        nearest = (
            V[..., None] - grid.levels.expand(2, 6, -1, -1)[:, :, torch.arange(11) // (group_size or 11)]
        ).abs()
        assert_close((V - values).abs(), nearest.amin(-1))
        own = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(2))
        for column in (0, 7, 10):
            code, value = grid.round_column(V[..., column], column)
            assert torch.equal(code, codes[..., column].long())
            assert torch.equal(value, values[..., column])
        code, value = grid.round_column(V.gather(-1, own[..., None])[..., 0], own)
        assert torch.equal(code, codes.gather(-1, own[..., None])[..., 0].long())
        assert torch.equal(value, values.gather(-1, own[..., None])[..., 0])


@pytest.mark.parametrize("metric", ["weight", "diagonal"])
@pytest.mark.parametrize("group_size", [None, 16], ids=["row", "groups"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_never_worse_than_an_affine_grid_under_its_own_metric(
    choice, metric: str, group_size: int | None, bits: int
) -> None:
    problem = random_problem(8, 40)
    W, H = problem.W, problem.H
    W[:, ::4] = W[:, ::4] ** 3  # some heavy tails
    power = H.diagonal(dim1=-2, dim2=-1)[:, None] if metric == "diagonal" else torch.ones(1, 1, 40)

    def errors(grid: Grid) -> Tensor:
        squared = power * (W - grid.values(grid.round(W))).square()
        return torch.stack([e.sum(-1) for e in squared.split(group_size or 40, dim=-1)], -1)

    mine = errors(choice("grid", "codebook", metric=metric, parameter_bits=32).fit(W, bits, group_size, H))
    for affine in ("affine", "affine_float", "affine_release", "symmetric"):
        for rule in ("min_max", "mse", "l2_4", "gram"):
            theirs = choice("grid", affine, range=rule, parameter_bits=32).fit(W, bits, group_size, H)
            assert bool((mine <= errors(theirs) * (1 + 1e-6)).all())


def test_the_affine_table_itself_is_a_start() -> None:
    # 64 levels for 500 values: too many for the dynamic programme, and one iteration is no help
    x = random_weights(30, 500) ** 3
    units = SortedUnits(x, torch.ones_like(x))
    even = units.evenly_spaced(64, SHRINKS)
    for shrink in SHRINKS[::7]:
        symmetric = shrink * 2 * x.abs().amax(-1, keepdim=True) / 63 * (torch.arange(64) - 32)
        assert bool((units.cost(even) <= units.cost(symmetric) + 1e-12).all())
    found = scalar_kmeans(x, torch.ones_like(x), 64, iterations=1, shrinks=SHRINKS)
    assert bool((units.cost(found) <= units.cost(even)).all())


def exact_cost(x: Tensor, mass: Tensor, num_levels: int) -> float:
    """The least cost of any table by dynamic programming over the sorted values."""
    x, order = x.sort()
    mass = mass[order]
    n = len(x)
    cost = torch.full((n + 1, n + 1), torch.inf, dtype=torch.float64)
    for i in range(n + 1):
        cost[i, i] = 0
        for j in range(i + 1, n + 1):
            m, y = mass[i:j], x[i:j]
            mean = (m * y).sum() / m.sum()
            cost[i, j] = (m * (y - mean).square()).sum()
    best = cost[0]
    for _ in range(num_levels - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[n])


@pytest.mark.parametrize("num_levels", [2, 4, 8])
def test_kmeans_of_few_values_is_exact(num_levels: int) -> None:
    x = random_weights(20, 40) ** 3
    mass = random_weights(20, 40, seed=1).square() + 0.01
    levels = scalar_kmeans(x, mass, num_levels, iterations=100, shrinks=SHRINKS)
    distance = (x[..., None] - levels[:, None]).square().amin(-1)
    found = (mass * distance).sum(-1)
    exact = torch.tensor([exact_cost(x[i], mass[i], num_levels) for i in range(20)], dtype=torch.float64)
    assert bool((found >= exact * (1 - 1e-9)).all())
    assert_close(found, exact)


def test_lloyd_never_raises_the_cost() -> None:
    x, mass = random_weights(9, 50), random_weights(9, 50, seed=1).square()
    units = SortedUnits(x, mass)
    levels = random_weights(9, 6, seed=2).sort(-1).values
    mass = mass / mass.sum(-1, keepdim=True)
    for _ in range(8):
        cost = units.cost(levels)
        direct = (mass * (x[..., None] - levels[:, None]).square().amin(-1)).sum(-1)
        assert_close(cost + (mass * x.square()).sum(-1), direct)
        levels = units.lloyd(levels, 1)
        assert bool((units.cost(levels) <= cost + 1e-12).all())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("group_size", [None, 4, 7, 1], ids=["row", "four", "ragged", "one"])
@pytest.mark.parametrize("parameter_bits", [16, 32])
def test_refit_never_raises_the_objective(
    choice, name: str, group_size: int | None, parameter_bits: int
) -> None:
    if name == "codebook_tensor":
        group_size = None
    problem = random_problem(5, 18, groups=2)
    grid = choice("grid", name, parameter_bits=parameter_bits).fit(problem.W, 3, group_size, problem.H)
    for noise in (0.0, 0.3, 2.0):
        codes = grid.round(problem.W + noise * random_weights(2, 5, 18, seed=3))
        before = problem.error(grid.values(codes))
        refitted = grid.refit(codes, problem.W, problem.H)
        after = problem.error(refitted.values(codes))
        if grid.shared:
            before, after = before.sum(), after.sum()
        assert bool((after <= before * (1 + 1e-9)).all())
        assert float(after.sum()) < float(before.sum()) or noise == 0
        assert bool((refitted.levels.diff() >= 0).all())
        assert torch.equal(refitted.as_stored().levels, refitted.levels)


def test_refit_is_least_squares_where_levels_keep_their_order(choice) -> None:
    problem = random_problem(6, 60, groups=2)
    grid = choice("grid", "codebook", parameter_bits=32).fit(problem.W, 2, None, problem.H)
    codes = grid.round(problem.W)
    refitted = grid.refit(codes, problem.W, problem.H)
    L = torch.linalg.cholesky(problem.H)
    ordered = 0
    for g in range(2):
        for row in range(6):
            A = L[g].T @ torch.nn.functional.one_hot(codes[g, row].long(), 4).double()
            theta = torch.linalg.lstsq(A, (L[g].T @ problem.W[g, row])[:, None], driver="gelsd").solution
            if bool((theta[:, 0].diff() > 0).all()):
                ordered += 1
                assert_close(refitted.levels[g, row, 0], theta[:, 0], rtol=1e-5, atol=1e-6)
    assert ordered >= 6


def test_crossing_levels_are_tied() -> None:
    # alone, the middle levels would go to 3 and 1: the best common place is their mean, 2
    start = torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64)
    wanted = torch.tensor([[0.0, 3.0, 1.0, 4.0]], dtype=torch.float64)
    M = torch.eye(4, dtype=torch.float64)[None]
    assert_close(ordered_least_squares(M, wanted - start, start), torch.tensor([[0.0, 2, 2, 4]]).double())
    # a level without weight gives way
    M[0, 2, 2] = 0
    theta = ordered_least_squares(M, (wanted - start) * torch.tensor([1.0, 1, 0, 1]), start)
    assert_close(theta, torch.tensor([[0.0, 3, 3, 4]]).double(), rtol=1e-6, atol=1e-6)


def test_crossing_rows_end_lower_and_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(50, 9, 8, generator=generator, dtype=torch.float64)
    M, v = A.mT @ A, 5 * torch.randn(50, 8, generator=generator, dtype=torch.float64)
    start = random_weights(50, 8, seed=1).sort(-1).values
    theta = ordered_least_squares(M, v, start)
    assert bool((theta.diff() >= 0).all())
    step = theta - start
    change = (step[:, None] @ M @ step[..., None])[:, 0, 0] - 2 * (v * step).sum(-1)
    assert bool((change <= 0).all())
    assert int((change < 0).sum()) > 45


def test_code_gram_equals_the_one_hot_product() -> None:
    problem = random_problem(5, 17, groups=3)
    index = torch.randint(6, (3, 5, 17), generator=torch.Generator().manual_seed(0))
    B = torch.nn.functional.one_hot(index, 6).double()
    assert_close(code_gram(index, problem.H, 6), B.mT @ problem.H[:, None] @ B)


def test_a_table_for_the_tensor_is_refitted_for_all_rows(choice) -> None:
    problem = random_problem(4, 9, groups=2)
    grid = choice("grid", "codebook_tensor", parameter_bits=32).fit(problem.W, 2, None, problem.H)
    codes = grid.round(problem.W)
    levels = grid.refit(codes, problem.W, problem.H).levels
    assert levels.shape == (1, 1, 1, 4)
    B = torch.nn.functional.one_hot(codes.long(), 4).double()
    M = (B.mT @ problem.H[:, None] @ B).sum((0, 1))
    v = ((problem.W @ problem.H)[:, :, None] @ B).sum((0, 1))[0]
    assert_close(levels[0, 0, 0], torch.linalg.solve(M, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "case", ["dead inputs", "one dead input", "constant", "zero", "ternary", "one column"]
)
def test_odd_weights(choice, name: str, case: str) -> None:
    inputs = 1 if case == "one column" else 10
    problem = random_problem(3, inputs, dtype=torch.float32)
    W, H = problem.W, problem.H
    if case == "dead inputs":
        H = torch.zeros_like(H)
    elif case == "one dead input":
        H[:, 2], H[:, :, 2] = 0, 0
    elif case == "constant":
        W = torch.full_like(W, -0.37)
    elif case == "zero":
        W = torch.zeros_like(W)
    elif case == "ternary":
        W = torch.where(W.abs() < 0.3, 0.0, 0.7 * W.sign())
    spec = choice("grid", name, parameter_bits=32)
    for group_size in (None,) if name == "codebook_tensor" else (None, 4):
        grid = spec.fit(W, 2, group_size, H)
        codes = grid.round(W)
        refitted = grid.refit(codes, W, H)
        for fitted in (grid, refitted):
            assert bool(torch.isfinite(fitted.values(codes)).all())
            if case in ("constant", "zero", "ternary", "one column"):
                assert_close(fitted.values(codes), W, rtol=1e-6, atol=1e-7)
    assert torch.equal(refitted.values(codes), grid.values(codes)) or case not in ("dead inputs", "zero")


def test_scaling_and_permuting_rows(choice) -> None:
    W = random_weights(1, 6, 40)
    spec = choice("grid", "codebook_weight", parameter_bits=32)

    def quantized(V: Tensor) -> Tensor:
        grid = spec.fit(V, 3)
        return grid.values(grid.round(V))

    assert_close(quantized(2 * W), 2 * quantized(W))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(quantized(W[:, order]), quantized(W)[:, order])
    grid = spec.fit(W, 3)
    assert_close(grid.scaled(0.5).values(grid.round(W)), 0.5 * quantized(W))


def test_rows_and_units_are_exchanged_alone(choice) -> None:
    W = random_weights(1, 3, 12)
    spec = choice("grid", "codebook_weight")
    a, b = spec.fit(W, 2, 4), spec.fit(2 * W, 2, 4)
    mixed = a.where(torch.tensor([[True, False, True]]), b)
    assert torch.equal(mixed.levels[:, 1], b.levels[:, 1])
    assert torch.equal(mixed.levels[:, ::2], a.levels[:, ::2])
    one = spec.fit(3 * W[..., 4:8], 2)
    replaced = a.replace_unit(1, one)
    assert torch.equal(replaced.levels[:, :, 1], one.levels[:, :, 0])
    assert torch.equal(replaced.levels[:, :, ::2], a.levels[:, :, ::2])


def test_values_are_differentiable_in_the_levels(choice) -> None:
    W = random_weights(2, 3, 10)
    grid = choice("grid", "codebook_weight").fit(W, 2, 4)
    codes = grid.round(W)
    levels = grid.parameters()["levels"].clone().requires_grad_()
    grid.with_parameters({"levels": levels}).values(codes).sum().backward()
    assert levels.grad is not None
    counts = torch.nn.functional.one_hot(codes.long(), 4).double()
    expected = torch.stack([c.sum(2) for c in counts.split(4, dim=2)], 2)
    assert_close(levels.grad, expected)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_comq_on_a_codebook_beats_comq_on_affine_grids(choice, golden: Golden, bits: int) -> None:
    errors = {}
    for name in ("codebook", "affine_float"):
        codes, grid = choice("method", "comq").quantize_layer(
            golden.problem, choice("grid", name), bits, None
        )
        errors[name] = golden.error(grid.values(codes)[0])
    assert errors["codebook"] < 0.97 * errors["affine_float"]


@pytest.mark.parametrize(
    ("overrides", "bits", "message"),
    [
        ({}, 9, "at most 8 bits; got 9"),
        ({}, 2.5, "integer from 1 to 16.*got 2.5"),
        ({"parameter_bits": 8}, 4, "16 or 32; got 8"),
        ({"iterations": 0}, 4, "at least 1; got 0"),
        ({"min_shrink": 0.0}, 4, "got 80 and 0.0"),
        ({"metric": "gram"}, 4, "ill-typed value for grid.metric"),
        ({}, 4, "metric=weight"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_settings(choice, overrides: dict, bits: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("grid", "codebook", **overrides).fit(torch.randn(1, 2, 3), bits)
