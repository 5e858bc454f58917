"""HQQ: half-quadratic splitting for the offset of each row or group, from the weights alone.

Source: Badri and Shaji, "Half-Quadratic Quantization", 2023, and its release mobiusml/hqq; letters as there.
min_z ‖W − s (Q − z)‖_p^p by E ← shrink(W − Ŵ, β), z ← mean(Q − (W − E) / s), β ← β · growth, with s fixed.
On a grid value = scale · code + offset, where offset = −s z, the second step is offset ← offset +
mean(W − Ŵ − E).
Differs: the offset is kept as it is stored (float16), and is never rounded to an integer zero.
Shapes: W, Ŵ, E [groups, out, in]; offset [groups, out, units].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.affine import Affine, AffineGrid, Granularity, Zero
from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec
from ptq.problem import LayerProblem
from ptq.solvers.nearest import nearest


@dataclass(kw_only=True, slots=True)
class HQQ:
    """Offsets that suit most weights of a unit, on scales that stay as fitted; needs no calibration data."""

    norm: float  # p of the error's norm: below 1, a few large errors count little
    beta: float  # β of the first step: shrinkage, in the units of the weights
    beta_growth: float  # factor on β after each step
    steps: int  # an upper bound: the layer stops when its mean |W − Ŵ| stops falling

    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1:
            raise InputError(f"norm must be above 0 and at most 1; got {self.norm}")
        if self.beta <= 0 or self.beta_growth < 1:
            raise InputError(
                f"beta must be positive and beta_growth at least 1; got {self.beta} and {self.beta_growth}"
            )
        if self.steps < 1:
            raise InputError(f"steps must be at least 1; got {self.steps}")

    def check_grid(self, grid: GridSpec) -> None:
        """Raise InputError unless every row or group of the grid has a free real offset."""
        if not isinstance(grid, Affine) or grid.zero is not Zero.float:
            raise InputError(
                "hqq solves for real offsets, which this grid does not have; use grid=affine_float"
            )
        if grid.granularity is Granularity.tensor:
            raise InputError(
                "hqq solves for one offset per row or group, and granularity=tensor has one per layer; "
                "set grid.granularity=channel"
            )

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        fitted = grid.fit(problem.T, bits, group_size, problem.H)
        assert isinstance(fitted, AffineGrid)
        beta, least = self.beta, float("inf")
        for _ in range(self.steps):
            R = problem.T - fitted.values(nearest(problem, fitted))
            E = shrink(R, beta, self.norm)
            assert fitted.offset is not None
            fitted = replace(fitted, offset=fitted.offset + unit_means(R - E, group_size)).as_stored()
            error = float(R.abs().mean())
            if error >= least:
                break
            least = error
            beta *= self.beta_growth
        return nearest(problem, fitted), fitted


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """sign(x) max(|x| − |x|^(p−1) / β, 0): only large errors survive, hardly reduced."""
    size = x.abs()
    return x.sign() * (size - size.pow(norm - 1) / beta).clamp_min(0)


def unit_means(x: Tensor, group_size: int | None) -> Tensor:
    """Means [groups, out, units] of x [groups, out, in]."""
    return torch.stack([unit.mean(-1) for unit in x.split(group_size or x.shape[-1], dim=-1)], -1)
