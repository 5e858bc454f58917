"""A grid of any kind times one scale per output row: value = row_scale · inner value.

With an entropy grid inside, whose steps serve all rows, these are the row scales of the published
Huffman-GPTQ (the row's largest magnitude) and WaterSIC (fitted once the codes are there).
Every verb is the inner grid's on W / row_scale; rows of the error are weighted by row_scale² in the refit.
Shapes: W, Ŵ, codes [groups, out, in]; row_scale [groups, out, 1]; H [groups, in, in].
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
class RowScaled:
    """A fitted inner grid with a scale per row, none of them zero."""

    inner: Grid
    row_scale: Tensor  # [groups, out, 1]
    row_bits: int  # stored width of a row scale, 16 or 32
    code_min: int = field(init=False)
    code_max: int = field(init=False)

    def __post_init__(self) -> None:
        self.code_min, self.code_max = self.inner.code_min, self.inner.code_max

    @property
    def shared(self) -> bool:
        """Whether the inner grid's parameters serve several rows; row scales never change in a solver."""
        return self.inner.shared

    def scaled(self, factor: float) -> RowScaled:
        return replace(self, inner=self.inner.scaled(factor))

    def round(self, W: Tensor) -> Tensor:
        return self.inner.round(W / self.row_scale)

    def values(self, codes: Tensor) -> Tensor:
        return self.inner.values(codes) * self.row_scale

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        scale = self.row_scale[..., 0]  # [groups, out]
        codes, values = self.inner.round_column(w / scale, column)
        return codes, values * scale

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> RowScaled:
        """The inner grid's refit where its rows are independent; as it is where they share parameters, which
        an unweighted refit would not serve.
        """
        if self.inner.shared:
            return self
        return replace(self, inner=self.inner.refit(codes, W / self.row_scale, H))

    def where(self, better: Tensor, other: RowScaled) -> RowScaled:
        """Rows of `self` where better [groups, out] is true; rows that share parameters stay together."""
        if self.inner.shared:
            return self if bool(better.all()) else other
        row_scale = torch.where(better[..., None], self.row_scale, other.row_scale)
        return replace(self, inner=self.inner.where(better, other.inner), row_scale=row_scale)

    def replace_unit(self, unit: int, other: RowScaled) -> RowScaled:
        """This grid with one unit's inner parameters from `other`, fitted with this grid's row scales."""
        return replace(self, inner=self.inner.replace_unit(unit, other.inner))

    def parameters(self) -> dict[str, Tensor]:
        return {**self.inner.parameters(), "row_scale": self.row_scale}

    def with_parameters(self, parameters: dict[str, Tensor]) -> RowScaled:
        own = {name: value for name, value in parameters.items() if name != "row_scale"}
        return replace(self, inner=self.inner.with_parameters(own), row_scale=parameters["row_scale"])

    def as_stored(self) -> RowScaled:
        stored = unpack_parameter(*pack_parameter(self.row_scale, self.row_bits))
        return replace(self, inner=self.inner.as_stored(), row_scale=stored.to(self.row_scale.dtype))

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The inner grid's tensors and one more; its facts under `inner`."""
        tensors, inner = self.inner.storage(codes)
        row_scale, exponent = pack_parameter(self.row_scale, self.row_bits)
        facts = {
            "grid": "ptq.grids.row_scaled.RowScaled",
            "bits": inner["bits"],
            "row_bits": self.row_bits,
            "row_exponent": exponent,
            "inner": inner,
        }
        if "decode_once" in inner:
            facts["decode_once"] = True
        return {**tensors, "row_scale": row_scale}, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[RowScaled, Tensor]:
        """The grid and the codes that `storage` wrote."""
        own = {name: tensor for name, tensor in tensors.items() if name != "row_scale"}
        inner_class: Any = get_class(facts["inner"]["grid"])
        inner, codes = inner_class.from_storage(own, facts["inner"])
        row_scale = unpack_parameter(tensors["row_scale"], facts["row_exponent"])
        return cls(inner=inner, row_scale=row_scale, row_bits=facts["row_bits"]), codes

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        inner = self.inner.storage_bits(codes)
        rows = self.row_scale.numel() * self.row_bits
        return {"codes": inner["codes"], "parameters": inner["parameters"] + rows}
