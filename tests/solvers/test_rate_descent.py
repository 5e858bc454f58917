"""Descent on error plus code length."""

from __future__ import annotations

import pytest
import torch

from ptq.solvers.coordinate_descent import coordinate_descent
from ptq.solvers.rate_descent import REACH, code_lengths, rate_descent
from tests.conftest import random_problem


def total_length(codes: torch.Tensor, table: torch.Tensor, first: torch.Tensor) -> float:
    at = first + codes.mT.clamp(-REACH, REACH).long()
    return float(table[at].sum())


@pytest.mark.parametrize("name", ["entropy", "entropy_columns"])
def test_one_sweep_lowers_error_plus_rate(choice, name: str) -> None:
    problem = random_problem(40, 30, groups=2)
    grid = choice("grid", name).fit(problem.W, 2, None, problem.H)
    codes = grid.round(problem.W)
    table, first = code_lengths(codes.mT.to(torch.float64))
    weight = 0.05 * float(problem.error(grid.values(codes)).sum()) / codes.numel()

    def objective(z: torch.Tensor) -> float:
        return float(problem.error(grid.values(z)).sum()) + weight * total_length(z, table, first)

    found = rate_descent(problem, grid, codes, weight=weight, sweeps=1)
    assert objective(found) < objective(codes)
    assert found.dtype == codes.dtype
    smaller = rate_descent(problem, grid, codes, weight=weight, sweeps=1, block_size=7)
    assert torch.equal(found, smaller)


def test_bits_that_are_worth_nothing_leave_plain_coordinate_descent(choice) -> None:
    problem = random_problem(20, 30)
    grid = choice("grid", "entropy").fit(problem.W, 2, None, problem.H)
    codes = grid.round(problem.W)
    found = rate_descent(problem, grid, codes, weight=0.0, sweeps=2)
    assert torch.equal(found, coordinate_descent(problem, grid, sweeps=2, codes=codes))


def test_bits_worth_more_make_shorter_codes_with_more_error(choice) -> None:
    problem = random_problem(60, 30)
    grid = choice("grid", "entropy").fit(problem.W, 3, None, problem.H)
    codes = grid.round(problem.W)
    scale = float(problem.error(grid.values(codes)).sum()) / codes.numel()
    sizes, errors = [], []
    for weight in (0.0, 0.3 * scale, 3 * scale, 1e9 * scale):
        found = rate_descent(problem, grid, codes, weight=weight, sweeps=2)
        sizes.append(sum(grid.storage_bits(found).values()))
        errors.append(float(problem.error(grid.values(found)).sum()))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_lengths_are_those_of_the_counted_shares() -> None:
    """One class, code 0 three times as frequent as the others together."""
    codes = torch.zeros(1, 40, 100)
    codes[:, ::2, ::2] = 1
    table, first = code_lengths(codes)
    zero, one = float(table[first[0, 1, 1]]), float(table[first[0, 0, 0] + 1])
    assert zero < one
    assert float(torch.exp2(-table.reshape(64, -1)).sum(-1).sub(1).abs().max()) < 1e-5
