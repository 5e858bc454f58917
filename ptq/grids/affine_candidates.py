"""Affine grids that differ in their clipping alone: the control of a choice among many candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.affine import Affine, AffineGrid, Granularity, Range, Zero


@dataclass(kw_only=True, slots=True)
class AffineCandidates:
    """The min-max grid of each unit with its range multiplied by one factor for the whole model: `runs`
    factors, evenly spaced from `max_factor` down to `min_factor`.

    A fit by itself, which has no task to choose by, takes the factor with the least weight error.
    """

    zero: Zero
    runs: int
    max_factor: float  # the one factor where runs is 1
    min_factor: float
    parameter_bits: int

    def __post_init__(self) -> None:
        if self.runs < 1 or not 0 < self.min_factor <= self.max_factor:
            raise InputError(
                "runs must be at least 1 and min_factor positive and at most max_factor; "
                f"got {self.runs}, {self.min_factor:g} and {self.max_factor:g}"
            )

    def factors(self) -> list[float]:
        """All factors, the largest first."""
        gap = (self.max_factor - self.min_factor) / max(1, self.runs - 1)
        return [self.max_factor - k * gap for k in range(self.runs)]

    def candidates(self) -> dict[str, AffineCandidates]:
        """Every factor by name, as a grid of one run."""
        return {
            f"clip/{factor:.4f}": replace(self, runs=1, max_factor=factor, min_factor=factor)
            for factor in self.factors()
        }

    def report(self) -> dict[str, Any]:
        """Nothing to report."""
        return {}

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        self._whole_range().check(bits, group_size)

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        return self._whole_range().size(W, bits, group_size)

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> AffineGrid:
        """Grid fitted to W [groups, out, in]; H is not looked at."""
        whole = self._whole_range().fit(W, bits, group_size)
        best, best_error = whole, torch.inf
        for factor in self.factors():
            grid = whole.scaled(factor)
            error = float((W - grid.values(grid.round(W))).double().square().sum())
            if error < best_error:
                best, best_error = grid, error
        return best

    def _whole_range(self) -> Affine:
        return Affine(
            zero=self.zero,
            granularity=Granularity.channel,
            range=Range.min_max,
            include_zero=self.zero is not Zero.float,
            shrink_steps=1,
            min_shrink=1.0,
            percentile=100.0,
            parameter_bits=self.parameter_bits,
        )
