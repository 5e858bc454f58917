"""COMQ: back-propagation-free coordinate descent on the layer's output error, ‖X (W − Ŵ)ᵀ‖².

Paper: Zhang et al., "COMQ", arXiv 2403.07134, Algorithms 1 and 2; released code AozhongZhang/COMQ (fecf9ea).
Written on H = X Xᵀ, which is exactly equivalent to the paper's form on X and independent of the token count.
Configurations: `comq_release` is the released code (λ scales the finished grid, scales never updated, first
sweep from the float weights, inputs of the float model); `comq_paper` is Algorithm 2 (scales updated after
each sweep; the paper's K and λ are not known to us). Ours: λ chosen per row by the objective, correlations
shrunk, error feedback as the start and as a further candidate after each scale update, sweeps until the
objective stalls; `comq` on the affine grid, `comq_codebook` on free levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec
from ptq.problem import LayerProblem
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
    update_scale: bool  # closed-form scales (and float offsets) after each sweep
    start: Start
    shrinkage: float  # added to diag(H), as a fraction of itself: correlations of few samples are overrated
    damping: float  # of H in the error feedback, as a fraction of its mean diagonal; unused by start=weights
    candidates: int  # partial roundings kept per row by the error feedback of later sweeps (beam search)
    tolerance: float  # stop when a sweep lowers the layer's error by less than this fraction; 0 = never early
    block_size: int  # columns between two matrix products; changes speed, not results

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("sweeps", "candidates", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.shrink or min(self.shrink) <= 0:
            raise InputError(f"shrink needs one positive factor or more; got {self.shrink}")
        for name in ("shrinkage", "damping", "tolerance"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative; got {getattr(self, name)}")

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        fitted = grid.fit(problem.T, bits, group_size, problem.H)
        if self.shrinkage > 0:
            problem = shrunk(problem, self.shrinkage)
        feedback = None
        if self.start is Start.error_feedback:
            feedback = prepare(problem, damping=self.damping, act_order=True, conditional=True)
        best = self._first_codes(problem, fitted.scaled(self.shrink[0]), feedback)
        for factor in self.shrink[1:]:
            best = best.or_better(self._first_codes(problem, fitted.scaled(factor), feedback))
        if self.update_scale:
            best = best.refitted()
        for _ in range(self.sweeps - 1):
            before = best.total()
            if feedback is not None:
                found = beam_search(problem, best.grid, feedback, candidates=self.candidates)
                best = best.or_better(Solution(problem, best.grid, found))
            codes = coordinate_descent(
                problem, best.grid, sweeps=1, order=self.order, codes=best.codes, block_size=self.block_size
            )
            best = Solution(problem, best.grid, codes)
            if self.update_scale:
                best = best.refitted()
            if self.tolerance > 0 and best.total() >= (1 - self.tolerance) * before:
                break
        return best.codes, best.grid

    def _first_codes(self, problem: LayerProblem, grid: Grid, feedback: Feedback | None) -> Solution:
        if feedback is not None:
            codes, _ = error_feedback(problem, grid, feedback)
        else:
            codes = coordinate_descent(problem, grid, sweeps=1, order=self.order, block_size=self.block_size)
        return Solution(problem, grid, codes)


def shrunk(problem: LayerProblem, fraction: float) -> LayerProblem:
    """The same target with every correlation of the inputs divided by 1 + `fraction`, and the objective
    multiplied by as much.

    Measured on 4096 samples of 1024 inputs, a fraction of 0.02 lowers the error on other inputs by 1 to 2 %
    and leaves that on the samples as it is.
    """
    H = problem.H.clone()
    H.diagonal(dim1=-2, dim2=-1).mul_(1 + fraction)
    return LayerProblem(problem.name, problem.T, H)
