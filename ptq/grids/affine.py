"""Affine and symmetric grids: value = scale · code + offset.

With an integer zero point the offset is −scale · zero_point; a symmetric grid has no offset; a float offset
is free.
Shapes: W, codes [groups, out, in]; scale, offset, zero_point [groups, out, units] ([1, 1, 1] per tensor).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import check_bits, check_group_size, code_dtype
from ptq.grids.least_squares import normal_equations, quadratic, solve_ridged
from ptq.storage import pack_codes, pack_parameter, unpack_codes, unpack_parameter

FARTHEST_ZERO_POINT = 2**15 - 1  # what 16 bits hold


class Zero(Enum):
    """How a grid reaches values away from zero."""

    integer = "integer"  # value = scale · (code − zero_point)
    float = "float"  # value = scale · code + offset
    none = "none"  # symmetric: value = scale · code, code from −2^(b−1)


class Granularity(Enum):
    """What shares one scale, before `group_size` splits rows further."""

    tensor = "tensor"
    channel = "channel"


class Range(Enum):
    """How the clipping range of each unit is found."""

    min_max = "min_max"
    mse = "mse"  # shrink factor with the least Σ|w − ŵ|²
    l2_4 = "l2_4"  # the same with exponent 2.4 (Frantar's `mse` option, BRECQ)
    gram = "gram"  # shrink factor per row with the least (w − ŵ) H (w − ŵ)ᵀ
    percentile = "percentile"


@dataclass(kw_only=True, slots=True)
class Affine:
    """How to fit an affine grid to a weight matrix.

    A per-row or per-unit range [min, max] is shrunk by the factor in
    {1 − k · (1 − min_shrink) / shrink_steps} that the `range` rule likes best. `parameter_bits` 16 keeps
    scales and offsets as float16 with one power of two per layer.
    """

    zero: Zero
    granularity: Granularity
    range: Range
    include_zero: bool  # widen the range to hold 0 (always so for a symmetric grid)
    shrink_steps: int
    min_shrink: float
    percentile: float  # percent of the weights inside the range, for range=percentile
    parameter_bits: int  # 16 or 32

    def __post_init__(self) -> None:
        if self.parameter_bits not in (16, 32):
            raise InputError(f"parameter_bits must be 16 or 32; got {self.parameter_bits}")
        if self.shrink_steps < 1 or not 0 < self.min_shrink <= 1:
            raise InputError(
                "shrink_steps must be at least 1 and min_shrink in (0, 1]; "
                f"got {self.shrink_steps} and {self.min_shrink}"
            )
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile must be in (50, 100]; got {self.percentile}")

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        check_bits(bits)
        check_group_size(group_size)
        if group_size is not None and self.granularity is Granularity.tensor:
            raise InputError(
                f"granularity=tensor has one scale per layer and takes no group_size; got {group_size}"
            )

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> AffineGrid:
        """Grid fitted to W [groups, out, in]; H [groups, in, in] is needed by range=gram only."""
        self.check(bits, group_size)
        low, high = self._range(W, group_size)
        if self.range in (Range.min_max, Range.percentile):
            return self._grid(low, high, int(bits), W.shape[-1], group_size)
        if self.range is Range.gram and H is None:
            raise InputError(
                "range=gram needs the layer's Gram matrix; use range=mse where there is no calibration"
            )
        best, best_error = self._grid(low, high, int(bits), W.shape[-1], group_size), None
        for k in range(self.shrink_steps):
            shrink = 1 - k * (1 - self.min_shrink) / self.shrink_steps
            grid = self._grid(shrink * low, shrink * high, int(bits), W.shape[-1], group_size)
            error = self._error(grid, W, H)
            if best_error is None:
                best_error = error
                continue
            better = error < best_error
            best = grid.where_units(better, best)
            best_error = torch.where(better, error, best_error)
        return best

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        fitted = replace(self, range=Range.min_max).fit(W, bits, group_size)
        return fitted.storage_bits(W)

    def _range(self, W: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
        if self.granularity is Granularity.tensor:
            units = [W.reshape(1, 1, -1)]
        else:
            units = list(W.split(group_size or W.shape[-1], dim=-1))
        if self.range is Range.percentile:
            tail = (1 - self.percentile / 100) / 2
            low = torch.stack([_quantile(u, tail) for u in units], -1)
            high = torch.stack([_quantile(u, 1 - tail) for u in units], -1)
        else:
            low = torch.stack([u.amin(-1) for u in units], -1)  # [groups, out, units]
            high = torch.stack([u.amax(-1) for u in units], -1)
        if self.zero is Zero.none:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        elif self.include_zero:
            low, high = low.clamp_max(0), high.clamp_min(0)
        return low, high

    def _grid(
        self, low: Tensor, high: Tensor, bits: int, in_features: int, group_size: int | None
    ) -> AffineGrid:
        levels = 2**bits
        scale = (high - low) / (levels - 1)
        # a constant unit: one step reaches its value from zero, and an all-zero unit takes any step
        magnitude = torch.maximum(low.abs(), high.abs())
        flat = scale <= magnitude * torch.finfo(scale.dtype).eps
        scale = torch.where(flat, torch.where(magnitude > 0, magnitude, torch.ones_like(scale)), scale)
        zero_point = offset = None
        if self.zero is Zero.integer:
            zero_point = torch.round(-low / scale)
            far = zero_point.abs() > FARTHEST_ZERO_POINT
            if far.any():  # a narrow range far from 0 has to hold it after all
                low = torch.where(far, low.clamp_max(0), low)
                high = torch.where(far, high.clamp_min(0), high)
                scale = torch.where(far, (high - low) / (levels - 1), scale)
                zero_point = torch.where(far, torch.round(-low / scale), zero_point)
        elif self.zero is Zero.float:
            offset = low
        return AffineGrid(
            scale=scale,
            zero_point=zero_point,
            offset=offset,
            code_min=-(levels // 2) if self.zero is Zero.none else 0,
            code_max=levels // 2 - 1 if self.zero is Zero.none else levels - 1,
            bits=bits,
            in_features=in_features,
            group_size=group_size,
            parameter_bits=self.parameter_bits,
            per_tensor=self.granularity is Granularity.tensor,
        ).as_stored()

    def _error(self, grid: AffineGrid, W: Tensor, H: Tensor | None) -> Tensor:
        """Error of nearest rounding, summed over what shares the choice: [groups, out, units or 1]
        or [1, 1, 1].
        """
        R = W - grid.values(grid.round(W))
        if self.range is Range.gram:
            assert H is not None
            E = ((R @ H.to(R.dtype)) * R).sum(-1, keepdim=True)
        else:
            E = R.abs().pow(2.0 if self.range is Range.mse else 2.4)
            if self.granularity is Granularity.channel:
                return torch.stack([e.sum(-1) for e in E.split(grid.group_size or W.shape[-1], dim=-1)], -1)
        return E.sum().reshape(1, 1, 1) if self.granularity is Granularity.tensor else E


def _quantile(values: Tensor, q: float) -> Tensor:
    """Quantile over the last dimension by sorting: torch.quantile refuses more than 16 million elements."""
    ordered = values.sort(-1).values
    position = q * (values.shape[-1] - 1)
    below = int(position)
    above = min(below + 1, values.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], position - below)


@dataclass(kw_only=True, slots=True)
class AffineGrid:
    """A fitted affine grid. Scales may turn negative in a refit; every verb allows that."""

    scale: Tensor  # [groups, out, units]
    zero_point: Tensor | None  # integer values in the scale's dtype
    offset: Tensor | None
    code_min: int
    code_max: int
    bits: int
    in_features: int
    group_size: int | None
    parameter_bits: int
    per_tensor: bool

    @property
    def shared(self) -> bool:
        """Whether one scale serves several rows, so that rows cannot choose for themselves."""
        return self.per_tensor

    def _shift(self) -> Tensor | None:
        """Real offset per unit, None for a symmetric grid."""
        return self.offset if self.zero_point is None else -self.scale * self.zero_point

    def _columns(self, parameter: Tensor) -> Tensor:
        """A parameter spread over the input columns: [groups, out, in] or broadcastable to it."""
        if parameter.shape[-1] == 1:
            return parameter
        assert self.group_size is not None
        return parameter.repeat_interleave(self.group_size, -1)[..., : self.in_features]

    def _at(self, parameter: Tensor, column: int | Tensor) -> Tensor:
        """A parameter at one column, or at column[g, r] of each row: [groups, out]."""
        if parameter.shape[-1] == 1:
            return parameter[..., 0]
        assert self.group_size is not None
        if isinstance(column, int):
            return parameter[..., column // self.group_size]
        return parameter.gather(-1, (column // self.group_size)[..., None])[..., 0]

    def round(self, W: Tensor) -> Tensor:
        shift = self._shift()
        x = (W if shift is None else W - self._columns(shift)) / self._columns(self.scale)
        return x.round().clamp(self.code_min, self.code_max).to(code_dtype(self))

    def values(self, codes: Tensor) -> Tensor:
        x = codes.to(self.scale.dtype)
        if self.zero_point is not None:
            return (x - self._columns(self.zero_point)) * self._columns(self.scale)
        x = x * self._columns(self.scale)
        return x if self.offset is None else x + self._columns(self.offset)

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        scale = self._at(self.scale, column)
        if self.zero_point is not None:
            zero = self._at(self.zero_point, column)
            codes = (w / scale + zero).round_().clamp_(self.code_min, self.code_max)
            return codes, (codes - zero) * scale
        offset = 0.0 if self.offset is None else self._at(self.offset, column)
        codes = ((w - offset) / scale).round_().clamp_(self.code_min, self.code_max)
        return codes, codes * scale + offset

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> AffineGrid:
        """Exact least squares for the scales (and float offsets) of each row, all its units jointly.

        The normal equations M θ = v of all units are coupled through H and cost O(out · in²) to form
        (decoupleQ, section 2.2). A row keeps its old parameters where the stored result would not lower its
        objective.
        """
        Q = codes.to(torch.float64)
        if self.zero_point is not None:
            Q = Q - self._columns(self.zero_point)
        basis = [Q] if self.offset is None else [Q, torch.ones_like(Q[:, :1])]
        M, v = normal_equations(basis, W.double(), H.double(), self.group_size)
        theta_old = self.scale if self.offset is None else torch.cat([self.scale, self.offset], -1)
        if self.per_tensor:  # rows add up
            M, v = M.sum((0, 1), keepdim=True), v.sum((0, 1), keepdim=True)
        theta = solve_ridged(M, v, theta_old.double())
        units = self.scale.shape[-1]
        scale = theta[..., :units].to(self.scale.dtype)
        offset = None if self.offset is None else theta[..., units:].to(self.scale.dtype)
        usable = torch.isfinite(theta).all(-1, keepdim=True) & (scale != 0).all(-1, keepdim=True)
        new = replace(
            self,
            scale=torch.where(usable, scale, self.scale),
            offset=None
            if offset is None or self.offset is None
            else torch.where(usable, offset, self.offset),
        ).as_stored()
        theta_new = new.scale if new.offset is None else torch.cat([new.scale, new.offset], -1)
        lower = quadratic(M, v, theta_new.double()) < quadratic(M, v, theta_old.double())
        return new.where(lower, self)

    def where(self, better: Tensor, other: AffineGrid) -> AffineGrid:
        return self.where_units(better[..., None], other)

    def where_units(self, better: Tensor, other: AffineGrid) -> AffineGrid:
        """Parameters of `self` where better [groups, out, units] (or broadcastable) is true, of `other`
        elsewhere.
        """

        def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.where(better, a, b)

        scale = torch.where(better, self.scale, other.scale)
        return replace(
            self,
            scale=scale,
            zero_point=pick(self.zero_point, other.zero_point),
            offset=pick(self.offset, other.offset),
        )

    def scaled(self, factor: float) -> AffineGrid:
        """The whole grid multiplied by `factor`: the range shrinks towards zero, codes keep their meaning."""
        offset = None if self.offset is None else self.offset * factor
        return replace(self, scale=self.scale * factor, offset=offset).as_stored()

    def replace_unit(self, unit: int, other: AffineGrid) -> AffineGrid:
        def put(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return None
            mine = mine.clone()
            mine[..., unit] = theirs[..., 0]
            return mine

        scale = put(self.scale, other.scale)
        assert scale is not None
        return replace(
            self,
            scale=scale,
            zero_point=put(self.zero_point, other.zero_point),
            offset=put(self.offset, other.offset),
        )

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale} if self.offset is None else {"scale": self.scale, "offset": self.offset}

    def with_parameters(self, parameters: dict[str, Tensor]) -> AffineGrid:
        return replace(self, scale=parameters["scale"], offset=parameters.get("offset"))

    def as_stored(self) -> AffineGrid:
        """The grid with scales and offsets exactly as a file would return them."""

        def stored(parameter: Tensor) -> Tensor:
            return unpack_parameter(*pack_parameter(parameter, self.parameter_bits)).to(parameter.dtype)

        scale = stored(self.scale)
        offset = None if self.offset is None else stored(self.offset)
        return replace(self, scale=scale, offset=offset)

    def _zero_point_bits(self) -> int:
        assert self.zero_point is not None
        inside = (self.zero_point >= 0) & (self.zero_point <= self.code_max)
        return self.bits if bool(inside.all()) else max(16, self.bits + 1)

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"codes": pack_codes(codes.to(torch.int32) - self.code_min, self.bits)}
        tensors["scale"], scale_exponent = pack_parameter(self.scale, self.parameter_bits)
        facts: dict[str, Any] = {
            "grid": "ptq.grids.affine.AffineGrid",
            "bits": self.bits,
            "symmetric": self.code_min < 0,
            "group_size": self.group_size,
            "shape": list(codes.shape),
            "parameter_shape": list(self.scale.shape),
            "parameter_bits": self.parameter_bits,
            "scale_exponent": scale_exponent,
            "per_tensor": self.per_tensor,
        }
        if self.zero_point is not None:
            width = self._zero_point_bits()
            shift = 0 if width == self.bits else 2**15
            facts["zero_point_bits"] = width
            tensors["zero_point"] = pack_codes(self.zero_point.round().to(torch.int32) + shift, width)
        if self.offset is not None:
            tensors["offset"], facts["offset_exponent"] = pack_parameter(self.offset, self.parameter_bits)
        return tensors, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[AffineGrid, Tensor]:
        """The grid and the codes that `storage` wrote."""
        bits = int(facts["bits"])
        shape: tuple[int, ...] = tuple(facts["shape"])
        unit_shape: tuple[int, ...] = tuple(facts["parameter_shape"])
        code_min = -(2 ** (bits - 1)) if facts["symmetric"] else 0
        codes = unpack_codes(tensors["codes"], bits, shape) + code_min
        scale = unpack_parameter(tensors["scale"], facts["scale_exponent"]).reshape(unit_shape)
        zero_point = offset = None
        if "zero_point" in tensors:
            width = int(facts["zero_point_bits"])
            shift = 0 if width == bits else 2**15
            zero_point = (unpack_codes(tensors["zero_point"], width, unit_shape) - shift).to(scale.dtype)
        if "offset" in tensors:
            offset = unpack_parameter(tensors["offset"], facts["offset_exponent"]).reshape(unit_shape)
        grid = cls(
            scale=scale,
            zero_point=zero_point,
            offset=offset,
            code_min=code_min,
            code_max=code_min + 2**bits - 1,
            bits=bits,
            in_features=shape[-1],
            group_size=facts["group_size"],
            parameter_bits=int(facts["parameter_bits"]),
            per_tensor=bool(facts["per_tensor"]),
        )
        return grid, codes.to(code_dtype(grid))

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        parameters = self.scale.numel() * self.parameter_bits
        if self.zero_point is not None:
            parameters += self.zero_point.numel() * self._zero_point_bits()
        if self.offset is not None:
            parameters += self.offset.numel() * self.parameter_bits
        return {"codes": codes.numel() * self.bits, "parameters": parameters}
