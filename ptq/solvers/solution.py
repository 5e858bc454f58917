"""Codes on a grid with their error per row: what methods that keep the better of two candidates pass around.

Shapes: codes [groups, out, in]; error [groups, out].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.grids.grid import Grid
from ptq.problem import LayerProblem


class Solution:
    """Codes on a grid with their error per row, so that the better of two can be kept row by row."""

    def __init__(self, problem: LayerProblem, grid: Grid, codes: Tensor, error: Tensor | None = None) -> None:
        self.problem, self.grid, self.codes = problem, grid, codes
        self.error = problem.error(grid.values(codes)) if error is None else error  # [groups, out]

    def total(self) -> float:
        return float(self.error.sum())

    def or_better(self, other: Solution) -> Solution:
        """This solution with the rows of `other` where they have less error (all rows at once on a shared
        grid).
        """
        if self.grid.shared:
            return other if other.total() < self.total() else self
        better = other.error < self.error
        codes = torch.where(better[..., None], other.codes, self.codes)
        error = torch.where(better, other.error, self.error)
        return Solution(self.problem, other.grid.where(better, self.grid), codes, error)

    def refitted(self) -> Solution:
        """The same codes with the closed-form parameters."""
        return Solution(self.problem, self.grid.refit(self.codes, self.problem.T, self.problem.H), self.codes)
