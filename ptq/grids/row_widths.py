"""A grid of any kind whose rows have codes of different widths: one inner grid for the rows of each width.

Every verb is the inner grid's on its own rows. Rows of one width are given to it together: as [1, rows, in]
with the Gram matrix that they share, or, where the layer is a convolution in groups, as [rows, 1, in] with a
Gram matrix each. Each row's width is stored, as its place among the widths that rows may have.
Shapes: W, codes [groups, out, in]; rows [groups, out].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import get_class
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid, code_dtype
from ptq.storage import pack_codes, unpack_codes

if TYPE_CHECKING:
    from ptq.methods.method import GridSpec


@dataclass(kw_only=True, slots=True, eq=False)
class RowWidths:
    """How to fit the grid: the rows' widths, and how to fit the grid of each width."""

    inner: GridSpec
    rows: Tensor  # [groups, out] bits of each row's codes
    widths: list[int]  # those that a row may have, increasing

    def __post_init__(self) -> None:
        strangers = sorted({int(b) for b in self.rows.unique()} - set(self.widths))
        if strangers or not self.widths or self.widths != sorted(set(self.widths)):
            raise ValueError(
                f"rows have widths {strangers} that are not among {self.widths}, or these repeat"
            )

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when a row's width cannot be had on the inner grid; `bits` is not looked at."""
        for width in self.widths:
            self.inner.check(width, group_size)

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> RowWidthsGrid:
        """Grid fitted to W [groups, out, in], whose rows keep their own widths whatever `bits` is."""
        self._check_shape(W)
        places = _places(self.rows, self.widths)
        grids = {}
        for width, place in places.items():
            own = None if H is None else place.gram(H)
            grids[width] = self.inner.fit(place.take(W), width, group_size, own)
        return RowWidthsGrid(grids=grids, rows=self.rows, widths=self.widths, places=places)

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        self._check_shape(W)
        total = {"codes": 0, "parameters": self.rows.numel() * _index_bits(self.widths)}
        for width, place in _places(self.rows, self.widths).items():
            for kind, size in self.inner.size(place.take(W), width, group_size).items():
                total[kind] += size
        return total

    def _check_shape(self, W: Tensor) -> None:
        if W.shape[:2] != self.rows.shape:
            raise InputError(
                f"widths are known for {list(self.rows.shape)} rows, and the layer has {list(W.shape[:2])}"
            )


@dataclass(kw_only=True, slots=True)
class _Place:
    """Where the rows of one width are: numbers [n] of rows among all of [groups, out], in order."""

    index: Tensor
    shape: tuple[int, int]  # groups, out

    def take(self, x: Tensor) -> Tensor:
        """Their part of x [groups, out, …]: [1, n, …], or [n, 1, …] where there are several groups."""
        if len(self.index) == self.shape[0] * self.shape[1] and self.shape[0] == 1:
            return x
        part = x.reshape(-1, *x.shape[2:])[self.index]
        return part[None] if self.shape[0] == 1 else part[:, None]

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write their part of x [groups, out, …], which is contiguous."""
        x.view(-1, *x.shape[2:])[self.index] = part.reshape(-1, *part.shape[2:]).to(x.dtype)

    def gram(self, H: Tensor) -> Tensor:
        """H [groups, in, in] as `take` lays the rows out."""
        return H if self.shape[0] == 1 else H[self.index // self.shape[1]]


def _places(rows: Tensor, widths: list[int]) -> dict[int, _Place]:
    groups, out = rows.shape
    found = {w: torch.nonzero(rows.flatten() == w)[:, 0] for w in widths}
    return {w: _Place(index=index, shape=(groups, out)) for w, index in found.items() if len(index)}


def _index_bits(widths: list[int]) -> int:
    return (len(widths) - 1).bit_length()


@dataclass(kw_only=True, slots=True)
class RowWidthsGrid:
    """A fitted grid for each width that occurs."""

    grids: dict[int, Grid]
    rows: Tensor  # [groups, out]
    widths: list[int]
    places: dict[int, _Place] = field(repr=False)
    code_min: int = field(init=False)
    code_max: int = field(init=False)

    def __post_init__(self) -> None:
        self.code_min = min(grid.code_min for grid in self.grids.values())
        self.code_max = max(grid.code_max for grid in self.grids.values())

    @property
    def shared(self) -> bool:
        """Whether the rows of a width share parameters, so that rows cannot choose for themselves."""
        return any(grid.shared for grid in self.grids.values())

    def code_limits(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest code of each row, both [groups, out, 1]."""

        def limit(name: str) -> Tensor:
            return self._joined(
                lambda place, grid: torch.full_like(place.take(self.rows)[..., None], getattr(grid, name))
            )

        return limit("code_min"), limit("code_max")

    def code_span(self) -> Tensor:
        """Codes from a row's least to its greatest, [groups, out, 1]."""
        least, greatest = self.code_limits()
        return greatest - least

    def _joined(self, part: Callable[[_Place, Grid], Tensor]) -> Tensor:
        """The rows' parts put together, in the type of the first."""
        parts = [(place, part(place, self.grids[width])) for width, place in self.places.items()]
        first = parts[0][1]
        whole = first.new_empty(*self.rows.shape, *first.shape[2:])
        for place, values in parts:
            place.put(whole, values)
        return whole

    def _mapped(self, change: Callable[[int, _Place, Grid], Grid]) -> RowWidthsGrid:
        grids = {width: change(width, place, self.grids[width]) for width, place in self.places.items()}
        return replace(self, grids=grids)

    def scaled(self, factor: float) -> RowWidthsGrid:
        return self._mapped(lambda width, place, grid: grid.scaled(factor))

    def round(self, W: Tensor) -> Tensor:
        return self._joined(lambda place, grid: grid.round(place.take(W)).to(code_dtype(self)))

    def values(self, codes: Tensor) -> Tensor:
        """Ŵ; a code beyond its row's range counts as the end of the range, here and elsewhere."""

        def own(place: _Place, grid: Grid) -> Tensor:
            part = _within(grid, place.take(codes))
            return grid.values(part).expand(*part.shape)

        return self._joined(own)

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        codes, values = torch.empty_like(w), torch.empty_like(w)
        for width, place in self.places.items():
            where = column if isinstance(column, int) else place.take(column.expand(*self.rows.shape))
            code, value = self.grids[width].round_column(place.take(w), where)
            place.put(codes, code)
            place.put(values, value)
        return codes, values

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> RowWidthsGrid:
        return self._mapped(
            lambda width, place, grid: grid.refit(
                _within(grid, place.take(codes)), place.take(W), place.gram(H)
            )
        )

    def where(self, better: Tensor, other: RowWidthsGrid) -> RowWidthsGrid:
        better = better.expand(*self.rows.shape)
        return self._mapped(lambda width, place, grid: grid.where(place.take(better), other.grids[width]))

    def replace_unit(self, unit: int, other: RowWidthsGrid) -> RowWidthsGrid:
        return self._mapped(lambda width, place, grid: grid.replace_unit(unit, other.grids[width]))

    def parameters(self) -> dict[str, Tensor]:
        """Those of each width's grid, named w3_scale and so on."""
        return {
            f"w{width}_{name}": value
            for width, grid in self.grids.items()
            for name, value in grid.parameters().items()
        }

    def with_parameters(self, parameters: dict[str, Tensor]) -> RowWidthsGrid:
        return self._mapped(lambda width, place, grid: grid.with_parameters(_own(parameters, width)))

    def as_stored(self) -> RowWidthsGrid:
        return self._mapped(lambda width, place, grid: grid.as_stored())

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Each inner grid's tensors, and the rows' widths; the inner facts under `inner`."""
        tensors: dict[str, Tensor] = {}
        inner: dict[str, Any] = {}
        for width, place in self.places.items():
            grid = self.grids[width]
            own, inner[str(width)] = grid.storage(_within(grid, place.take(codes)))
            tensors |= {f"w{width}_{name}": tensor for name, tensor in own.items()}
        if _index_bits(self.widths):
            place_of = torch.searchsorted(torch.tensor(self.widths, device=self.rows.device), self.rows)
            tensors["row_widths"] = pack_codes(place_of, _index_bits(self.widths))
        facts = {
            "grid": "ptq.grids.row_widths.RowWidthsGrid",
            "bits": float(self.rows.double().mean()),
            "widths": self.widths,
            "shape": list(codes.shape),
            "inner": inner,
        }
        if any("decode_once" in facts for facts in inner.values()):
            facts["decode_once"] = True
        return tensors, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[RowWidthsGrid, Tensor]:
        """The grid and the codes that `storage` wrote."""
        widths: list[int] = [int(w) for w in facts["widths"]]
        shape: tuple[int, ...] = tuple(facts["shape"])
        device = next(iter(tensors.values())).device
        rows = torch.full(shape[:2], widths[0], device=device)
        if "row_widths" in tensors:
            place_of = unpack_codes(tensors["row_widths"], _index_bits(widths), shape[:2]).long()
            if int(place_of.max()) >= len(widths):
                raise InputError("the stored row widths are damaged")
            rows = torch.tensor(widths, device=device)[place_of]
        places = _places(rows, widths)
        grids, parts = {}, {}
        for width in places:
            inner_class: Any = get_class(facts["inner"][str(width)]["grid"])
            grids[width], parts[width] = inner_class.from_storage(
                _own(tensors, width), facts["inner"][str(width)]
            )
        grid = cls(grids=grids, rows=rows, widths=widths, places=places)
        codes = torch.empty(shape, dtype=code_dtype(grid), device=device)
        for width, place in places.items():
            place.put(codes, parts[width])
        return grid, codes

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        total = {"codes": 0, "parameters": self.rows.numel() * _index_bits(self.widths)}
        for width, place in self.places.items():
            for kind, size in self.grids[width].storage_bits(place.take(codes)).items():
                total[kind] += size
        return total


def _within(grid: Grid, codes: Tensor) -> Tensor:
    """Codes inside the grid's range: solvers that clip by themselves know the widest row's range only."""
    return codes.clamp(grid.code_min, grid.code_max)


def _own(tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """The tensors of one width's grid under the names that it gave them."""
    prefix = f"w{width}_"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
