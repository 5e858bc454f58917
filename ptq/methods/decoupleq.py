"""decoupleQ, layer-wise stage: integers and (scale, offset) by alternation, neither derived from the other.

Paper: Guo et al., "decoupleQ", arXiv 2404.12759, Algorithms 1 and 2; released code bytedance/decoupleQ
(252939b). Letters as there: N alternations, M steps before rounding, K inside it.
Each alternation finds integers from the float weights for the grid as it is, then the closed-form
parameters for the integers; a row keeps what it has where a candidate has no less error, so the error never
rises.
Configurations: `decoupleq_release` is the released code (min-max start with one error-feedback pass, range
search only then, level-2), `decoupleq_release_level1` its setting for ResNets, `decoupleq_paper` Algorithm 1
(search first). `decoupleq` is ours: the search, and a few refits, under the weights 1 / U_jj² that error
feedback gives the columns; they foretell its error far better than nearest rounding under H does, and need no
matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec, RatedGridSpec
from ptq.problem import LayerProblem, shrunk
from ptq.solvers.coordinate_descent import Order, coordinate_descent
from ptq.solvers.error_feedback import Feedback, error_feedback, prepare
from ptq.solvers.nearest import nearest
from ptq.solvers.projected_gradient import projected_gradient
from ptq.solvers.solution import Solution


class Start(Enum):
    """What comes before the first alternation."""

    search = "search"  # the range search (the paper)
    release = "release"  # error feedback on the fitted grid, which counts as the first of N; then the search


class Metric(Enum):
    """What the range search minimises over nearest rounding."""

    gram = "gram"  # Eq. 12: r H rᵀ, one matrix product for each factor
    feedback = "feedback"  # ours: Σ r_j² / U_jj², what error feedback pays for an error of r_j in column j


class Integers(Enum):
    """How integers are found for given parameters."""

    level1 = "level1"  # Eq. 10: sequential rounding, the rest re-optimised inside the box
    level2 = "level2"  # Eq. 11: sequential rounding, the rest re-optimised freely (error feedback)
    coordinate_descent = "coordinate_descent"  # ours: one sweep from the best integers so far


@dataclass(kw_only=True, slots=True)
class DecoupleQ:
    """Alternation of an integer step and closed-form parameters."""

    rounds: int  # N
    start: Start
    integers: list[Integers]  # in each alternation, one after the other; the best kept per row
    search: Metric
    search_refits: int  # after it: nearest rounding and closed-form parameters in the metric `feedback`
    search_steps: int  # factors on the fitted range in the search: 1 − k · (1 − min_shrink) / search_steps
    min_shrink: float
    factors: list[float]  # on the grid: sequential rounding is done for each, and the best kept per row
    shrinkage: float  # added to diag(H), as a fraction of itself; see ptq.problem.shrunk
    gram_damping: float  # added to diag(H) for the whole run, as a fraction of its mean
    damping: float  # added once more inside the error feedback
    act_order: bool  # round inputs by decreasing H_ii
    steps_before: int  # M, of level-1
    steps_inside: int  # K, of level-1
    learning_rate: float  # of level-1
    tolerance: float  # stop when a step improves less than this fraction of the rows

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.search_steps < 1:
            raise InputError(
                f"rounds and search_steps must be at least 1; got {self.rounds} and {self.search_steps}"
            )
        if not 0 < self.min_shrink <= 1:
            raise InputError(f"min_shrink must be in (0, 1]; got {self.min_shrink}")
        if not self.factors or min(self.factors) <= 0:
            raise InputError(f"factors needs one positive factor or more; got {self.factors}")
        if not self.integers:
            raise InputError("integers needs one step or more: level1, level2, coordinate_descent; got none")
        for name, value in (
            ("search_refits", self.search_refits),
            ("shrinkage", self.shrinkage),
            ("gram_damping", self.gram_damping),
            ("damping", self.damping),
            ("steps_before", self.steps_before),
            ("steps_inside", self.steps_inside),
            ("learning_rate", self.learning_rate),
            ("tolerance", self.tolerance),
        ):
            if value < 0:
                raise InputError(f"{name} must not be negative; got {value}")

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        if isinstance(grid, RatedGridSpec):  # another range would be another rate there
            fixed = replace(self, search_steps=1, search_refits=0, factors=[1.0])
            return fixed._quantize_layer(problem, grid, bits, group_size)
        return self._quantize_layer(problem, grid, bits, group_size)

    def _quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        fitted = grid.fit(problem.T, bits, group_size, problem.H)
        if self.shrinkage > 0:
            problem = shrunk(problem, self.shrinkage)
        problem = damped(problem, self.gram_damping)
        feedback = prepare(problem, damping=self.damping, act_order=self.act_order)
        rounds = self.rounds
        if self.start is Start.release:
            rounds -= 1
            best = Solution(problem, fitted, nearest(problem, fitted))
            best = best.or_better(Solution(problem, fitted, error_feedback(problem, fitted, feedback)[0]))
            origin = self._search(problem, fitted, feedback).refitted() if rounds else best
        else:
            best = origin = self._search(problem, fitted, feedback)
        for _ in range(rounds):
            before = best
            best = best.or_better(self._integers(origin, feedback))
            if improved(before, best) < self.tolerance:
                break
            before = best
            best = origin = best.refitted()
            if improved(before, best) < self.tolerance:
                break
        return best.codes, best.grid

    def _search(self, problem: LayerProblem, fitted: Grid, feedback: Feedback) -> Solution:
        """Nearest rounding with the range factor that gives each row the least error."""
        T, H, weight = problem.T, problem.H.to(problem.T.dtype), feedback.weight()
        best, best_error = fitted, None
        for k in range(self.search_steps):
            scaled = fitted.scaled(1 - k * (1 - self.min_shrink) / self.search_steps)
            R = T - scaled.values(scaled.round(T))
            if self.search is Metric.gram:
                error = ((R @ H) * R).sum(-1)  # [groups, out]
            else:
                error = (R.square() @ weight[..., None])[..., 0]
            if fitted.shared:
                error = error.sum()
            if best_error is None or (fitted.shared and error < best_error):
                best, best_error = scaled, error
            elif not fitted.shared:
                best = scaled.where(error < best_error, best)
                best_error = torch.minimum(error, best_error)
        for _ in range(self.search_refits):
            best = best.refit(best.round(T), T, torch.diag_embed(weight.double()))
        return Solution(problem, best, nearest(problem, best))

    def _integers(self, origin: Solution, feedback: Feedback) -> Solution:
        """New integers for the parameters of `origin`, times each of the factors."""
        found = None
        for step in self.integers:
            if step is Integers.coordinate_descent:
                best = origin if found is None else origin.or_better(found)
                codes = coordinate_descent(
                    best.problem, best.grid, sweeps=1, order=Order.shared, codes=best.codes
                )
                found = Solution(best.problem, best.grid, codes)
                continue
            for factor in self.factors:
                new = self._rounded(step, origin.problem, origin.grid, factor, feedback)
                found = new if found is None else found.or_better(new)
        assert found is not None
        return found

    def _rounded(
        self, step: Integers, problem: LayerProblem, grid: Grid, factor: float, feedback: Feedback
    ) -> Solution:
        """Sequential rounding from the float weights."""
        grid = grid if factor == 1 else grid.scaled(factor)
        if step is Integers.level2:
            return Solution(problem, grid, error_feedback(problem, grid, feedback)[0])
        codes = projected_gradient(
            problem,
            grid,
            feedback.visit,
            steps_before=self.steps_before,
            steps_inside=self.steps_inside,
            learning_rate=self.learning_rate,
        )
        return Solution(problem, grid, codes)


def damped(problem: LayerProblem, fraction: float) -> LayerProblem:
    """The same target with `fraction` of its mean added to the diagonal of H."""
    H = problem.H.clone()
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal += fraction * diagonal.mean(-1, keepdim=True)
    return LayerProblem(problem.name, problem.T, H)


def improved(before: Solution, after: Solution) -> float:
    """Fraction of the rows with less error than before."""
    return float((after.error < before.error).double().mean())
