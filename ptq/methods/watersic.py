"""WaterSIC for one layer: error feedback on unbounded codes with cells of one width in the output.

Paper: "WaterSIC", arXiv 2603.04956, Algorithm 3: one input after the other, weights are rounded to multiples
of c / l_i, l_i² being what the inputs still to come leave of input i, so that every rounding adds c²/12 to
the error. The grid holds these steps (conf/grid/entropy_columns), the solver is plain error feedback.
Ours, beyond the paper: steps in fractions of an octave instead of 16 bits; `ridge`, the target of the
Gaussian test channel, minimises error + δ ‖Ŵ‖² with δ = ridge · c² / (12 mean W²), which costs nothing and
saves a tenth of a bit at 2 bits and more below; coordinate descent on error + rate; a refit of the layer's
step. Not here: the paper's 16-bit factors of rows and columns, which the ridge leaves little to do, and its
mixing of statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.entropy import Entropy, EntropyGrid, Rows
from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec
from ptq.problem import LayerProblem
from ptq.rate import Trial
from ptq.solvers.error_feedback import Feedback, error_feedback, output_weight, prepare
from ptq.solvers.rate_descent import rate_descent

SLOPE = 0.1155  # 2 ln 2 / 12: error that a bit less costs at high rate, in units of c²


@dataclass(kw_only=True, slots=True)
class WaterSIC:
    """Error feedback towards a ridged target, then coordinate descent with a rate term."""

    damping: float  # of H in the error feedback, as a fraction of its mean diagonal
    act_order: bool  # visit inputs by decreasing H_ii
    ridge: float  # θ, pull towards zero in units of the cell's variance; 0 = none
    sweeps: int  # of coordinate descent with the rate term after the error feedback
    rate_weight: float  # error that a bit is worth in them, in units of the slope at high rate
    refit: bool  # least squares for the layer's step once the codes are there

    needs_gram: ClassVar[bool] = True
    rate_slope: ClassVar[float] = 0.92  # measured from 1 to 3 bits: the ridge of the target stays in trials

    def __post_init__(self) -> None:
        if min(self.damping, self.ridge, self.rate_weight) < 0 or self.sweeps < 0:
            raise InputError(
                "damping, ridge, rate_weight and sweeps must not be negative; "
                f"got {self.damping}, {self.ridge}, {self.rate_weight} and {self.sweeps}"
            )

    def check_grid(self, grid: GridSpec) -> None:
        """Refuse grids of fixed width."""
        if not isinstance(grid, Entropy) or grid.rows is not Rows.equal:
            raise InputError(
                f"WaterSIC moves its step freely and has neither range nor row scales; {type(grid).__name__} "
                "has one: use grid=entropy_columns or grid=entropy, or method=gptq on this grid"
            )

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        return self.finished(problem, *self.prepared(problem, grid, bits, group_size)(bits))

    def prepared(self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None) -> Trial:
        """Trials around `bits`: the ridge is the one of that target, H is factorised here."""
        self.check_grid(grid)
        assert isinstance(grid, Entropy)
        target = problem
        if self.ridge > 0:
            weight = output_weight(problem, damping=self.damping, act_order=self.act_order)
            fitted = grid.fit_steps(problem.T, bits, group_size, problem.H, weight)
            target = ridged(problem, self.ridge * float(cell(fitted, weight)) / 12, self.damping)
        feedback = prepare(target, damping=self.damping, act_order=self.act_order)
        return partial(self._trial, target, grid, group_size, feedback)

    def finished(self, problem: LayerProblem, codes: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The codes with the layer's step refitted to them."""
        return codes, grid.refit(codes, problem.T, problem.H) if self.refit else grid

    def _trial(
        self,
        target: LayerProblem,
        grid: Entropy,
        group_size: int | None,
        feedback: Feedback,
        bits: float,
    ) -> tuple[Tensor, Grid]:
        # the grid's steps are those of this error feedback
        weight = feedback.weight()
        fitted = grid.fit_steps(target.T, bits, group_size, target.H, weight)
        codes, _ = error_feedback(target, fitted, feedback)
        if self.sweeps:
            worth = self.rate_weight * SLOPE * float(cell(fitted, weight))
            codes = rate_descent(target, fitted, codes, weight=worth, sweeps=self.sweeps)
        return codes, fitted


def cell(grid: EntropyGrid, weight: Tensor) -> Tensor:
    """c²: mean square of the cells' width in the output; a scalar. `weight` [groups, in] is what a squared
    distance of each input counts there (`Feedback.weight`).
    """
    squares = (grid.columns() * grid.step.double()).square() * weight.double()
    alive = ~grid.dead
    return squares[alive].mean() if bool(alive.any()) else squares.new_zeros(())


def ridged(problem: LayerProblem, variance: float, damping: float) -> LayerProblem:
    """The problem with δ ‖Ŵ‖² added to its objective, δ = variance / mean T²: its T is shrunk towards zero.

    Completing the square gives H + δ I and T H (H + δ I)⁻¹, the form of a float-path target. Inputs that are
    always zero stay so, unless all are.
    """
    power = float(problem.T.double().square().mean())
    if power <= 0 or variance <= 0:
        return problem
    H = problem.H.double()
    alive = H.diagonal(dim1=-2, dim2=-1) > 0
    ridge = variance / power * torch.diag_embed((alive | ~alive.any()).double())
    return LayerProblem(problem.name, problem.T, H + ridge, H, damping)
