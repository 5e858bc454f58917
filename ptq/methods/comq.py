"""COMQ: back-propagation-free coordinate descent on the layer's output error, ‖X (W − Ŵ)ᵀ‖².

Paper: Zhang et al., "COMQ", arXiv 2403.07134, Algorithms 1 and 2; released code AozhongZhang/COMQ (fecf9ea).
Written on H = X Xᵀ, which is exactly equivalent to the paper's form on X and independent of the token count.
Configurations: `comq_release` is the released code (λ scales the finished grid, scales never updated, first
sweep from the float weights, inputs of the float model); `comq_paper` is Algorithm 2 (scales updated after
each sweep; the paper's K and λ are not known to us). Ours: correlations shrunk; λ per row and a few refits by
nearest rounding in the metric of error feedback, which foretells its error without a matrix product; error
feedback as the start; sweeps until the objective stalls. `comq` does so on the affine grid and
`comq_codebook` on free levels; `comq_fast` leaves the sweeps out, `comq_thorough` adds beam search to each.
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
from ptq.solvers.beam_search import beam_search
from ptq.solvers.coordinate_descent import Order, coordinate_descent
from ptq.solvers.error_feedback import Feedback, error_feedback, prepare
from ptq.solvers.solution import Solution


class Start(Enum):
    """Where the first codes come from."""

    weights = "weights"  # a first sweep that starts at the float weights (the paper)
    error_feedback = "error_feedback"  # OPTQ, inputs by decreasing power given the others


@dataclass(kw_only=True, slots=True)
class COMQ:
    """Coordinate descent with optional closed-form scale updates; K and λ are the paper's letters."""

    sweeps: int  # K, passes over all codes; an upper bound when tolerance > 0
    order: Order  # of the columns: greedy is the paper's static per-row importance order
    shrink: list[float]  # λ: factors on the fitted grid, the best kept per row
    search_refits: int  # closed forms for the nearest values after that; for start=error_feedback
    factors: list[float]  # on the grid found so: error feedback is done for each, and the best kept per row
    update_scale: bool  # closed-form scales (and float offsets) after each sweep
    start: Start
    shrinkage: float  # added to diag(H), as a fraction of itself: correlations of few samples are overrated
    damping: float  # of H in the error feedback, as a fraction of its mean diagonal; unused by start=weights
    candidates: int  # roundings kept per row by the error feedback before each sweep; 0 = no such step
    tolerance: float  # stop when a sweep lowers the layer's error by less than this fraction; 0 = never early
    block_size: int  # columns between two matrix products; changes speed, not results

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("sweeps", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("shrink", "factors"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise InputError(f"{name} needs one positive factor or more; got {getattr(self, name)}")
        for name in ("search_refits", "candidates", "shrinkage", "damping", "tolerance"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative; got {getattr(self, name)}")

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        if isinstance(grid, RatedGridSpec):  # another range would be another rate there
            fixed = replace(self, shrink=[1.0], search_refits=0, factors=[1.0])
            return fixed._quantize_layer(problem, grid, bits, group_size)
        return self._quantize_layer(problem, grid, bits, group_size)

    def _quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        if self.shrinkage > 0:
            problem = shrunk(problem, self.shrinkage)
        feedback = None
        if self.start is Start.error_feedback:
            feedback = prepare(problem, damping=self.damping, act_order=True, conditional=True)
            fitted = self._foretold(problem, grid, bits, group_size, feedback.weight())
            grids = [fitted.scaled(factor) for factor in self.factors]
        else:
            fitted = grid.fit(problem.T, bits, group_size, problem.H)
            grids = [fitted.scaled(factor) for factor in self.shrink]
        best = self._first_codes(problem, grids[0], feedback)
        for candidate in grids[1:]:
            best = best.or_better(self._first_codes(problem, candidate, feedback))
        if self.update_scale:
            best = best.refitted()
        for _ in range(self.sweeps - 1):
            before = best.total()
            if feedback is not None and self.candidates > 0:
                best = best.or_better(self._fed_back(problem, best.grid, feedback))
            codes = coordinate_descent(
                problem, best.grid, sweeps=1, order=self.order, codes=best.codes, block_size=self.block_size
            )
            best = Solution(problem, best.grid, codes)
            if self.update_scale:
                best = best.refitted()
            if self.tolerance > 0 and best.total() >= (1 - self.tolerance) * before:
                break
        return best.codes, best.grid

    def _foretold(
        self, problem: LayerProblem, spec: GridSpec, bits: float, group_size: int | None, weight: Tensor
    ) -> Grid:
        """The grid whose nearest values are best when a squared distance in column j counts `weight`
        [groups, in]: what error feedback pays for it, but for the compensation of earlier columns. An input
        that is always zero counts nothing.
        """
        alive = problem.H.diagonal(dim1=-2, dim2=-1) > 0
        T, metric = problem.T, torch.diag_embed(weight.double() * alive)
        fitted = spec.fit(T, bits, group_size, metric)
        best = best_error = None
        for factor in self.shrink:
            grid = fitted.scaled(factor)
            error = ((T - grid.values(grid.round(T))).square() @ weight[..., None])[..., 0]  # [groups, out]
            if grid.shared:
                error = error.sum().expand_as(error)
            if best is None or best_error is None:
                best, best_error = grid, error
            elif not grid.shared or bool((error < best_error).any()):
                best = grid if grid.shared else grid.where(error < best_error, best)
                best_error = torch.minimum(error, best_error)
        assert best is not None
        for _ in range(self.search_refits):
            best = best.refit(best.round(T), T, metric)
        return best

    def _fed_back(self, problem: LayerProblem, grid: Grid, feedback: Feedback) -> Solution:
        if self.candidates > 1:
            return Solution(problem, grid, beam_search(problem, grid, feedback, candidates=self.candidates))
        return Solution(problem, grid, error_feedback(problem, grid, feedback)[0])

    def _first_codes(self, problem: LayerProblem, grid: Grid, feedback: Feedback | None) -> Solution:
        if feedback is not None:
            return Solution(problem, grid, error_feedback(problem, grid, feedback)[0])
        codes = coordinate_descent(problem, grid, sweeps=1, order=self.order, block_size=self.block_size)
        return Solution(problem, grid, codes)
