"""RTN: round to nearest. The baseline of every table: fit a grid to the weights, round each weight by
itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec
from ptq.problem import LayerProblem
from ptq.solvers.nearest import nearest


@dataclass(kw_only=True, slots=True)
class RTN:
    """Nothing to set: the grid's range rule is all there is to nearest rounding."""

    needs_gram: ClassVar[bool] = False

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        fitted = grid.fit(problem.T, bits, group_size, problem.H)
        return nearest(problem, fitted), fitted
