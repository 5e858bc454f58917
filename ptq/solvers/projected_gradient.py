"""Rounding with a box: round one input column at a time and re-optimise the columns not yet rounded inside
the range of the grid by projected gradient steps (decoupleQ's level-1 approximation).

Source: decoupleQ (arXiv 2404.12759), Algorithm 2 with Eq. 10; steps as in the released code: Adam whose
moments live through the whole run, projected after each step, on dequantized values.
Differs: the gradient that the rounded columns cause is kept up to date by rank-one updates, so that a step
multiplies the remaining columns only.
Shapes: T [groups, out, in]; H [groups, in, in]. Work is on transposes, where a column is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.grids.grid import Grid, code_dtype
from ptq.problem import LayerProblem

BETA_1, BETA_2 = 0.9, 0.999
EPSILON_BEFORE, EPSILON_INSIDE = 1e-5, 1e-4  # as released, absolute


class BoxedAdam:
    """Adam with projection: V, its moments and its bounds are [groups, columns, out] and shrink together."""

    def __init__(self, V: Tensor, low: Tensor, high: Tensor, learning_rate: float) -> None:
        self.V, self.low, self.high = V, low, high
        self.learning_rate = learning_rate
        self.first, self.second = torch.zeros_like(V), torch.zeros_like(V)
        self.steps = 0

    def step(self, gradient: Tensor, epsilon: float) -> None:
        """One step against `gradient`, then back into the box."""
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETA_1)
        self.second.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        unbias_1, unbias_2 = 1 - BETA_1**self.steps, (1 - BETA_2**self.steps) ** 0.5
        # the gradient has served: its memory takes the denominator
        denominator = torch.sqrt(self.second, out=gradient).div_(unbias_2).add_(epsilon)
        self.V.addcdiv_(self.first, denominator, value=-self.learning_rate / unbias_1)
        self.V.clamp_(self.low, self.high)

    def drop_first_column(self) -> None:
        """Go on with the remaining columns; the moments are kept."""
        self.V, self.low, self.high = self.V[:, 1:], self.low[:, 1:], self.high[:, 1:]
        self.first, self.second = self.first[:, 1:], self.second[:, 1:]


def projected_gradient(
    problem: LayerProblem,
    grid: Grid,
    visit: Tensor,
    *,
    steps_before: int,
    steps_inside: int,
    learning_rate: float,
) -> Tensor:
    """Codes [groups, out, in] after rounding the columns in the order visit [groups, in].

    `steps_before` relaxed steps on all columns come first, `steps_inside` on the remaining columns follow
    each rounded one. The step length is absolute: `learning_rate` in the units of the weights.
    """
    T = problem.T
    out, in_features = T.shape[1:]
    H = problem.H.to(T.dtype)
    H = H.gather(1, visit[:, :, None].expand_as(H)).gather(2, visit[:, None, :].expand_as(H))
    ends = [
        grid.values(torch.full(T.shape, code, dtype=code_dtype(grid), device=T.device)).expand_as(T)
        for code in (grid.code_min, grid.code_max)
    ]  # a negative scale swaps them

    def visited(x: Tensor) -> Tensor:
        return x.gather(-1, visit[:, None, :].expand_as(x)).mT.contiguous()  # [groups, in, out]

    W = visited(T)
    low, high = visited(torch.minimum(*ends)), visited(torch.maximum(*ends))
    adam = BoxedAdam(W.clone(), low, high, learning_rate)
    for _ in range(steps_before):
        adam.step(H @ (adam.V - W), EPSILON_BEFORE)
    codes = torch.empty_like(W)
    rounded = torch.zeros_like(W)  # gradient due to the columns already rounded
    shared_visit = visit[0].tolist() if bool((visit == visit[0]).all()) else None
    for j in range(in_features):
        column = shared_visit[j] if shared_visit else visit[:, j : j + 1].expand(-1, out)
        codes[:, j], value = grid.round_column(adam.V[:, 0], column)
        adam.drop_first_column()
        rest = slice(j + 1, in_features)
        rounded[:, rest].addcmul_(H[:, rest, j, None], (value - W[:, j])[:, None])
        for _ in range(steps_inside if j + 1 < in_features else 0):
            adam.step(torch.baddbmm(rounded[:, rest], H[:, rest, rest], adam.V - W[:, rest]), EPSILON_INSIDE)
    result = torch.empty_like(T)
    result.scatter_(-1, visit[:, None, :].expand_as(T), codes.mT)
    return result.to(code_dtype(grid))
