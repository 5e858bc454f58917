"""A grid of any kind times one scale per output row or per input column: value = scale · inner value.

Rows: with an entropy grid inside, whose steps serve all rows, these are the row scales of the published
Huffman-GPTQ (the row's largest magnitude) and WaterSIC (fitted once the codes are there).
Columns: with an affine or symmetric grid inside this is the doubly channel-wise grid (rows × columns); AWQ's
input scales s are its case scale = 1 / s.
Every verb is the inner grid's on W / scale, and none changes the scale.
Shapes: W, V, Ŵ, codes [groups, out, in]; H [groups, in, in].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from hydra.utils import get_class
from torch import Tensor

from ptq.grids.grid import Grid
from ptq.storage import pack_parameter, unpack_parameter


@dataclass(kw_only=True, slots=True)
class Scaled(ABC):
    """A fitted inner grid and scales, none of them zero, that broadcast against its values."""

    inner: Grid
    scale: Tensor
    scale_bits: int  # stored width of a scale, 16 or 32
    code_min: int = field(init=False)
    code_max: int = field(init=False)

    scale_name: ClassVar[str]  # among the parameters and in the file

    def __post_init__(self) -> None:
        self.code_min, self.code_max = self.inner.code_min, self.inner.code_max

    @property
    def shared(self) -> bool:
        """Whether the inner grid's parameters serve several rows."""
        return self.inner.shared

    def scaled(self, factor: float) -> Self:
        return replace(self, inner=self.inner.scaled(factor))

    def round(self, W: Tensor) -> Tensor:
        return self.inner.round(W / self.scale)

    def values(self, codes: Tensor) -> Tensor:
        return self.inner.values(codes) * self.scale

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        scale = self._column(column)
        codes, values = self.inner.round_column(w / scale, column)
        return codes, values * scale

    @abstractmethod
    def _column(self, column: int | Tensor) -> Tensor:
        """The scales of one column, or of one column for each row: [groups, out] or broadcasting to it."""

    @abstractmethod
    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> Self:
        """The inner grid's refit for the scales as they are."""

    @abstractmethod
    def where(self, better: Tensor, other: Self) -> Self:
        """Rows of `self` where better [groups, out] is true."""

    def replace_unit(self, unit: int, other: Self) -> Self:
        """This grid with one unit's inner parameters from `other`, fitted with this grid's scales."""
        return replace(self, inner=self.inner.replace_unit(unit, other.inner))

    def parameters(self) -> dict[str, Tensor]:
        return {**self.inner.parameters(), self.scale_name: self.scale}

    def with_parameters(self, parameters: dict[str, Tensor]) -> Self:
        own = {name: value for name, value in parameters.items() if name != self.scale_name}
        return replace(self, inner=self.inner.with_parameters(own), scale=parameters[self.scale_name])

    def as_stored(self) -> Self:
        stored = unpack_parameter(*pack_parameter(self.scale, self.scale_bits))
        return replace(self, inner=self.inner.as_stored(), scale=stored.to(self.scale.dtype))

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The inner grid's tensors and one more; its facts under `inner`."""
        tensors, inner = self.inner.storage(codes)
        scale, exponent = pack_parameter(self.scale, self.scale_bits)
        facts = {
            "grid": f"{type(self).__module__}.{type(self).__name__}",
            "bits": inner["bits"],
            "scale_bits": self.scale_bits,
            "scale_exponent": exponent,
            "inner": inner,
        }
        if "decode_once" in inner:
            facts["decode_once"] = True
        return {**tensors, self.scale_name: scale}, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[Self, Tensor]:
        """The grid and the codes that `storage` wrote."""
        own = {name: tensor for name, tensor in tensors.items() if name != cls.scale_name}
        inner_class: Any = get_class(facts["inner"]["grid"])
        inner, codes = inner_class.from_storage(own, facts["inner"])
        scale = unpack_parameter(tensors[cls.scale_name], facts["scale_exponent"])
        return cls(inner=inner, scale=scale, scale_bits=facts["scale_bits"]), codes

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        inner = self.inner.storage_bits(codes)
        return {
            "codes": inner["codes"],
            "parameters": inner["parameters"] + self.scale.numel() * self.scale_bits,
        }


class RowScaled(Scaled):
    """scale [groups, out, 1]."""

    scale_name = "row_scale"

    def _column(self, column: int | Tensor) -> Tensor:
        return self.scale[..., 0]

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> RowScaled:
        """Where rows share the inner parameters it stays: the refit would have to weigh each row's error by
        its scale².
        """
        if self.inner.shared:
            return self
        return replace(self, inner=self.inner.refit(codes, W / self.scale, H))

    def where(self, better: Tensor, other: RowScaled) -> RowScaled:
        """Rows of `self` where better [groups, out] is true; rows that share parameters stay together."""
        if self.inner.shared:
            return self if bool(better.all()) else other
        scale = torch.where(better[..., None], self.scale, other.scale)
        return replace(self, inner=self.inner.where(better, other.inner), scale=scale)


class ColumnScaled(Scaled):
    """scale c [groups, 1, in].

    The error of Ŵ = V diag(c) is that of V on W diag(c)⁻¹ under diag(c) H diag(c).
    """

    scale_name = "column_scale"

    def _column(self, column: int | Tensor) -> Tensor:
        if isinstance(column, int):
            return self.scale[..., column]  # [groups, 1]
        return self.scale[:, 0].gather(-1, column)  # [groups, out]

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> ColumnScaled:
        scale = self.scale.double()
        return replace(self, inner=self.inner.refit(codes, W / self.scale, H * scale * scale.mT))

    def where(self, better: Tensor, other: ColumnScaled) -> ColumnScaled:
        """Rows of `self` or `other`, which must have the same scales: they serve all rows."""
        if not torch.equal(self.scale, other.scale):
            raise ValueError("rows of grids with different column scales cannot be mixed")
        return replace(self, inner=self.inner.where(better, other.inner))
