"""Beam search against error feedback and against trying every rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

from ptq.problem import LayerProblem
from ptq.solvers.beam_search import beam_search
from ptq.solvers.error_feedback import error_feedback, prepare
from ptq.solvers.nearest import nearest
from tests.conftest import random_problem


@pytest.mark.parametrize("groups", [1, 3], ids=["plain", "grouped"])
@pytest.mark.parametrize("grid_name", ["affine", "affine_float", "codebook", "symmetric"])
def test_one_candidate_is_error_feedback(choice, grid_name: str, groups: int) -> None:
    problem = random_problem(7, 37, groups=groups)
    grid = choice("grid", grid_name).fit(problem.W, 2, 16, problem.H)
    feedback = prepare(problem, damping=0.01, act_order=True)
    expected, _ = error_feedback(problem, grid, feedback)
    for block_size in (1, 8, 64):
        codes = beam_search(problem, grid, feedback, candidates=1, block_size=block_size)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("groups", [1, 2], ids=["plain", "grouped"])
def test_block_size_does_not_change_the_result(choice, groups: int) -> None:
    problem = random_problem(5, 33, groups=groups)
    grid = choice("grid", "affine_float").fit(problem.W, 2)
    feedback = prepare(problem, damping=0.01, act_order=True)
    whole = beam_search(problem, grid, feedback, candidates=5, block_size=33)
    for block_size in (1, 7, 16):
        codes = beam_search(problem, grid, feedback, candidates=5, block_size=block_size)
        assert torch.equal(codes, whole)


def test_a_wide_beam_finds_the_best_of_all_roundings(choice) -> None:
    """At one bit two values are all there are, so a beam of 2^in leaves none out."""
    problem = random_problem(4, 6)
    grid = choice("grid", "affine_float").fit(problem.W, 1)
    feedback = prepare(problem, damping=0.0, act_order=True)
    best = problem.error(grid.values(beam_search(problem, grid, feedback, candidates=64)))
    every = torch.tensor(list(itertools.product((0, 1), repeat=6)), dtype=torch.int16)
    errors = [problem.error(grid.values(codes.expand(1, 4, 6))) for codes in every]
    torch.testing.assert_close(best, torch.stack(errors).amin(0))


def test_more_candidates_lower_the_error(choice) -> None:
    problem = random_problem(40, 96, dtype=torch.float32)
    grid = choice("grid", "affine_float", range="mse").fit(problem.W, 2)
    feedback = prepare(problem, damping=0.0, act_order=True)
    errors = [
        problem.relative_error(grid.values(beam_search(problem, grid, feedback, candidates=k)))
        for k in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.98 * errors[0]


def test_uncorrelated_inputs_leave_nothing_to_search(choice) -> None:
    W = random_problem(6, 21).W
    problem = LayerProblem("white", W, torch.eye(21, dtype=torch.float64)[None])
    for name in ("affine", "codebook"):
        grid = choice("grid", name).fit(W, 3, None, problem.H)
        feedback = prepare(problem, damping=0.01, act_order=True)
        assert torch.equal(beam_search(problem, grid, feedback, candidates=4), nearest(problem, grid))


def test_constant_rows_and_dead_inputs(choice) -> None:
    problem = random_problem(3, 10)
    H, W = problem.H.clone(), problem.W.clone()
    H[:, 4], H[:, :, 4] = 0, 0
    W[:, 1] = 0.25
    problem = LayerProblem("odd", W, H)
    grid = choice("grid", "affine_float").fit(W, 2)
    for conditional in (False, True):
        feedback = prepare(problem, damping=0.01, act_order=True, conditional=conditional)
        W_hat = grid.values(beam_search(problem, grid, feedback, candidates=4))
        torch.testing.assert_close(W_hat[:, 1], W[:, 1], rtol=1e-3, atol=0)
        assert torch.equal(W_hat[..., 4], grid.values(nearest(problem, grid))[..., 4])
