"""Nearest rounding, coordinate descent and error feedback against theory and plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.problem import LayerProblem
from ptq.solvers.coordinate_descent import Order, coordinate_descent
from ptq.solvers.error_feedback import error_feedback, output_weight, prepare
from ptq.solvers.nearest import nearest
from tests.conftest import random_problem


def plain_coordinate_descent(problem: LayerProblem, grid, visits: Tensor, sweeps: int) -> Tensor:
    """The textbook loop: one row and one coordinate at a time, the residual recomputed from scratch each
    time.
    """
    W_hat, codes = problem.T.clone(), torch.zeros_like(problem.T)
    groups, out, inputs = problem.T.shape
    for g in range(groups):
        H = problem.H[g].to(problem.T.dtype)
        for _ in range(sweeps):
            for t in range(inputs):
                for row in range(out):
                    i = int(visits[g, row, t])
                    wish = W_hat[g, row, i]
                    if H[i, i] > 0:
                        wish = wish + H[i] @ (problem.T[g, row] - W_hat[g, row]) / H[i, i]
                    column = W_hat[g, :, i].clone()
                    column[row] = wish
                    full = W_hat[g].new_zeros(groups, out)
                    full[g] = column
                    code, value = grid.round_column(full, i)
                    W_hat[g, row, i], codes[g, row, i] = value[g, row], code[g, row]
    return codes.to(torch.int16)


@pytest.mark.parametrize("order", list(Order), ids=lambda o: o.value)
@pytest.mark.parametrize(
    ("groups", "out", "inputs"), [(1, 5, 13), (3, 2, 7), (4, 1, 9)], ids=["plain", "grouped", "depthwise"]
)
def test_coordinate_descent_equals_the_plain_loop(
    choice, order: Order, groups: int, out: int, inputs: int
) -> None:
    problem = random_problem(out, inputs, groups=groups)
    grid = choice("grid", "affine", parameter_bits=32).fit(problem.W, 3, 4)
    diagonal = problem.H.diagonal(dim1=-2, dim2=-1)
    visits = {
        Order.natural: torch.arange(inputs).expand(groups, out, -1),
        Order.greedy: (diagonal.sqrt()[:, None] * problem.W.abs()).argsort(
            dim=-1, descending=True, stable=True
        ),
        Order.shared: diagonal.sum(0).argsort(dim=-1, descending=True, stable=True).expand(groups, out, -1),
    }[order]
    expected = plain_coordinate_descent(problem, grid, visits, 2)
    for block_size in (1, 4, 64):
        assert torch.equal(
            coordinate_descent(problem, grid, sweeps=2, order=order, block_size=block_size), expected
        )


@pytest.mark.parametrize("order", list(Order), ids=lambda o: o.value)
def test_sweeps_from_codes_never_raise_the_objective(choice, order: Order) -> None:
    problem = random_problem(11, 40)
    grid = choice("grid", "affine_float").fit(problem.W, 2)
    codes = nearest(problem, grid)
    error = problem.error(grid.values(codes))
    for _ in range(4):
        codes = coordinate_descent(problem, grid, sweeps=1, order=order, codes=codes)
        now = problem.error(grid.values(codes))
        assert bool((now <= error * (1 + 1e-9)).all())
        error = now


def test_with_uncorrelated_inputs_every_solver_is_nearest_rounding(choice) -> None:
    W = random_problem(6, 21).W
    problem = LayerProblem("white", W, torch.eye(21, dtype=torch.float64)[None])
    grid = choice("grid", "affine").fit(W, 3)
    expected = nearest(problem, grid)
    assert torch.equal(coordinate_descent(problem, grid, sweeps=1), expected)
    for act_order in (False, True):
        codes, _ = error_feedback(problem, grid, prepare(problem, damping=0.01, act_order=act_order))
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])
def test_block_size_does_not_change_error_feedback(choice, groups: int, act_order: bool) -> None:
    problem = random_problem(5, 33, groups=groups)
    grid = choice("grid", "affine").fit(problem.W, 3, 8)
    feedback = prepare(problem, damping=0.01, act_order=act_order)
    whole, _ = error_feedback(problem, grid, feedback, block_size=33)
    for block_size in (1, 7, 16):
        codes, _ = error_feedback(problem, grid, feedback, block_size=block_size)
        assert torch.equal(codes, whole)


def test_error_feedback_by_its_definition(choice) -> None:
    """Rounding column j, then the best float values for all later columns given the earlier ones (OBQ's
    meaning).
    """
    problem = random_problem(3, 6)
    grid = choice("grid", "affine_float").fit(problem.W, 2)
    codes, _ = error_feedback(problem, grid, prepare(problem, damping=0.0, act_order=False))
    H, W = problem.H[0], problem.W[0].clone()
    for j in range(6):
        _, value = grid.round_column(W[None, :, j], j)
        error = problem.W[0][:, : j + 1] - torch.cat([W[:, :j], value[0][:, None]], 1)
        W[:, j] = value[0]
        if j < 5:  # minimise over the rest: R_rest = −R_done H_dr H_rr⁻¹
            rest = -torch.linalg.solve(H[j + 1 :, j + 1 :], H[j + 1 :, : j + 1] @ error.T).T
            W[:, j + 1 :] = problem.W[0][:, j + 1 :] - rest
    assert_close(grid.values(codes)[0], W)


@pytest.mark.parametrize("groups", [1, 3])
def test_conditional_order_starts_with_what_the_others_explain_least(groups: int) -> None:
    problem = random_problem(2, 9, groups=groups)
    problem.H[:, 4], problem.H[:, :, 4] = 0, 0  # a dead input comes last
    feedback = prepare(problem, damping=0.01, act_order=True, conditional=True)
    alive = [i for i in range(9) if i != 4]
    for g in range(groups):
        H = problem.H[g] + 0.01 * problem.H[g].diagonal().mean() * torch.eye(9)
        inverse = torch.linalg.inv(H[alive][:, alive])
        expected = [alive[i] for i in inverse.diagonal().argsort().tolist()]
        assert feedback.visit[g].tolist() == [*expected, 4]
        factor = feedback.U[g, :8, :8]
        order = [alive.index(i) for i in expected]
        assert_close(factor.mT @ factor, inverse[order][:, order])


def test_dead_inputs_are_rounded_and_leave_the_rest_alone(choice) -> None:
    problem = random_problem(4, 10)
    H = problem.H.clone()
    H[:, 3], H[:, :, 3] = 0, 0
    dead = LayerProblem("dead", problem.W, H)
    grid = choice("grid", "affine").fit(problem.W, 3)
    expected = nearest(dead, grid)[..., 3]
    assert torch.equal(coordinate_descent(dead, grid, sweeps=2)[..., 3], expected)
    codes, _ = error_feedback(dead, grid, prepare(dead, damping=0.01, act_order=True))
    assert torch.equal(codes[..., 3], expected)
    keep = [i for i in range(10) if i != 3]
    small = LayerProblem("small", problem.W[..., keep], H[:, keep][:, :, keep])
    reduced = choice("grid", "affine").fit(problem.W, 3)
    reduced.in_features = 9
    assert torch.equal(
        coordinate_descent(small, reduced, sweeps=2), coordinate_descent(dead, grid, sweeps=2)[..., keep]
    )


def test_a_gram_that_is_not_positive_definite_is_said(choice) -> None:
    problem = LayerProblem("flat", torch.ones(2, 4).double(), torch.ones(4, 4).double())
    with pytest.raises(InputError, match=r"flat.*damping=0"):
        prepare(problem, damping=0.0, act_order=False)
    prepare(problem, damping=0.01, act_order=False)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_weight_of_inputs_by_one_factorisation(act_order: bool) -> None:
    """Two groups, a dead input; and the way out where H is not positive definite."""
    problem = random_problem(5, 12, groups=2)
    problem.H[0, 3], problem.H[0, :, 3] = 0, 0
    wanted = prepare(problem, damping=0.01, act_order=act_order).weight()
    assert_close(output_weight(problem, damping=0.01, act_order=act_order), wanted, rtol=1e-9, atol=0)
    problem.H[1] -= 0.02 * problem.H[1].diagonal().mean() * torch.eye(12, dtype=torch.float64)
    wanted = prepare(problem, damping=1e-5, act_order=act_order).weight()
    assert_close(output_weight(problem, damping=1e-5, act_order=act_order), wanted, rtol=1e-9, atol=0)
