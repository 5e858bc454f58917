"""Level-table grids: value = scale · g(v_code; t) + offset, with g from a pool of shapes.

scale is the range of a unit and the levels g lie in [−1, 1]. Which function of the pool a unit uses and which
of its values of t are stored as small integers; the tables follow from them and the configuration alone.
Every member is a table, so one nearest-level search and one gather serve them all.
Shapes: W, codes [groups, out, in]; scale, offset [groups, out, units] ([1, 1, 1] per tensor); function, t the
same or 1 in any dimension that shares them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ptq.grids.affine import normal_equations, solve_ridged
from ptq.grids.grid import code_dtype
from ptq.grids.shapes import Function, Layout, table
from ptq.storage import pack_codes, pack_parameter, unpack_codes, unpack_parameter


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The functions a grid may use, with `steps` values of t each, as tables for codes of `bits` bits."""

    functions: tuple[Function, ...]
    steps: int
    layout: Layout
    bits: int

    @property
    def num_levels(self) -> int:
        return int(self.tables(torch.float64, torch.device("cpu")).shape[-1])

    @property
    def t_steps(self) -> int:
        """Values of t that the table holds: 1 where no function has a t."""
        return int(self.tables(torch.float64, torch.device("cpu")).shape[1])

    @property
    def function_bits(self) -> int:
        return (len(self.functions) - 1).bit_length()

    @property
    def t_bits(self) -> int:
        return (self.t_steps - 1).bit_length()

    def tables(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[functions, t, levels], increasing; a function without t repeats its levels."""
        return _tables(self, dtype, device)


@lru_cache(maxsize=64)
def _tables(pool: Pool, dtype: torch.dtype, device: torch.device) -> Tensor:
    tables = [table(f, pool.bits, pool.layout, pool.steps) for f in pool.functions]
    most = max(len(levels) for levels in tables)
    return torch.stack([levels.expand(most, -1) for levels in tables]).to(device, dtype)


@dataclass(kw_only=True, slots=True)
class LevelGrid:
    """A fitted level-table grid. Scales may turn negative in a refit; every verb allows that, and 0 too."""

    scale: Tensor  # [groups, out, units]
    offset: Tensor | None
    function: Tensor  # int64 index into pool.functions
    t: Tensor  # int64 index into the function's values of t
    pool: Pool
    in_features: int
    group_size: int | None
    parameter_bits: int
    per_tensor: bool
    code_min: int = field(init=False, default=0)
    code_max: int = field(init=False)
    # the unit that columns were last rounded in: its number, levels and where the nearest level changes
    visited: tuple[int, Tensor, Tensor] | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.code_max = self.pool.num_levels - 1

    @property
    def shared(self) -> bool:
        """Whether one scale serves several rows, so that rows cannot choose for themselves."""
        return self.per_tensor

    def _tables(self) -> Tensor:
        """[tables, levels] in the scale's dtype: row `table_index()` is a unit's table."""
        return self.pool.tables(self.scale.dtype, self.scale.device).flatten(0, 1)

    def table_index(self) -> Tensor:
        """Number of each unit's table among all of the pool, in the broadcast shape of function and t."""
        return self.function * self.pool.t_steps + self.t

    def _columns(self, parameter: Tensor) -> Tensor:
        """A parameter spread over the input columns: [groups, out, in] or broadcastable to it."""
        if parameter.shape[-1] == 1:
            return parameter
        assert self.group_size is not None
        return parameter.repeat_interleave(self.group_size, -1)[..., : self.in_features]

    def _at(self, parameter: Tensor, column: int | Tensor) -> Tensor:
        """A parameter at one column, or at column[g, r] of each row: broadcastable to [groups, out]."""
        if parameter.shape[-1] == 1:
            return parameter[..., 0]
        assert self.group_size is not None
        if isinstance(column, int):
            return parameter[..., column // self.group_size]
        parameter = parameter.expand(*column.shape, -1)
        return parameter.gather(-1, (column // self.group_size)[..., None])[..., 0]

    def round(self, W: Tensor) -> Tensor:
        x = W if self.offset is None else W - self._columns(self.offset)
        x = x / self._columns(_divisor(self.scale))
        tables, index = self._tables(), self.table_index()
        if index.numel() == 1:
            codes = torch.bucketize(x, _middles(tables[index.flatten()][0]), right=True)
        else:
            x = split_units(x, self._width(index))
            # a search in each unit's table: at 16 levels and more quicker than comparing level by level
            middles = _middles(tables)[index].expand(*x.shape[:-1], -1).contiguous()
            codes = torch.searchsorted(middles, x, right=True).flatten(-2)[..., : W.shape[-1]]
        return codes.to(code_dtype(self))

    def _width(self, parameter: Tensor) -> int:
        """Inputs that share one entry of the parameter."""
        if parameter.shape[-1] == 1:
            return self.in_features
        assert self.group_size is not None
        return self.group_size

    def levels(self, codes: Tensor) -> Tensor:
        """g of each code, [groups, out, in], before scale and offset."""
        tables, index = self._tables(), self.table_index()
        if index.numel() == 1:
            return tables[index.flatten()][0][codes.long()]
        return tables.flatten()[codes + self._columns(index) * tables.shape[-1]]

    def values(self, codes: Tensor) -> Tensor:
        x = self.levels(codes) * self._columns(self.scale)
        return x if self.offset is None else x + self._columns(self.offset)

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        scale = self._at(self.scale, column)
        offset = 0.0 if self.offset is None else self._at(self.offset, column)
        levels, middles = self._tables_at(column)
        x = (w - offset) / _divisor(scale)
        if levels.dim() == 1:
            codes = torch.bucketize(x, middles, right=True)
            return codes, levels[codes] * scale + offset
        codes = torch.searchsorted(middles, x[..., None], right=True)
        return codes[..., 0], levels.gather(-1, codes)[..., 0] * scale + offset

    def _tables_at(self, column: int | Tensor) -> tuple[Tensor, Tensor]:
        """Levels and where the nearest one changes, for each row at its column: [groups, out, levels and one
        less], or one table for all rows.
        """
        units = max(self.function.shape[-1], self.t.shape[-1])
        if isinstance(column, Tensor) and units > 1:
            levels = self._tables()[self._at(self.table_index(), column)].expand(*column.shape, -1)
            return levels, _middles(levels)
        unit = 0 if isinstance(column, Tensor) or units == 1 else column // self._width(self.scale)
        if self.visited is None or self.visited[0] != unit:
            index = self.table_index()[..., unit]
            levels = self._tables()[index.flatten()][0] if index.numel() == 1 else self._tables()[index]
            if index.numel() > 1:
                levels = levels.expand(*self.scale.shape[:2], -1).contiguous()
            self.visited = unit, levels, _middles(levels)
        return self.visited[1:]

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> LevelGrid:
        """Exact least squares for the scales and offsets of each row, all its units jointly; function and t
        stay.

        A row keeps its old parameters where the stored result would not lower its objective.
        """
        G = self.levels(codes).double()
        basis = [G] if self.offset is None else [G, torch.ones_like(G)]
        M, v = normal_equations(basis, W.double(), H.double(), self.group_size)
        if self.per_tensor:  # rows add up
            M, v = M.sum((0, 1), keepdim=True), v.sum((0, 1), keepdim=True)
        old = self._theta()
        theta = solve_ridged(M, v, old)
        finite = torch.isfinite(theta).all(-1, keepdim=True)
        new = self._with_theta(torch.where(finite, theta, old)).as_stored()
        return new.where(_quadratic(M, v, new._theta()) < _quadratic(M, v, old), self)

    def _theta(self) -> Tensor:
        """Scales and offsets side by side, [groups, out, units or 2 · units] float64."""
        theta = self.scale if self.offset is None else torch.cat([self.scale, self.offset], -1)
        return theta.double()

    def _with_theta(self, theta: Tensor) -> LevelGrid:
        theta = theta.to(self.scale.dtype)
        units = self.scale.shape[-1]
        offset = None if self.offset is None else theta[..., units:]
        return replace(self, scale=theta[..., :units], offset=offset)

    def where(self, better: Tensor, other: LevelGrid) -> LevelGrid:
        return self.where_units(better[..., None], other)

    def where_units(self, better: Tensor, other: LevelGrid) -> LevelGrid:
        """Parameters of `self` where better [groups, out, units] (or broadcastable) is true, of `other`
        elsewhere.

        A function or t that the two do not share needs an entry for each row or unit afterwards, and is
        counted so.
        """

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return a if a.shape == b.shape and torch.equal(a, b) else torch.where(better, a, b)

        return replace(
            self,
            scale=torch.where(better, self.scale, other.scale),
            offset=None
            if self.offset is None or other.offset is None
            else torch.where(better, self.offset, other.offset),
            function=pick(self.function, other.function),
            t=pick(self.t, other.t),
        )

    def scaled(self, factor: float) -> LevelGrid:
        """The whole grid multiplied by `factor`: the range shrinks towards zero, codes keep their meaning."""
        offset = None if self.offset is None else self.offset * factor
        return replace(self, scale=self.scale * factor, offset=offset).as_stored()

    def replace_unit(self, unit: int, other: LevelGrid) -> LevelGrid:
        units = self.scale.shape[-1]

        def put(mine: Tensor, theirs: Tensor) -> Tensor:
            shape = torch.broadcast_shapes(mine.shape[:-1], theirs.shape[:-1])
            mine = mine.expand(*shape, units).clone()
            mine[..., unit] = theirs[..., 0]
            return mine

        def put_index(mine: Tensor, theirs: Tensor) -> Tensor:
            same = mine.shape[-1] == 1 and mine.shape == theirs.shape and torch.equal(mine, theirs)
            return mine if same else put(mine, theirs)

        return replace(
            self,
            scale=put(self.scale, other.scale),
            offset=None if self.offset is None or other.offset is None else put(self.offset, other.offset),
            function=put_index(self.function, other.function),
            t=put_index(self.t, other.t),
        )

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale} if self.offset is None else {"scale": self.scale, "offset": self.offset}

    def with_parameters(self, parameters: dict[str, Tensor]) -> LevelGrid:
        return replace(self, scale=parameters["scale"], offset=parameters.get("offset"))

    def as_stored(self) -> LevelGrid:
        """The grid with scales and offsets exactly as a file would return them."""

        def stored(parameter: Tensor) -> Tensor:
            return unpack_parameter(*pack_parameter(parameter, self.parameter_bits)).to(parameter.dtype)

        scale = stored(self.scale)
        offset = None if self.offset is None else stored(self.offset)
        return replace(self, scale=scale, offset=offset)

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"codes": pack_codes(codes, self.pool.bits)}
        tensors["scale"], scale_exponent = pack_parameter(self.scale, self.parameter_bits)
        facts: dict[str, Any] = {
            "grid": "ptq.grids.levels.LevelGrid",
            "bits": self.pool.bits,
            "functions": [f.value for f in self.pool.functions],
            "steps": self.pool.steps,
            "layout": self.pool.layout.value,
            "group_size": self.group_size,
            "shape": list(codes.shape),
            "parameter_shape": list(self.scale.shape),
            "function_shape": list(self.function.shape),
            "t_shape": list(self.t.shape),
            "parameter_bits": self.parameter_bits,
            "scale_exponent": scale_exponent,
            "per_tensor": self.per_tensor,
        }
        if self.offset is not None:
            tensors["offset"], facts["offset_exponent"] = pack_parameter(self.offset, self.parameter_bits)
        if self.pool.function_bits:
            tensors["function"] = pack_codes(self.function, self.pool.function_bits)
        if self.pool.t_bits:
            tensors["t"] = pack_codes(self.t, self.pool.t_bits)
        return tensors, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[LevelGrid, Tensor]:
        """The grid and the codes that `storage` wrote."""
        pool = Pool(
            functions=tuple(Function(f) for f in facts["functions"]),
            steps=int(facts["steps"]),
            layout=Layout(facts["layout"]),
            bits=int(facts["bits"]),
        )
        shape: tuple[int, ...] = tuple(facts["shape"])
        unit_shape: tuple[int, ...] = tuple(facts["parameter_shape"])
        scale = unpack_parameter(tensors["scale"], facts["scale_exponent"]).reshape(unit_shape)
        offset = None
        if "offset" in tensors:
            offset = unpack_parameter(tensors["offset"], facts["offset_exponent"]).reshape(unit_shape)

        def index(name: str, bits: int) -> Tensor:
            size: tuple[int, ...] = tuple(facts[f"{name}_shape"])
            if name not in tensors:
                return torch.zeros(size, dtype=torch.int64, device=scale.device)
            return unpack_codes(tensors[name], bits, size).long()

        grid = cls(
            scale=scale,
            offset=offset,
            function=index("function", pool.function_bits),
            t=index("t", pool.t_bits),
            pool=pool,
            in_features=shape[-1],
            group_size=facts["group_size"],
            parameter_bits=int(facts["parameter_bits"]),
            per_tensor=bool(facts["per_tensor"]),
        )
        return grid, unpack_codes(tensors["codes"], pool.bits, shape).to(code_dtype(grid))

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        parameters = self.scale.numel() * self.parameter_bits
        if self.offset is not None:
            parameters += self.offset.numel() * self.parameter_bits
        parameters += self.function.numel() * self.pool.function_bits
        parameters += self.t.numel() * self.pool.t_bits
        return {"codes": codes.numel() * self.pool.bits, "parameters": parameters}


def split_units(x: Tensor, width: int) -> Tensor:
    """x [..., in] as [..., units, width], zeros after a ragged end."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))


def _middles(levels: Tensor) -> Tensor:
    """Where the nearest level changes, [..., levels − 1]."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


def _divisor(scale: Tensor) -> Tensor:
    """The scale where it can be divided by, 1 elsewhere: all values of a unit with scale 0 are its offset."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _quadratic(M: Tensor, v: Tensor, theta: Tensor) -> Tensor:
    """θᵀMθ − 2vᵀθ per row, [groups, out]."""
    return ((M @ theta[..., None])[..., 0] * theta).sum(-1) - 2 * (v * theta).sum(-1)
