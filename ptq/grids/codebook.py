"""Codebook grids: value = levels[code], a sorted table of 2^b learned levels for each unit.

Fit: one-dimensional k-means of the unit's weights, each counted once or by its input's power H_ii
(SqueezeLLM, arXiv 2306.07629, has the Fisher diagonal there). Refit: least squares of the levels under the
whole H, which LNQ (GuidedQuant, arXiv 2505.07004) alternates with coordinate descent on the codes.
Differs: levels stay in order, because codes are kept over a refit and the search for the nearest level needs
the order. Where plain least squares would let levels cross, these are tied to one value.
Shapes: W, codes [groups, out, in]; levels [groups, out, units, L] ([1, 1, 1, L] per tensor);
H [groups, in, in].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.affine import Granularity, solve_ridged
from ptq.grids.grid import check_bits, check_group_size, code_dtype
from ptq.grids.kmeans import scalar_kmeans
from ptq.grids.lookup import COMPARED, nearest_level
from ptq.storage import pack_codes, pack_parameter, unpack_codes, unpack_parameter

MOST_BITS = 8
FIT_BLOCK = 2**23  # weights sorted at once
REFIT_BLOCK = 2**24  # elements of the [rows, L, in] sums of H held at once
REFIT_PASSES = 3  # over the units of a row, when it has several


class Metric(Enum):
    """What each weight's squared error counts in the fit."""

    weight = "weight"  # 1
    diagonal = "diagonal"  # H_ii, the mean square of its input


@dataclass(kw_only=True, slots=True)
class Codebook:
    """How to fit tables of levels to a weight matrix.

    k-means keeps the best of several starts for each unit. Among them are the affine tables, their range
    shrunk by the best factor of {1 − k · (1 − min_shrink) / shrink_steps}, so that no affine grid with such a
    range is better under the metric. `parameter_bits` 16 keeps levels as float16 with one power of two per
    layer.
    """

    metric: Metric
    granularity: Granularity
    iterations: int  # of k-means from each start; an upper bound
    shrink_steps: int
    min_shrink: float
    parameter_bits: int  # 16 or 32

    def __post_init__(self) -> None:
        if self.parameter_bits not in (16, 32):
            raise InputError(f"parameter_bits must be 16 or 32; got {self.parameter_bits}")
        if self.iterations < 1:
            raise InputError(f"iterations must be at least 1; got {self.iterations}")
        if self.shrink_steps < 1 or not 0 < self.min_shrink <= 1:
            raise InputError(
                "shrink_steps must be at least 1 and min_shrink in (0, 1]; "
                f"got {self.shrink_steps} and {self.min_shrink}"
            )

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        if check_bits(bits) > MOST_BITS:
            raise InputError(
                f"a codebook keeps a table of 2^bits levels per unit and has at most {MOST_BITS} bits; "
                f"got {bits:g}; take an affine grid, whose size does not grow with bits"
            )
        check_group_size(group_size)
        if group_size is not None and self.granularity is Granularity.tensor:
            raise InputError(
                f"granularity=tensor has one table per layer and takes no group_size; got {group_size}"
            )

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> CodebookGrid:
        """Grid fitted to W [groups, out, in]; H [groups, in, in] is needed by metric=diagonal only."""
        self.check(bits, group_size)
        if self.metric is Metric.weight:
            mass = torch.ones_like(W)
        elif H is not None:
            mass = H.diagonal(dim1=-2, dim2=-1).clamp_min(0)[:, None, :].expand_as(W)
        else:
            raise InputError(
                "metric=diagonal needs the layer's Gram matrix; use metric=weight (grid=codebook_weight) "
                "where there is no calibration, or where groups are fitted during a sweep"
            )
        shape = self._level_shape(W, bits, group_size)
        if self.granularity is Granularity.tensor:
            values, mass = W.reshape(1, -1), mass.reshape(1, -1)
        else:  # [groups · out · units, n]; what fills a ragged last group up has no mass
            size = group_size or W.shape[-1]
            values = _in_units(W, size).flatten(0, 2)
            padded = torch.nn.functional.pad(mass, (0, -W.shape[-1] % size))
            mass = padded.unflatten(-1, (-1, size)).flatten(0, 2)
        levels = torch.empty(len(values), shape[-1], dtype=W.dtype, device=W.device)
        at_once = max(1, FIT_BLOCK // values.shape[-1])
        shrinks = [1 - k * (1 - self.min_shrink) / self.shrink_steps for k in range(self.shrink_steps)]
        for top in range(0, len(values), at_once):
            rows = slice(top, top + at_once)
            levels[rows] = scalar_kmeans(
                values[rows], mass[rows], shape[-1], iterations=self.iterations, shrinks=shrinks
            ).to(W.dtype)
        return self._grid(levels.reshape(shape), bits, W.shape[-1], group_size).as_stored()

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        self.check(bits, group_size)
        levels = torch.empty(self._level_shape(W, bits, group_size), device="meta")
        return self._grid(levels, bits, W.shape[-1], group_size).storage_bits(W)

    def _level_shape(self, W: Tensor, bits: float, group_size: int | None) -> tuple[int, int, int, int]:
        if self.granularity is Granularity.tensor:
            return (1, 1, 1, 2 ** int(bits))
        units = math.ceil(W.shape[-1] / (group_size or W.shape[-1]))
        return (W.shape[0], W.shape[1], units, 2 ** int(bits))

    def _grid(self, levels: Tensor, bits: float, in_features: int, group_size: int | None) -> CodebookGrid:
        return CodebookGrid(
            levels=levels,
            bits=int(bits),
            in_features=in_features,
            group_size=group_size,
            parameter_bits=self.parameter_bits,
            per_tensor=self.granularity is Granularity.tensor,
        )


def _in_units(x: Tensor, size: int) -> Tensor:
    """x [..., in] as [..., units, size]; a ragged last unit is filled up with its last column."""
    missing = -x.shape[-1] % size
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    return x.unflatten(-1, (-1, size))


@dataclass(kw_only=True, slots=True)
class CodebookGrid:
    """Fitted tables. Levels never decrease along a table; equal ones are allowed."""

    levels: Tensor  # [groups, out, units, L]
    bits: int
    in_features: int
    group_size: int | None
    parameter_bits: int
    per_tensor: bool
    code_min: int = field(init=False, default=0)
    code_max: int = field(init=False)
    # made when first needed, per unit: [L − 1, groups, out] up to COMPARED levels, else [groups, out, L − 1]
    middles: list[Tensor] | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.code_max = 2**self.bits - 1

    @property
    def shared(self) -> bool:
        """Whether one table serves several rows, so that rows cannot choose for themselves."""
        return self.per_tensor

    def _unit_columns(self) -> list[slice]:
        size = self.group_size or self.in_features
        return [slice(i, min(i + size, self.in_features)) for i in range(0, self.in_features, size)]

    def round(self, W: Tensor) -> Tensor:
        size = self.group_size or self.in_features
        codes = nearest_level(_in_units(W, size), self.levels.detach())
        return codes.flatten(-2)[..., : self.in_features].to(code_dtype(self))

    def values(self, codes: Tensor) -> Tensor:
        index = codes.to(torch.int64)
        if self.levels.shape[2] > 1:
            assert self.group_size is not None
            unit = torch.arange(self.in_features, device=codes.device) // self.group_size
            index = index + unit * self.levels.shape[-1]
        table = self.levels.expand(*codes.shape[:2], -1, -1).flatten(2)  # [groups, out, units · L]
        return table.gather(-1, index)

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(column, Tensor) and self.levels.shape[2] > 1:
            assert self.group_size is not None
            unit = (column // self.group_size)[..., None, None].expand(-1, -1, 1, self.levels.shape[-1])
            table = self.levels.gather(2, unit)[:, :, 0]  # [groups, out, L]
            codes = nearest_level(w[..., None], table)
            return codes[..., 0], table.gather(-1, codes)[..., 0]
        index = 0 if isinstance(column, Tensor) else column // (self.group_size or self.in_features)
        if self.middles is None:
            self.middles = self._middles()
        middles = self.middles[index]
        if self.levels.shape[-1] <= COMPARED:
            codes = (w >= middles).sum(0)  # [groups, out]
        else:
            codes = torch.searchsorted(middles, w[..., None].contiguous(), right=True)[..., 0]
        table = self.levels[:, :, index].expand(*w.shape, -1)
        return codes, table.gather(-1, codes[..., None])[..., 0]

    def _middles(self) -> list[Tensor]:
        """Where each unit's nearest level changes, laid out for `round_column`."""
        levels = self.levels.detach()
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        if levels.shape[-1] <= COMPARED:
            return [m.permute(2, 0, 1).contiguous() for m in middles.unbind(2)]
        return [m[0, 0] if self.per_tensor else m.contiguous() for m in middles.unbind(2)]

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> CodebookGrid:
        """Least squares for the levels of each row in the order they have, under the whole H.

        Exact for one unit per row; several units take turns, each exact given the others. A level that no
        code uses stays unless its neighbours push it. A row keeps its old levels where the stored result
        would not lower its objective.
        """
        H, index = H.double(), codes.to(torch.int64)
        R = W.double() - self.values(codes).double()
        G = R @ H  # [groups, out, in]
        before = (R * G).sum(-1)
        levels = self.levels.double().clone()
        units = self._unit_columns()
        for _ in range(1 if len(units) == 1 else REFIT_PASSES):
            for unit, columns in enumerate(units):
                old = levels[:, :, unit].clone()
                new = self._unit_levels(index[..., columns], H[:, columns, columns], G[..., columns], old)
                levels[:, :, unit] = new
                if len(units) > 1:
                    step = (new - old).expand(*index.shape[:2], -1).gather(-1, index[..., columns])
                    G = G - step @ H[:, columns]
        usable = torch.isfinite(levels).flatten(2).all(-1)[..., None, None]
        new_grid = self._with(torch.where(usable, levels, self.levels.double()).to(self.levels.dtype))
        new_grid = new_grid.as_stored()
        R = W.double() - new_grid.values(codes).double()
        after = ((R @ H) * R).sum(-1)
        if self.per_tensor:
            before, after = before.sum().reshape(1, 1), after.sum().reshape(1, 1)
        return new_grid.where(after < before, self)

    def _unit_levels(self, index: Tensor, H: Tensor, G: Tensor, old: Tensor) -> Tensor:
        """The best levels for one unit: codes [groups, out, n], H [groups, n, n], G = (W − Ŵ) H at its
        columns, old levels [groups, out, L] ([1, 1, L] per tensor).
        """
        L = old.shape[-1]
        v = G.new_zeros(*index.shape[:2], L).scatter_add_(-1, index, G)
        at_once = max(1, REFIT_BLOCK // (index.shape[0] * L * max(L, index.shape[-1])))
        new, total = old.clone(), G.new_zeros(1, 1, L, L)
        for top in range(0, index.shape[1], at_once):
            rows = slice(top, top + at_once)
            M = code_gram(index[:, rows], H, L)  # [groups, rows, L, L]
            if self.per_tensor:  # rows add up
                total += M.sum((0, 1))
            else:
                new[:, rows] = ordered_least_squares(M, v[:, rows], old[:, rows])
        return ordered_least_squares(total, v.sum((0, 1), keepdim=True), old) if self.per_tensor else new

    def _with(self, levels: Tensor) -> CodebookGrid:
        return replace(self, levels=levels)

    def where(self, better: Tensor, other: CodebookGrid) -> CodebookGrid:
        return self._with(torch.where(better[..., None, None], self.levels, other.levels))

    def scaled(self, factor: float) -> CodebookGrid:
        """The whole table multiplied by a positive `factor`: codes keep their meaning."""
        return self._with(self.levels * factor).as_stored()

    def replace_unit(self, unit: int, other: CodebookGrid) -> CodebookGrid:
        levels = self.levels.clone()
        levels[:, :, unit] = other.levels[:, :, 0]
        return self._with(levels)

    def parameters(self) -> dict[str, Tensor]:
        return {"levels": self.levels}

    def with_parameters(self, parameters: dict[str, Tensor]) -> CodebookGrid:
        return self._with(parameters["levels"])

    def as_stored(self) -> CodebookGrid:
        """The grid with levels exactly as a file would return them."""
        stored = unpack_parameter(*pack_parameter(self.levels, self.parameter_bits))
        return self._with(stored.to(self.levels.dtype))

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        levels, exponent = pack_parameter(self.levels, self.parameter_bits)
        facts: dict[str, Any] = {
            "grid": "ptq.grids.codebook.CodebookGrid",
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(codes.shape),
            "parameter_shape": list(self.levels.shape),
            "parameter_bits": self.parameter_bits,
            "levels_exponent": exponent,
            "per_tensor": self.per_tensor,
        }
        return {"codes": pack_codes(codes, self.bits), "levels": levels}, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[CodebookGrid, Tensor]:
        """The grid and the codes that `storage` wrote."""
        bits, shape = int(facts["bits"]), tuple(facts["shape"])
        levels = unpack_parameter(tensors["levels"], facts["levels_exponent"])
        grid = cls(
            levels=levels.reshape(tuple(facts["parameter_shape"])),
            bits=bits,
            in_features=shape[-1],
            group_size=facts["group_size"],
            parameter_bits=int(facts["parameter_bits"]),
            per_tensor=bool(facts["per_tensor"]),
        )
        return grid, unpack_codes(tensors["codes"], bits, shape).to(code_dtype(grid))

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        return {
            "codes": codes.numel() * self.bits,
            "parameters": self.levels.numel() * self.parameter_bits,
        }


def code_gram(index: Tensor, H: Tensor, num_levels: int) -> Tensor:
    """M [groups, rows, L, L] with M_kl = Σ H_ij over the inputs i of code k and j of code l, for codes
    `index` [groups, rows, n].
    """
    groups, rows, n = index.shape
    members = index.argsort(-1)  # inputs, code after code
    count = torch.zeros(groups, rows, num_levels, dtype=torch.int64, device=H.device)
    count = count.scatter_add_(-1, index, torch.ones_like(index)).flatten()
    begin = count.cumsum(0) - count

    def sum_by_code(table: Tensor, first_row: Tensor) -> Tensor:
        # sums of table rows: no [rows, n, n], and n · width additions whatever the number of levels
        rows_of_codes = (members + first_row).flatten()
        return torch.nn.functional.embedding_bag(rows_of_codes, table, begin, mode="sum")

    group = torch.arange(groups, device=H.device)[:, None, None]
    row = torch.arange(groups * rows, device=H.device).reshape(groups, rows, 1)
    sums = sum_by_code(H.reshape(groups * n, n), n * group).reshape(groups * rows, num_levels, n)
    sums = sum_by_code(sums.mT.reshape(-1, num_levels), n * row)
    M = sums.reshape(groups, rows, num_levels, num_levels)
    return (M + M.mT) / 2


def ordered_least_squares(M: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """θ [..., L], never decreasing along L, that lowers (θ − start)ᵀ M (θ − start) − 2 vᵀ (θ − start): to its
    least where plain least squares keeps the order, and never above the 0 of `start`, which must be in order.
    """
    L = start.shape[-1]
    M, v, theta = M.reshape(-1, L, L), v.reshape(-1, L), start.reshape(-1, L)
    target = theta + solve_ridged(M, v, torch.zeros_like(v))
    crossed = (target.diff() < 0).any(-1).nonzero()[:, 0]
    if len(crossed):
        M, v, old = M[crossed], v[crossed], theta[crossed]
        step = _pooled_target(M, v, old, target[crossed]) - old
        # the tied levels may have been better apart: go as far towards the target as the objective falls
        slope, curvature = (v * step).sum(-1), ((M @ step[..., None])[..., 0] * step).sum(-1)
        length = (slope / torch.where(curvature > 0, curvature, 1.0)).clamp(0, 1)[:, None]
        target[crossed] = (old + length * step).cummax(-1).values
    return target.reshape(start.shape)


def _pooled_target(M: Tensor, v: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Least squares with neighbours that are out of order in `target` [rows, L] tied to one value, and again
    until all are in order.
    """
    L = start.shape[-1]
    wanted = v + (M @ start[..., None])[..., 0]  # M θ = wanted
    target = target.clone()
    tied = torch.zeros_like(start[:, 1:], dtype=torch.bool)
    for _ in range(L):
        crossing = target.diff() < 0
        rows = crossing.any(-1).nonzero()[:, 0]
        if not len(rows):
            break
        tied |= crossing
        block = torch.nn.functional.pad((~tied[rows]).cumsum(-1), (1, 0))  # [rows, L]
        empty = start.new_zeros(len(rows), L)
        across = torch.zeros_like(M[rows]).scatter_add_(-1, block[:, None].expand(-1, L, -1), M[rows])
        down = torch.zeros_like(across).scatter_add_(1, block[..., None].expand(-1, -1, L), across)
        size = empty.scatter_add(-1, block, torch.ones_like(empty))
        middle = empty.scatter_add(-1, block, start[rows]) / size.clamp_min(1)  # kept where M sees nothing
        pooled = solve_ridged(down, empty.scatter_add(-1, block, wanted[rows]), middle)
        target[rows] = pooled.gather(-1, block)
    return target
