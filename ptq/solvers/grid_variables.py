"""A grid whose parameters are trained: from variables near zero to the grid that they stand for.

Shapes: parameters as the grid has them; variables of the same shape, 0 at the start.
"""

from __future__ import annotations

import re
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from ptq.grids.affine import AffineGrid
from ptq.grids.grid import Grid
from ptq.solvers.rank_one import LEAST_STEP

LOGARITHM = re.compile(r"(^|_)log_")  # in names of parameters, and of those of one width of rows
LEAST_FACTOR = 1e-3  # of a range: no step becomes 0
SMALLEST_SIZE = 0.1  # of a parameter's own step, in root mean squares of its tensor


class GridForm(Enum):
    """How the variables move the parameters."""

    relative = "relative"  # parameter + size · variable, size the parameter's own magnitude
    factor = "factor"  # parameter · 2 sigmoid(variable) (TesseraQ's dequantization factor)
    range = "range"  # both ends of an affine range by factors from 0 to 1 (SignRound), else one such factor


class GridVariables:
    """A fitted grid and the variables of its parameters."""

    def __init__(self, grid: Grid, form: GridForm, trained: bool) -> None:
        self.start, self.form, self.trained = grid, form, trained
        self.parameters = {name: p.detach().clone() for name, p in grid.parameters().items()}
        self.logarithms = {name for name in self.parameters if LOGARITHM.search(name)}
        self.sizes = {
            name: torch.ones_like(p) if name in self.logarithms else _sizes(p)
            for name, p in self.parameters.items()
        }
        shapes = self.parameters
        if form is GridForm.range and isinstance(grid, AffineGrid):
            shapes = {"low": grid.scale, "high": grid.scale}
        self.variables = {name: torch.zeros_like(p) for name, p in shapes.items()}

    def requires_grad(self) -> list[Tensor]:
        """The variables, ready for an optimizer; none where the grid stays as it is."""
        if not self.trained:
            return []
        return [v.requires_grad_(True) for v in self.variables.values()]

    def grid(self) -> Grid:
        """The grid that the variables stand for, differentiable in them."""
        if not self.trained:
            return self.start
        if self.form is GridForm.range and isinstance(self.start, AffineGrid):
            return self._ranged(self.start)
        moved = {}
        for name, p in self.parameters.items():
            v = self.variables[name]
            if name in self.logarithms:  # a relative change of what it is the logarithm of, in every form
                moved[name] = p + v
            elif self.form is GridForm.factor:
                moved[name] = p * 2 * torch.sigmoid(v)
            else:
                relative = self.form is GridForm.relative
                moved[name] = p + self.sizes[name] * v if relative else p * (1 + v).clamp_min(LEAST_FACTOR)
        return self.start.with_parameters(moved)

    def _ranged(self, start: AffineGrid) -> AffineGrid:
        """Low and high end of each unit times 1 + variable; an integer zero point is rounded anew."""
        low_factor, high_factor = 1 + self.variables["low"], 1 + self.variables["high"]
        steps = start.code_max - start.code_min
        if start.offset is None and start.zero_point is None:
            return replace(start, scale=start.scale * high_factor.clamp_min(LEAST_FACTOR))
        # rows so small that steps of parts of theirs underflow stay as they are
        alive = start.scale.abs() > LEAST_STEP
        step = torch.where(alive, start.scale, torch.ones_like(start.scale))
        shift = start.offset if start.zero_point is None else -step * start.zero_point
        assert shift is not None
        low = shift * low_factor
        scale = ((shift + step * steps) * high_factor - low) / steps
        scale = torch.where(scale.abs() < LEAST_FACTOR * step.abs(), LEAST_FACTOR * step, scale)
        moved = torch.where(alive, scale, start.scale)
        if start.zero_point is None:
            return replace(start, scale=moved, offset=torch.where(alive, low, shift))
        exact = -low / scale
        exact = exact.round() + (exact - exact.detach())
        return replace(start, scale=moved, zero_point=torch.where(alive, exact, start.zero_point))

    @torch.no_grad()
    def advance(self) -> None:
        """After a step: factors of a range back into [0, 1]."""
        if self.form is GridForm.range:
            for name, v in self.variables.items():
                if name not in self.logarithms:
                    v.clamp_(-1, 0)

    @torch.no_grad()
    def stored(self) -> Grid:
        """The grid as a file would return it."""
        return self.grid().as_stored() if self.trained else self.start


def _sizes(p: Tensor) -> Tensor:
    """The magnitude of each entry, kept from 0 by that of the whole tensor."""
    mean = p.square().mean().sqrt()
    return p.abs().clamp_min(SMALLEST_SIZE * float(mean)).clamp_min(torch.finfo(p.dtype).tiny)
