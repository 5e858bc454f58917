"""Nearest rounding: each weight by itself."""

from __future__ import annotations

from torch import Tensor

from ptq.grids.grid import Grid
from ptq.problem import LayerProblem


def nearest(problem: LayerProblem, grid: Grid) -> Tensor:
    """Codes [groups, out, in] of the grid values nearest to the target weights."""
    return grid.round(problem.T)
