"""A grid of any kind times one scale per input column: value = column_scale · inner value.

With an affine or symmetric inner grid this is the doubly channel-wise grid (rows × columns); AWQ's input
scales s are its case column_scale = 1 / s.
Every verb is the inner grid's on W / column_scale: Ŵ = V diag(c) has the error
tr((W − Ŵ) H (W − Ŵ)ᵀ) = tr((W diag(c)⁻¹ − V) diag(c) H diag(c) (…)ᵀ).
Shapes: W, V, Ŵ, codes [groups, out, in]; column_scale c [groups, 1, in]; H [groups, in, in].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor

from ptq.grids.grid import Grid
from ptq.storage import pack_parameter, unpack_parameter


@dataclass(kw_only=True, slots=True)
class ColumnScaled:
    """A fitted inner grid with a scale per input column, none of them zero."""

    inner: Grid
    column_scale: Tensor  # [groups, 1, in]
    column_bits: int  # stored width of a column scale, 16 or 32
    code_min: int = field(init=False)
    code_max: int = field(init=False)

    def __post_init__(self) -> None:
        self.code_min, self.code_max = self.inner.code_min, self.inner.code_max

    @property
    def shared(self) -> bool:
        """Whether the inner grid's parameters serve several rows; column scales always do, and never change
        in a solver.
        """
        return self.inner.shared

    def scaled(self, factor: float) -> ColumnScaled:
        return replace(self, inner=self.inner.scaled(factor))

    def round(self, W: Tensor) -> Tensor:
        return self.inner.round(W / self.column_scale)

    def values(self, codes: Tensor) -> Tensor:
        return self.inner.values(codes) * self.column_scale

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(column, int):
            scale = self.column_scale[..., column]  # [groups, 1]
        else:
            scale = self.column_scale[:, 0].gather(-1, column)  # [groups, out]
        codes, values = self.inner.round_column(w / scale, column)
        return codes, values * scale

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> ColumnScaled:
        """The inner grid's refit for column scales as they are."""
        scale = self.column_scale.double()
        inner = self.inner.refit(codes, W / self.column_scale, H * scale * scale.mT)
        return replace(self, inner=inner)

    def where(self, better: Tensor, other: ColumnScaled) -> ColumnScaled:
        """Rows of `self` or `other`, which must have the same column scales: they serve all rows."""
        if not torch.equal(self.column_scale, other.column_scale):
            raise ValueError("rows of grids with different column scales cannot be mixed")
        return replace(self, inner=self.inner.where(better, other.inner))

    def replace_unit(self, unit: int, other: ColumnScaled) -> ColumnScaled:
        """This grid with one unit's inner parameters from `other`, fitted with this grid's column scales."""
        return replace(self, inner=self.inner.replace_unit(unit, other.inner))

    def parameters(self) -> dict[str, Tensor]:
        return {**self.inner.parameters(), "column_scale": self.column_scale}

    def with_parameters(self, parameters: dict[str, Tensor]) -> ColumnScaled:
        own = {name: value for name, value in parameters.items() if name != "column_scale"}
        return replace(self, inner=self.inner.with_parameters(own), column_scale=parameters["column_scale"])

    def as_stored(self) -> ColumnScaled:
        stored = unpack_parameter(*pack_parameter(self.column_scale, self.column_bits))
        return replace(self, inner=self.inner.as_stored(), column_scale=stored.to(self.column_scale.dtype))

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The inner grid's tensors and one more; its facts under `inner`."""
        tensors, inner = self.inner.storage(codes)
        column_scale, exponent = pack_parameter(self.column_scale, self.column_bits)
        facts = {
            "grid": "ptq.grids.column_scaled.ColumnScaled",
            "bits": inner["bits"],
            "column_bits": self.column_bits,
            "column_exponent": exponent,
            "inner": inner,
        }
        if "decode_once" in inner:
            facts["decode_once"] = True
        return {**tensors, "column_scale": column_scale}, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[ColumnScaled, Tensor]:
        """The grid and the codes that `storage` wrote."""
        own = {name: tensor for name, tensor in tensors.items() if name != "column_scale"}
        inner_class: Any = get_class(facts["inner"]["grid"])
        inner, codes = inner_class.from_storage(own, facts["inner"])
        column_scale = unpack_parameter(tensors["column_scale"], facts["column_exponent"])
        return cls(inner=inner, column_scale=column_scale, column_bits=facts["column_bits"]), codes

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        inner = self.inner.storage_bits(codes)
        columns = self.column_scale.numel() * self.column_bits
        return {"codes": inner["codes"], "parameters": inner["parameters"] + columns}
