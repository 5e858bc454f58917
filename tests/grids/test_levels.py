"""The fitted level-table grid: every verb of a grid, storage, refits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ptq.grids.levels import LevelGrid
from tests.conftest import random_problem

GRIDS = ["ptnq", "ptnq_channel", "power", "normal_float", "apot"]
SMALL = {"functions": ["affine", "sinh", "exp_skew"]}  # a pool of three keeps the tests quick


def random_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def overrides(name: str) -> dict:
    return SMALL if name.startswith("ptnq") else {}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("group_size", [None, 5, 1], ids=["row", "ragged", "one"])
def test_values_come_back_exactly_and_through_storage(
    choice, name: str, bits: int, group_size: int | None
) -> None:
    W = random_weights(2, 7, 13).float()
    spec = choice("grid", name, **overrides(name))
    grid = spec.fit(W, bits, group_size)
    codes = grid.round(W)
    values = grid.values(codes)
    assert grid.code_min <= int(codes.min()) <= int(codes.max()) <= grid.code_max < 2**bits
    assert_close(grid.values(grid.round(values)), values)
    tensors, facts = grid.storage(codes)
    again, codes_again = LevelGrid.from_storage(tensors, facts)
    assert torch.equal(codes_again, codes)
    assert torch.equal(again.values(codes_again), values)
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    expected = grid.storage_bits(codes)
    assert sum(expected.values()) <= stored < sum(expected.values()) + 8 * len(tensors)
    assert spec.size(W, bits, group_size) == expected


@pytest.mark.parametrize(
    ("function_scope", "t_scope", "parameters"),
    [
        ("layer", "layer", 2 + 4),
        ("layer", "group", 2 + 4 * 18),
        ("channel", "channel", (2 + 4) * 6),
        ("group", "group", (2 + 4) * 18),
    ],
)
def test_function_ids_and_t_are_counted(choice, function_scope: str, t_scope: str, parameters: int) -> None:
    W = random_weights(1, 6, 20).float()
    spec = choice("grid", "ptnq", function_scope=function_scope, t_scope=t_scope, **SMALL)
    grid = spec.fit(W, 3, 8)
    bits = grid.storage_bits(grid.round(W))
    # three units a row, scale and offset of 16 bits each; 2 bits name one of three functions, 4 one of 16 t
    assert bits == {"codes": 3 * 120, "parameters": 2 * 16 * 18 + parameters}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("group_size", [None, 5], ids=["row", "ragged"])
def test_one_column_is_rounded_like_the_whole(choice, name: str, group_size: int | None) -> None:
    W = random_weights(2, 7, 13)
    grid = choice("grid", name, **overrides(name)).fit(W, 3, group_size)
    codes = grid.round(W).long()
    values = grid.values(codes)
    for column in (0, 7, 12):
        code, value = grid.round_column(W[..., column], column)
        assert torch.equal(code.long(), codes[..., column])
        assert_close(value, values[..., column])
    own = (torch.arange(14) * 5 % 13).reshape(2, 7)
    code, value = grid.round_column(W.gather(-1, own[..., None])[..., 0], own)
    assert torch.equal(code.long(), codes.gather(-1, own[..., None])[..., 0])
    assert_close(value, values.gather(-1, own[..., None])[..., 0])


@pytest.mark.parametrize("name", ["ptnq_channel", "power", "normal_float"])
def test_rounding_is_to_the_nearest_value(choice, name: str) -> None:
    W = random_weights(1, 4, 11)
    grid = choice("grid", name, **overrides(name)).fit(W, 3)
    grid = replace(grid, scale=grid.scale * torch.tensor([1.0, -1.0, 0.5, 2.0]).reshape(1, 4, 1))
    every = torch.stack(
        [grid.values(torch.full_like(W, k, dtype=torch.int16)) for k in range(grid.code_max + 1)]
    )
    assert_close(grid.values(grid.round(W)), W + (every - W).gather(0, (every - W).abs().argmin(0)[None])[0])


@pytest.mark.parametrize("name", ["ptnq", "power", "apot"])
@pytest.mark.parametrize("group_size", [None, 4, 7], ids=["row", "four", "ragged"])
def test_refit_is_least_squares_and_never_raises_the_objective(
    choice, name: str, group_size: int | None
) -> None:
    problem = random_problem(5, 18, groups=2)
    grid = choice("grid", name, parameter_bits=32, **overrides(name)).fit(problem.W, 3, group_size)
    codes = grid.round(problem.W)
    before = problem.error(grid.values(codes))
    after = problem.error(grid.refit(codes, problem.W, problem.H).values(codes))
    assert bool((after <= before * (1 + 1e-9)).all())
    # an unrelated computation: ordinary least squares on the columns that scale and offset multiply
    L = torch.linalg.cholesky(problem.H)
    unit = torch.arange(18) // (group_size or 18)
    levels = grid.levels(codes)
    for g in range(2):
        for row in range(5):
            bases = [levels[g, row]] if grid.offset is None else [levels[g, row], torch.ones(18)]
            A = L[g].T @ torch.stack([b * (unit == u) for b in bases for u in range(int(unit[-1]) + 1)], 1)
            b = L[g].T @ problem.W[g, row]
            residual = b - A @ torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
            assert_close(after[g, row], residual.square().sum(), rtol=1e-5, atol=1e-9)


def test_refit_at_sixteen_bits_never_raises_the_objective(choice) -> None:
    problem = random_problem(9, 18)
    grid = choice("grid", "ptnq", **SMALL).fit(problem.W, 2, 6)
    codes = grid.round(problem.W)
    once = grid.refit(codes, problem.W, problem.H)
    before, after = (problem.error(g.values(codes)) for g in (grid, once))
    assert bool((after <= before).all())
    assert float(after.sum()) < float(before.sum())
    again = once.refit(codes, problem.W, problem.H)
    assert bool((problem.error(again.values(codes)) <= after).all())


def test_refit_with_equal_codes_and_dead_inputs_stays_finite(choice) -> None:
    problem = random_problem(3, 6)
    grid = choice("grid", "ptnq", **SMALL).fit(problem.W, 2)
    codes = torch.ones_like(problem.W, dtype=torch.int16)
    for gram in (torch.zeros_like(problem.H), problem.H):
        assert bool(torch.isfinite(grid.refit(codes, problem.W, gram).values(codes)).all())


@pytest.mark.parametrize("scopes", [("layer", "layer"), ("layer", "group"), ("channel", "channel")], ids=str)
def test_where_mixes_rows_with_all_they_have(choice, scopes: tuple[str, str]) -> None:
    W = random_weights(2, 5, 12)
    W[..., 3:] = W[..., 3:].exp()
    codes = torch.arange(12).remainder(8).expand(2, 5, -1)
    grids = [
        choice(
            "grid", "ptnq", functions=[f, g], function_scope=scopes[0], t_scope=scopes[1], parameter_bits=32
        ).fit(V, 3, 6)
        for f, g, V in (("sinh", "exp_skew", W), ("sinh", "exp_skew", random_weights(2, 5, 12, seed=3)))
    ]
    assert not torch.equal(grids[0].table_index(), grids[1].table_index())
    better = torch.tensor([[True, False, True, True, False], [False, True, False, True, True]])
    mixed = grids[0].where(better, grids[1])
    values = torch.where(better[..., None], grids[0].values(codes), grids[1].values(codes))
    assert_close(mixed.values(codes), values)
    again, codes_again = LevelGrid.from_storage(*mixed.storage(codes))
    assert_close(again.values(codes_again), values.float())


@pytest.mark.parametrize("function_scope", ["layer", "group"])
def test_one_unit_is_replaced_with_all_it_has(choice, function_scope: str) -> None:
    W = random_weights(1, 5, 12)
    spec = choice("grid", "ptnq", function_scope=function_scope, **SMALL)
    grid = spec.fit(W, 3, 5)
    other = spec.fit(W[..., 5:10].exp(), 3)
    codes = torch.arange(12).remainder(8).expand(1, 5, -1)
    values = grid.replace_unit(1, other).values(codes)
    assert_close(values[..., 5:10], other.values(codes[..., 5:10]))
    assert_close(values[..., :5], grid.values(codes)[..., :5])
    assert_close(values[..., 10:], grid.values(codes)[..., 10:])


def test_values_are_differentiable_in_scale_and_offset(choice) -> None:
    W = random_weights(1, 4, 9)
    grid = choice("grid", "ptnq", parameter_bits=32, **SMALL).fit(W, 3, 4)
    codes = grid.round(W)
    leaves = {k: p.clone().requires_grad_() for k, p in grid.parameters().items()}
    assert set(leaves) == {"scale", "offset"}
    grid.with_parameters(leaves).values(codes).sum().backward()
    levels = grid.levels(codes)
    assert_close(leaves["scale"].grad[..., 1], levels[..., 4:8].sum(-1))
    assert_close(leaves["offset"].grad[..., 2], torch.ones(1, 4, dtype=torch.float64))


def test_scaled_scales_every_value(choice) -> None:
    W = random_weights(1, 4, 9)
    grid = choice("grid", "ptnq", parameter_bits=32, **SMALL).fit(W, 3)
    codes = grid.round(W)
    assert_close(grid.scaled(0.5).values(codes), grid.values(codes) / 2)
