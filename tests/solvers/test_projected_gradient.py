"""Level-1 rounding against torch's own Adam and against what its definition implies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ptq.problem import LayerProblem
from ptq.solvers.error_feedback import prepare
from ptq.solvers.nearest import nearest
from ptq.solvers.projected_gradient import EPSILON_BEFORE, EPSILON_INSIDE, projected_gradient
from tests.conftest import random_problem

STEPS = {"steps_before": 6, "steps_inside": 4, "learning_rate": 0.02}


def textbook(problem: LayerProblem, grid, order: list[int], before: int, inside: int, rate: float) -> Tensor:
    """Algorithm 2 with autograd and torch.optim.Adam on the whole matrix; rounded columns are put back after
    each step.
    """
    ends = [
        grid.values(torch.full_like(problem.W, c, dtype=torch.int16)) for c in (grid.code_min, grid.code_max)
    ]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    V = problem.W.clone().requires_grad_()
    adam = torch.optim.Adam([V], lr=rate, eps=EPSILON_BEFORE)
    values, codes = problem.W.clone(), torch.zeros_like(problem.W)
    fixed: list[int] = []

    def steps(count: int) -> None:
        for _ in range(count):
            adam.zero_grad()
            R = V - problem.W
            (0.5 * ((R @ problem.H) * R).sum()).backward()
            adam.step()
            with torch.no_grad():
                V.clamp_(low, high)
                V[..., fixed] = values[..., fixed]

    steps(before)
    adam.param_groups[0]["eps"] = EPSILON_INSIDE
    for column in order:
        with torch.no_grad():
            codes[..., column], values[..., column] = grid.round_column(V[..., column], column)
            V[..., column] = values[..., column]
        fixed.append(column)
        steps(inside)
    return codes.to(torch.int16)


@pytest.mark.parametrize("group_size", [None, 4], ids=["row", "ragged"])
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])
@pytest.mark.parametrize("grid_name", ["affine_float", "symmetric"])
def test_it_equals_algorithm_2_with_the_textbook_adam(
    choice, grid_name: str, act_order: bool, group_size: int | None
) -> None:
    problem = random_problem(5, 11)
    grid = choice("grid", grid_name).fit(problem.W, 2, group_size).scaled(0.7)
    visit = prepare(problem, damping=0.01, act_order=act_order).visit
    codes = projected_gradient(problem, grid, visit, **STEPS)
    assert torch.equal(codes, textbook(problem, grid, visit[0].tolist(), 6, 4, 0.02))
    assert not torch.equal(codes, nearest(problem, grid))


def test_without_steps_it_is_nearest_rounding(choice) -> None:
    problem = random_problem(6, 9, groups=2)
    grid = choice("grid", "affine_float").fit(problem.W, 3)
    visit = prepare(problem, damping=0.01, act_order=True).visit
    codes = projected_gradient(problem, grid, visit, steps_before=0, steps_inside=0, learning_rate=0.1)
    assert torch.equal(codes, nearest(problem, grid))


def test_it_lowers_the_error_of_nearest_rounding(choice) -> None:
    problem = random_problem(8, 32)
    grid = choice("grid", "affine_float").fit(problem.W, 3)
    visit = prepare(problem, damping=0.01, act_order=True).visit
    codes = projected_gradient(problem, grid, visit, steps_before=20, steps_inside=40, learning_rate=0.01)
    error, plain = (problem.error(grid.values(c)).sum() for c in (codes, nearest(problem, grid)))
    assert error < 0.7 * plain


def test_groups_are_solved_apart_each_in_its_own_order(choice) -> None:
    problem = random_problem(4, 10, groups=3)
    spec = choice("grid", "affine_float")
    visit = prepare(problem, damping=0.01, act_order=True).visit
    assert not bool((visit == visit[0]).all())
    codes = projected_gradient(problem, spec.fit(problem.W, 2), visit, **STEPS)
    for g in range(3):
        one = LayerProblem("one", problem.W[g], problem.H[g])
        alone = projected_gradient(one, spec.fit(one.W, 2), visit[g : g + 1], **STEPS)
        assert torch.equal(codes[g], alone[0])


def test_a_negative_scale_has_the_same_box(choice) -> None:
    problem = random_problem(5, 12)
    grid = choice("grid", "affine_float", parameter_bits=32).fit(problem.W, 2).scaled(0.7)
    top = grid.scale * (grid.code_max + grid.code_min)
    flipped = replace(grid, scale=-grid.scale, offset=grid.offset + top)  # the same levels, counted downwards
    visit = prepare(problem, damping=0.01, act_order=True).visit
    values = [g.values(projected_gradient(problem, g, visit, **STEPS)) for g in (grid, flipped)]
    assert_close(values[0], values[1])
