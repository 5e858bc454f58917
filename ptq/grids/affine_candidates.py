"""Affine grids that differ in their clipping alone: the control of a choice among many candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.affine import Affine, AffineGrid, Granularity, Range, Zero


@dataclass(kw_only=True, slots=True)
class ClippedAffine:
    """The min-max grid of each unit with its range multiplied by one factor."""

    zero: Zero
    factor: float
    parameter_bits: int

    def _min_max(self) -> Affine:
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

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        self._min_max().check(bits, group_size)

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        return self._min_max().size(W, bits, group_size)

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> AffineGrid:
        """Grid fitted to W [groups, out, in]; H is not looked at."""
        return self._min_max().fit(W, bits, group_size).scaled(self.factor)


@dataclass(kw_only=True, slots=True)
class AffineCandidates:
    """`runs` factors, evenly spaced from 1 down to `min_factor`.

    A fit by itself takes the factor with the least weight error of the whole layer.
    """

    zero: Zero
    runs: int
    min_factor: float
    parameter_bits: int

    def __post_init__(self) -> None:
        if self.runs < 1 or not 0 < self.min_factor <= 1:
            raise InputError(
                f"runs must be at least 1 and min_factor in (0, 1]; got {self.runs} and {self.min_factor:g}"
            )

    def candidates(self) -> dict[str, ClippedAffine]:
        """Every factor by name."""
        gap = (1 - self.min_factor) / max(1, self.runs - 1)
        factors = [1 - k * gap for k in range(self.runs)]
        return {
            f"clip/{factor:.4f}": ClippedAffine(
                zero=self.zero, factor=factor, parameter_bits=self.parameter_bits
            )
            for factor in factors
        }

    def report(self) -> dict[str, Any]:
        """Nothing to report."""
        return {}

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        self._first().check(bits, group_size)

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        return self._first().size(W, bits, group_size)

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> AffineGrid:
        """Grid fitted to W [groups, out, in]; H is not looked at."""
        whole = replace(self._first(), factor=1.0).fit(W, bits, group_size)
        best, best_error = whole, torch.inf
        for candidate in self.candidates().values():
            grid = whole.scaled(candidate.factor)
            error = float((W - grid.values(grid.round(W))).double().square().sum())
            if error < best_error:
                best, best_error = grid, error
        return best

    def _first(self) -> ClippedAffine:
        return next(iter(self.candidates().values()))
