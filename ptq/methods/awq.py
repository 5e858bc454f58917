"""AWQ: scale up the input channels that matter, round to nearest, shrink the range where that helps.

Paper: Lin et al., "AWQ", arXiv 2306.00978, section 3.2; constants and clip search as in the release
(mit-han-lab/llm-awq). Ŵ = Q(W diag(s)) diag(s)⁻¹ with s_j = importance_j^r / √(max · min) of these.
Differs: only the layer's Gram matrix H is at hand, so importance is the root mean square √H_jj in place of
mean |X_j|, and r and the clipping minimise the layer's own output error tr((W − Ŵ) H (W − Ŵ)ᵀ) in place of
the block's. The release folds s into the operation before the layer at no cost; here s is stored with the
layer and counted, 16 bits an input. A row drops the clipping where it raises the row's error in all, and
queries and keys are clipped like other layers.
Shapes: W, V, Ŵ [groups, out, in]; H [groups, in, in]; s [groups, 1, in]; unit errors [groups, out, units].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.grids.scaled import ColumnScaled
from ptq.methods.method import GridSpec
from ptq.problem import LayerProblem
from ptq.solvers.nearest import nearest
from ptq.solvers.solution import Solution
from ptq.storage import pack_parameter, unpack_parameter

COLUMN_BITS = 16  # stored width of a column scale
LEAST_IMPORTANCE = 1e-4  # of the largest: keeps s within four decades


@dataclass(kw_only=True, slots=True)
class AWQ:
    """A search over one exponent per layer, then over one clipping factor per row or group."""

    exponents: int  # r is tried at 0, 1/n, …, (n − 1)/n
    shrink: list[float]  # factors on the largest magnitude of a unit that its weights are clipped at

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.exponents < 1:
            raise InputError(f"exponents must be at least 1; got {self.exponents}")
        if not all(0 < factor <= 1 for factor in self.shrink):
            raise InputError(
                f"shrink takes factors above 0 and at most 1, or [] for no clipping; got {self.shrink}"
            )

    def size(self, grid: GridSpec, W: Tensor, bits: float, group_size: int | None) -> dict[str, int]:
        """Bits that W will take with its column scales, {"codes", "parameters"}."""
        inner = grid.size(W, bits, group_size)
        columns = W.shape[0] * W.shape[-1] * COLUMN_BITS
        return {"codes": inner["codes"], "parameters": inner["parameters"] + columns}

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        best: ColumnScaled | None = None
        least = float("inf")
        for k in range(self.exponents):
            scaled = self._fit(problem, grid, bits, group_size, column_scale(problem, k / self.exponents))
            error = float(unit_errors(problem, scaled, None).sum())
            if best is None or error < least:
                best, least = scaled, error
        assert best is not None
        if not self.shrink:
            return nearest(problem, best), best
        clipped = self._clipped(problem, grid, bits, group_size, best)
        return clipped.codes, clipped.grid

    def _fit(
        self,
        problem: LayerProblem,
        grid: GridSpec,
        bits: float,
        group_size: int | None,
        scale: Tensor,
        clip: Tensor | None = None,
    ) -> ColumnScaled:
        """The grid fitted to V = T / scale, clipped at ± `clip` [groups, out, in]."""
        V = problem.T / scale
        if clip is not None:
            V = V.clamp(-clip, clip)
        H = problem.H * scale.to(problem.H.dtype) * scale.to(problem.H.dtype).mT
        inner = grid.fit(V, bits, group_size, H)
        return ColumnScaled(inner=inner, scale=scale, scale_bits=COLUMN_BITS)

    def _clipped(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None, fitted: ColumnScaled
    ) -> Solution:
        """`fitted` with each unit clipped as its own inputs like best, in the rows that gain by it in all."""
        scale = fitted.scale
        largest = magnitudes(problem.T / scale, group_size, shared=fitted.shared)
        columns = torch.arange(problem.T.shape[-1], device=scale.device) // (
            group_size or problem.T.shape[-1]
        )
        factors = torch.ones_like(largest)
        least = unit_errors(problem, fitted, group_size)
        for factor in self.shrink:
            clip = (factor * largest)[..., columns]
            error = unit_errors(problem, self._fit(problem, grid, bits, group_size, scale, clip), group_size)
            better = error.sum() < least.sum() if fitted.shared else error < least
            factors = torch.where(better, factor, factors)
            least = torch.where(better, error, least)
        clip = (factors * largest)[..., columns]
        clipped = self._fit(problem, grid, bits, group_size, scale, clip)
        plain, tried = (Solution(problem, g, nearest(problem, g)) for g in (fitted, clipped))
        return plain.or_better(tried)


def column_scale(problem: LayerProblem, exponent: float) -> Tensor:
    """1 / s [groups, 1, in] as stored; s = 1 for an input that is always zero."""
    importance = problem.H.diagonal(dim1=-2, dim2=-1).clamp_min(0).double().sqrt()[:, None]
    largest = importance.amax(-1, keepdim=True)
    live = importance > 0
    s = importance.clamp_min(LEAST_IMPORTANCE * largest) ** exponent
    most = torch.where(live, s, 0).amax(-1, keepdim=True)
    least = torch.where(live, s, torch.inf).amin(-1, keepdim=True)
    inverse = torch.where(live, (most * least).sqrt() / s, 1)
    return unpack_parameter(*pack_parameter(inverse, COLUMN_BITS)).to(problem.T.dtype)


def unit_errors(problem: LayerProblem, grid: Grid, group_size: int | None) -> Tensor:
    """Error of nearest rounding in each unit by itself, its own block of H: [groups, out, units]."""
    R = problem.T - grid.values(nearest(problem, grid))
    H = problem.H.to(R.dtype)
    if group_size is not None:
        unit = torch.arange(H.shape[-1], device=H.device) // group_size
        H = H * (unit[:, None] == unit)
    products = ((R @ H) * R).split(group_size or R.shape[-1], dim=-1)
    return torch.stack([p.sum(-1, dtype=torch.float64) for p in products], -1)


def magnitudes(V: Tensor, group_size: int | None, *, shared: bool) -> Tensor:
    """The largest |v| of each unit, [groups, out, units]; of the whole layer where rows share a grid."""
    largest = torch.stack([v.abs().amax(-1) for v in V.split(group_size or V.shape[-1], dim=-1)], -1)
    return largest.amax().expand_as(largest) if shared else largest
