"""Signed powers with an exponent of their own: value = scale · sign(u) |u|^t, u = code / code_max.

The grid of PowerQuant (Yvinec et al., ICLR 2023), whose exponent is a = 1 / t: one for each layer, found by
Nelder–Mead on the weights' error as there, with any real value and trainable along with scales and codes
(NUPES, arXiv 2308.05600, of which only the summary is known to us). Gradients are safe: codes are fixed while
the exponent moves, so the logarithms are those of code_max numbers from 1 / code_max to 1, and 0 stays 0.
Differs: Nelder–Mead begins at the best of a few exponents; the scale of each unit is searched under each
exponent, not the largest magnitude; t is kept as log t, so that it stays positive.
Shapes: W, codes [groups, out, in]; scale [groups, out, units]; log_exponent [1, 1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import check_bits, check_group_size, code_dtype
from ptq.grids.least_squares import normal_equations, quadratic, solve_ridged
from ptq.storage import pack_codes, pack_parameter, unpack_codes, unpack_parameter

SAMPLED = 2**16  # weights that the exponent is sought on, whole rows
MOST_BITS = 8


@dataclass(kw_only=True, slots=True)
class Power:
    """How to fit a power grid to a weight matrix."""

    starts: list[float]  # exponents t, at the best of which Nelder–Mead begins
    least: float
    most: float
    evaluations: int  # of the error, at most; 0 keeps the best start
    shrink_steps: int  # factors on each unit's largest magnitude, from min_shrink to 1
    min_shrink: float
    parameter_bits: int  # 16 or 32

    def __post_init__(self) -> None:
        if not self.starts or not 0 < self.least <= min(self.starts) <= max(self.starts) <= self.most:
            raise InputError(
                "exponents must be positive and starts between least and most; "
                f"got {self.starts}, {self.least} and {self.most}"
            )
        if self.parameter_bits not in (16, 32):
            raise InputError(f"parameter_bits must be 16 or 32; got {self.parameter_bits}")
        if self.shrink_steps < 1 or not 0 < self.min_shrink <= 1 or self.evaluations < 0:
            raise InputError(
                "shrink_steps must be at least 1, min_shrink in (0, 1] and evaluations not negative; "
                f"got {self.shrink_steps}, {self.min_shrink} and {self.evaluations}"
            )

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        if not 2 <= check_bits(bits) <= MOST_BITS:
            raise InputError(
                f"bits must be from 2 to {MOST_BITS} on a power grid, which has a zero and as many codes on "
                f"both sides of it; got {bits:g}; take an affine grid"
            )
        check_group_size(group_size)

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> PowerGrid:
        """Grid fitted to W [groups, out, in]; H is not looked at."""
        self.check(bits, group_size)
        rows = W.reshape(1, -1, W.shape[-1])
        every = max(1, math.ceil(W.numel() / SAMPLED))
        some = rows[:, ::every].contiguous()

        def error(logarithm: Any) -> float:
            t = min(max(float(logarithm[0]), math.log(self.least)), math.log(self.most))
            return float(self._scaled(some, bits, group_size, t)[1].sum())

        best = math.log(self.starts[0])
        if len(self.starts) > 1:
            best = min((math.log(t) for t in self.starts), key=lambda logarithm: error([logarithm]))
        if self.evaluations > 0:
            simplex = [[best], [best + 0.1 if best + 0.1 <= math.log(self.most) else best - 0.1]]
            options = {"maxfev": self.evaluations, "xatol": 1e-3, "fatol": 0.0, "initial_simplex": simplex}
            found = minimize(error, [best], method="Nelder-Mead", options=options)
            best = min(max(float(found.x[0]), math.log(self.least)), math.log(self.most))
        return self._scaled(W, bits, group_size, best)[0]

    def _scaled(
        self, W: Tensor, bits: float, group_size: int | None, logarithm: float
    ) -> tuple[PowerGrid, Tensor]:
        """The grid of least error for this exponent, and the error of each unit [groups, out, units]."""
        size = group_size or W.shape[-1]
        high = torch.stack([u.abs().amax(-1) for u in W.split(size, dim=-1)], -1)
        high = torch.where(high > 0, high, torch.ones_like(high))
        best = best_error = None
        for k in range(self.shrink_steps):
            shrink = 1 - k * (1 - self.min_shrink) / self.shrink_steps
            grid = PowerGrid(
                scale=shrink * high,
                log_exponent=W.new_full((1, 1, 1), logarithm),
                bits=int(bits),
                in_features=W.shape[-1],
                group_size=group_size,
                parameter_bits=self.parameter_bits,
            ).as_stored()
            square = (W - grid.values(grid.round(W))).square()
            error = torch.stack([e.sum(-1) for e in square.split(size, dim=-1)], -1)
            if best is None or best_error is None:
                best, best_error = grid, error
            else:
                scale = torch.where(error < best_error, grid.scale, best.scale)
                best, best_error = replace(best, scale=scale), torch.minimum(error, best_error)
        assert best is not None
        assert best_error is not None
        return best, best_error

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        self.check(bits, group_size)
        units = -(-W.shape[-1] // (group_size or W.shape[-1]))
        parameters = (W.shape[0] * W.shape[1] * units + 1) * self.parameter_bits
        return {"codes": W.numel() * int(bits), "parameters": parameters}


@dataclass(kw_only=True, slots=True)
class PowerGrid:
    """A fitted power grid. Scales may turn negative in a refit; every verb allows that."""

    scale: Tensor  # [groups, out, units]
    log_exponent: Tensor  # [1, 1, 1]
    bits: int
    in_features: int
    group_size: int | None
    parameter_bits: int
    code_min: int = field(init=False)
    code_max: int = field(init=False)

    def __post_init__(self) -> None:
        self.code_max = 2 ** (self.bits - 1) - 1
        self.code_min = -self.code_max

    @property
    def shared(self) -> bool:
        """Rows share the exponent, which no solver moves; what solvers move is each row's own."""
        return False

    def levels(self) -> Tensor:
        """|u|^t with u's sign for every code, [2 · code_max + 1], increasing."""
        u = torch.arange(1, self.code_max + 1, device=self.scale.device, dtype=self.scale.dtype)
        upper = torch.exp(self.log_exponent.reshape(()).exp() * (u / self.code_max).log())
        return torch.cat([-upper.flip(0), upper.new_zeros(1), upper])

    def _columns(self) -> Tensor:
        """Scales spread over the input columns."""
        if self.scale.shape[-1] == 1:
            return self.scale
        assert self.group_size is not None
        return self.scale.repeat_interleave(self.group_size, -1)[..., : self.in_features]

    def _at(self, column: int | Tensor) -> Tensor:
        """Scales at one column, or at column[g, r] of each row: [groups, out]."""
        if self.scale.shape[-1] == 1:
            return self.scale[..., 0]
        assert self.group_size is not None
        if isinstance(column, int):
            return self.scale[..., column // self.group_size]
        return self.scale.gather(-1, (column // self.group_size)[..., None])[..., 0]

    def _nearest(self, x: Tensor) -> Tensor:
        """Index of the level nearest to x, int64."""
        levels = self.levels().detach()
        return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, right=True)

    def round(self, W: Tensor) -> Tensor:
        index = self._nearest((W / _divisor(self._columns())).detach())
        return (index + self.code_min).to(code_dtype(self))

    def values(self, codes: Tensor) -> Tensor:
        return self.levels()[codes.long() - self.code_min] * self._columns()

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        scale = self._at(column)
        index = self._nearest(w / _divisor(scale))
        return index + self.code_min, self.levels()[index] * scale

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> PowerGrid:
        """Exact least squares for the scales of each row, all its units jointly; the exponent stays.

        A row keeps its old scales where the stored result would not lower its objective.
        """
        g = self.levels()[codes.long() - self.code_min].double()
        M, v = normal_equations([g], W.double(), H.double(), self.group_size)
        theta = solve_ridged(M, v, self.scale.double())
        usable = torch.isfinite(theta).all(-1, keepdim=True) & (theta != 0).all(-1, keepdim=True)
        scale = torch.where(usable, theta.to(self.scale.dtype), self.scale)
        new = replace(self, scale=scale).as_stored()
        return new.where(quadratic(M, v, new.scale.double()) < quadratic(M, v, self.scale.double()), self)

    def where(self, better: Tensor, other: PowerGrid) -> PowerGrid:
        """Rows of `self` or `other`, which must have the same exponent: it serves all rows."""
        if not torch.equal(self.log_exponent, other.log_exponent):
            raise ValueError("rows of grids with different exponents cannot be mixed")
        return replace(self, scale=torch.where(better[..., None], self.scale, other.scale))

    def scaled(self, factor: float) -> PowerGrid:
        return replace(self, scale=self.scale * factor).as_stored()

    def replace_unit(self, unit: int, other: PowerGrid) -> PowerGrid:
        """This grid with one unit's scales from `other`, at this grid's exponent."""
        scale = self.scale.clone()
        scale[..., unit] = other.scale[..., 0]
        return replace(self, scale=scale)

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "log_exponent": self.log_exponent}

    def with_parameters(self, parameters: dict[str, Tensor]) -> PowerGrid:
        return replace(self, scale=parameters["scale"], log_exponent=parameters["log_exponent"])

    def as_stored(self) -> PowerGrid:
        """The grid with scales and exponent exactly as a file would return them."""

        def stored(parameter: Tensor) -> Tensor:
            return unpack_parameter(*pack_parameter(parameter, self.parameter_bits)).to(parameter.dtype)

        return replace(self, scale=stored(self.scale), log_exponent=stored(self.log_exponent))

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        scale, scale_exponent = pack_parameter(self.scale, self.parameter_bits)
        power, power_exponent = pack_parameter(self.log_exponent, self.parameter_bits)
        facts: dict[str, Any] = {
            "grid": "ptq.grids.power.PowerGrid",
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(codes.shape),
            "parameter_shape": list(self.scale.shape),
            "parameter_bits": self.parameter_bits,
            "scale_exponent": scale_exponent,
            "power_exponent": power_exponent,
        }
        packed = pack_codes(codes.to(torch.int32) - self.code_min, self.bits)
        return {"codes": packed, "scale": scale, "log_exponent": power}, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[PowerGrid, Tensor]:
        """The grid and the codes that `storage` wrote."""
        shape, bits = tuple(facts["shape"]), int(facts["bits"])
        scale = unpack_parameter(tensors["scale"], facts["scale_exponent"])
        grid = cls(
            scale=scale.reshape(tuple(facts["parameter_shape"])),
            log_exponent=unpack_parameter(tensors["log_exponent"], facts["power_exponent"]).reshape(1, 1, 1),
            bits=bits,
            in_features=shape[-1],
            group_size=facts["group_size"],
            parameter_bits=int(facts["parameter_bits"]),
        )
        return grid, (unpack_codes(tensors["codes"], bits, shape) + grid.code_min).to(torch.int16)

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        parameters = (self.scale.numel() + 1) * self.parameter_bits
        return {"codes": codes.numel() * self.bits, "parameters": parameters}


def _divisor(scale: Tensor) -> Tensor:
    """The scale where it can be divided by, 1 elsewhere."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
