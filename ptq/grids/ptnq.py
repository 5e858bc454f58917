"""Fitting level-table grids: a shape from a pool, its t, and the range of every unit.

The pool is that of Venâncio & Lopes, "PTNQ" (OpenReview AEvu2ifH1r), as level tables; PowerQuant, NormalFloat
and additive powers of two are pools of one. Every unit is normalised to [−1, 1] and becomes a histogram; the
error of a candidate (function, t, range) is linear in the histogram, so that all candidates of all units are
one matrix product with a table that depends on the configuration alone. The winner's scale and offset are
then refitted on the weights themselves, in turn with the codes.
Shapes: W [groups, out, in]; x, weight [units, inputs of a unit], units = groups · out · units of a row (1 per
tensor).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.affine import Granularity
from ptq.grids.grid import check_bits, check_group_size
from ptq.grids.levels import LevelGrid, Pool, split_units
from ptq.grids.lookup import nearest_level
from ptq.grids.shapes import TABLES, Function, Layout

MOST_BITS = 8  # a table of more levels is no table
INPUT_RIDGE = 0.01  # of mean diag(H), so that a dead input's weight still counts
RANKED_UNITS = 1024  # units that choose a layer's function when it has more
AT_ONCE = 2**20  # elements of the histograms and weights worked on at once: what a cache holds
SOLVABLE = 1e-6  # determinant, relative, below which a unit's levels are all one and its scale stays
FIXED_POINT = 2.0**24  # histograms are sums of integers: equal on every device and in every order


class Scope(Enum):
    """What shares one choice."""

    model = "model"  # of a function: all layers, the paper's choice; of a layer by itself, the layer
    layer = "layer"
    channel = "channel"  # a row
    group = "group"  # a unit: a group of inputs, or the row where there are no groups


class Range(Enum):
    """How the range of each unit is found."""

    min_max = "min_max"
    search = "search"  # the factor on the largest magnitude with the least error under `metric`


class Metric(Enum):
    """What a fit minimises."""

    weight = "weight"  # Σ (w − ŵ)²
    diagonal = "diagonal"  # Σ H_ii (w_i − ŵ_i)²; the weights' own error where there is no H
    gram = "gram"  # (w − ŵ) H (w − ŵ)ᵀ among the best of `diagonal`


@dataclass(kw_only=True, slots=True)
class LevelPool:
    """How to fit a level-table grid to a weight matrix.

    One function for a whole model is function_scope=model, or, without a choice, a pool of one:
    functions=[tan].
    """

    functions: list[Function]
    t_steps: int  # values of t per function, spread over the function's range; log2 of them bits per choice
    layout: Layout
    offset: bool  # value = scale · level + offset
    granularity: Granularity
    function_scope: Scope
    t_scope: Scope
    range: Range
    range_steps: int  # factors from min_shrink to 1, equally spaced in the logarithm
    min_shrink: float
    metric: Metric
    finalists: int  # functions whose ranges are refitted before one of them is taken
    refits: int  # rounds of closed-form scale and offset, then nearest codes
    parameter_bits: int  # 16 or 32

    def __post_init__(self) -> None:
        if not self.functions or len(set(self.functions)) < len(self.functions):
            names = ", ".join(f.value for f in self.functions) or "none"
            raise InputError(f"functions needs one name or more, each once; got {names}")
        tables = [f.value for f in self.functions if f in TABLES]
        if (self.layout is Layout.table) != bool(tables) or (tables and len(self.functions) > 1):
            raise InputError(
                "layout=table belongs to normal_float and powers_of_two, each in a pool of its own; "
                f"got layout={self.layout.value} with {', '.join(f.value for f in self.functions)}"
            )
        if self.parameter_bits not in (16, 32):
            raise InputError(f"parameter_bits must be 16 or 32; got {self.parameter_bits}")
        if self.range_steps < 1 or not 0 < self.min_shrink <= 1:
            raise InputError(
                "range_steps must be at least 1 and min_shrink in (0, 1]; "
                f"got {self.range_steps} and {self.min_shrink}"
            )
        if self.t_steps < 1 or self.finalists < 1 or self.refits < 0:
            raise InputError(
                "t_steps and finalists must be at least 1 and refits not negative; "
                f"got {self.t_steps}, {self.finalists} and {self.refits}"
            )
        if self.t_scope is Scope.model:
            raise InputError("t_scope=model: layers choose their t; use layer, channel or group")
        scopes = list(Scope)
        if scopes.index(self.t_scope) < scopes.index(self.function_scope):
            raise InputError(
                "t_scope must not be wider than function_scope: t of two functions are not comparable; "
                f"got t_scope={self.t_scope.value}, function_scope={self.function_scope.value}"
            )

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        least = 1 if self.layout in (Layout.midrise, Layout.full) else 2
        if not least <= check_bits(bits) <= MOST_BITS:
            raise InputError(
                f"a level table with layout={self.layout.value} has {least} to {MOST_BITS} bits; "
                f"got {bits:g}; use an affine grid elsewhere"
            )
        check_group_size(group_size)
        if group_size is not None and self.granularity is Granularity.tensor:
            raise InputError(
                f"granularity=tensor has one scale per layer and takes no group_size; got {group_size}"
            )

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> LevelGrid:
        """Grid fitted to W [groups, out, in]; H [groups, in, in] serves metric=diagonal and gram, whose place
        the weights' own error takes where it is missing (a unit refitted within a sweep, no calibration).
        """
        self.check(bits, group_size)
        if self.function_scope is Scope.model:  # of which the layer is all that there is
            return replace(self, function_scope=Scope.layer).fit(W, bits, group_size, H)
        start, weight = self._grid(W, int(bits), group_size), self._weights(W, H)
        every = list(range(len(self.functions)))
        ranked = self._ranked(start, W, weight)[: self.finalists] if len(every) > 1 else every
        tried = [[k] for k in ranked]
        if self.function_scope is not Scope.layer and len(every) > 1:
            tried.insert(0, every)
        grids = [self._polish(self._choose(start, W, weight, functions), W, weight) for functions in tried]
        if self.metric is Metric.gram and H is not None:
            return self._best(*zip(*(self._refitted(grid, W, H) for grid in grids), strict=True))
        if len(grids) == 1:
            return grids[0]
        return self._best(grids, [self._error(grid, W, weight) for grid in grids])

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        self.check(bits, group_size)
        if self.function_scope is Scope.model:
            one = replace(self, functions=self.functions[:1], function_scope=Scope.layer)
            return one.size(W, bits, group_size)
        return self._grid(W, int(bits), group_size).storage_bits(W)

    def for_model(self, layers: Iterable[tuple[Tensor, float]], group_size: int | None) -> LevelPool:
        """With function_scope=model the pool of the one function that has the least squared error, summed
        over all weights of the layers (W [groups, out, in] and its bits); else the pool as it is.
        """
        if self.function_scope is not Scope.model:
            return self
        pool = replace(self, function_scope=Scope.layer)
        if len(self.functions) > 1:
            errors = [pool._by_function(W, int(bits), group_size) for W, bits in layers]
            total = torch.stack([e.cpu() for e in errors]).sum(0)
            pool = replace(pool, functions=[self.functions[int(total.argmin())]])
        return pool

    def _by_function(self, W: Tensor, bits: int, group_size: int | None) -> Tensor:
        """Squared error of the whole layer under each function, the range searched, [functions] float64."""
        grid, weight = self._grid(W, bits, group_size), W.new_ones(W.shape[0], 1, W.shape[-1])
        errors, _ = self._search(grid, W, weight, list(range(len(self.functions))))
        return _sum(_sum(errors, self.t_scope).amin(-1), Scope.layer).flatten()

    def _grid(self, W: Tensor, bits: int, group_size: int | None) -> LevelGrid:
        """The grid before anything is known: everything zero, in the shapes that it keeps."""
        groups, out, in_features = W.shape
        units = -(-in_features // (group_size or in_features))
        shape = (1, 1, 1) if self.granularity is Granularity.tensor else (groups, out, units)
        pool = Pool(functions=tuple(self.functions), steps=self.t_steps, layout=self.layout, bits=bits)
        one = (1, 1, 1)
        index_shape = {Scope.layer: one, Scope.channel: (*shape[:2], 1), Scope.group: shape}
        zeros = W.new_zeros(shape)
        return LevelGrid(
            scale=zeros,
            offset=zeros if self.offset else None,
            function=zeros.new_zeros(
                index_shape[self.function_scope] if pool.function_bits else one, dtype=torch.int64
            ),
            t=zeros.new_zeros(index_shape[self.t_scope] if pool.t_bits else one, dtype=torch.int64),
            pool=pool,
            in_features=in_features,
            group_size=group_size,
            parameter_bits=self.parameter_bits,
            per_tensor=self.granularity is Granularity.tensor,
        )

    def _weights(self, W: Tensor, H: Tensor | None) -> Tensor:
        """Weight of each squared error, [groups, 1, in] with a largest value of 1 per convolution group."""
        if self.metric is Metric.weight or H is None:
            return W.new_ones(W.shape[0], 1, W.shape[-1])
        diagonal = H.diagonal(dim1=-2, dim2=-1).clamp_min(0).to(W.dtype)[:, None, :]
        mean = diagonal.mean(-1, keepdim=True)
        ridged = torch.where(mean > 0, diagonal + INPUT_RIDGE * mean, torch.ones_like(diagonal))
        return ridged / ridged.amax()

    def _units(self, grid: LevelGrid, W: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W and its weights by unit, [units, inputs of a unit]; weight 0 pads a ragged unit."""
        weight = weight.expand_as(W)
        if grid.per_tensor:
            return W.reshape(1, -1), weight.reshape(1, -1)
        width = grid.group_size or grid.in_features
        x, weight = split_units(W, width), split_units(weight, width)
        return x.flatten(0, 2), weight.flatten(0, 2)

    def _centres(self, x: Tensor, weight: Tensor) -> Tensor:
        """Offsets that the search tries, [centres, units]: the middle of the range, and the mean."""
        if not self.offset:
            return x.new_zeros(1, len(x))
        inside = weight > 0
        low = x.where(inside, x.new_tensor(torch.inf)).amin(-1)
        high = x.where(inside, x.new_tensor(-torch.inf)).amax(-1)
        middle = low / 2 + high / 2
        if self.range is Range.min_max:
            return middle[None]
        return torch.stack([middle, (x * weight).sum(-1) / weight.sum(-1)])

    def _factors(self) -> tuple[float, ...]:
        """What the search multiplies the largest distance from the centre by."""
        if self.range is Range.min_max or self.range_steps == 1:
            return (1.0,)
        return tuple(self.min_shrink ** (k / (self.range_steps - 1)) for k in range(self.range_steps))

    def _ranked(self, grid: LevelGrid, W: Tensor, weight: Tensor) -> list[int]:
        """The functions by increasing error over the layer, or over evenly spaced rows of a large one."""
        if not grid.per_tensor:
            W = W[:, :: max(1, grid.scale.numel() // RANKED_UNITS)]
            grid = self._grid(W, grid.pool.bits, grid.group_size)
        errors, _ = self._search(grid, W, weight, list(range(len(self.functions))))
        by_t = _sum(errors, self.t_scope).amin(-1)
        return _sum(by_t, Scope.layer).flatten().argsort(stable=True).tolist()

    def _search(
        self, grid: LevelGrid, W: Tensor, weight: Tensor, functions: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Least error of each unit for each function (and t, where units share it), and the candidate that
        has it, numbered by (centre, t unless shared, factor): both [groups, out, units, functions, t or 1].
        """
        x, weight = self._units(grid, W, weight)
        tables = [_candidate_errors(grid.pool, k, self._factors(), x.device) for k in functions]
        nodes, candidates = tables[0].shape
        steps = 1 if self.t_scope is Scope.group else grid.pool.t_steps
        rows = max(1, AT_ONCE // max(nodes, x.shape[-1]))
        errors = x.new_full((len(x), len(tables), steps), torch.inf, dtype=torch.float64)
        best = torch.zeros_like(errors, dtype=torch.int64)
        for top in range(0, len(x), rows):
            part = slice(top, top + rows)
            for number, centre in enumerate(self._centres(x[part], weight[part])):
                shifted = x[part] - centre[:, None]
                half = _half_range(shifted, weight[part])
                histogram = _histogram(shifted, half, weight[part], nodes)
                for k, table in enumerate(tables):
                    error, candidate = (histogram @ table).unflatten(-1, (steps, -1)).min(-1)
                    error = error * half.double().square()[:, None]
                    better = error < errors[part, k]
                    errors[part, k] = torch.where(better, error, errors[part, k])
                    candidate += number * candidates // steps
                    best[part, k] = torch.where(better, candidate, best[part, k])
        shape = (*grid.scale.shape, len(tables), steps)
        return errors.reshape(shape), best.reshape(shape)

    def _choose(self, grid: LevelGrid, W: Tensor, weight: Tensor, functions: list[int]) -> LevelGrid:
        """Function, t, range and offset with the least error, each by its scope."""
        errors, best = self._search(grid, W, weight, functions)
        units = grid.scale.shape
        by_function, t = _sum(errors, self.t_scope).min(-1)  # [.., functions]
        choice = _sum(by_function, self.function_scope).argmin(-1, keepdim=True)
        t = t.gather(-1, choice.expand(*t.shape[:-1], 1))[..., 0]
        best = best.gather(3, choice[..., None].expand(*units, 1, best.shape[-1]))[..., 0, :]
        factors = torch.tensor(self._factors(), dtype=W.dtype, device=W.device)
        if self.t_scope is Scope.group:
            candidate = best[..., 0]
            t = candidate // len(factors) % grid.pool.t_steps
            number = candidate // len(factors) // grid.pool.t_steps
        else:
            candidate = best.gather(-1, t.expand(units)[..., None])[..., 0]
            number = candidate // len(factors)
        x, weight = self._units(grid, W, weight)
        centre = self._centres(x, weight).gather(0, number.reshape(1, -1))[0]
        half = _half_range(x - centre[:, None], weight)
        scale = half * factors[(candidate % len(factors)).flatten()]
        # a constant unit: its value is −1, the lowest level, on a scale of its own size
        magnitude = _half_range(x, weight)
        if self.offset:
            flat = half <= magnitude * torch.finfo(W.dtype).eps * 4
            scale, centre = torch.where(flat, magnitude, scale), torch.where(flat, centre + magnitude, centre)
        else:
            first = x[:, :1]  # of the whole unit: only its end is padded
            flat = _half_range(x - first, weight) == 0
            scale = torch.where(flat, -first[:, 0], scale)
        return replace(
            grid,
            scale=scale.reshape(units),
            offset=centre.reshape(units) if self.offset else None,
            function=torch.tensor(functions, device=W.device)[choice[..., 0]]
            if grid.pool.function_bits
            else grid.function,
            t=t if grid.pool.t_bits else grid.t,
        ).as_stored()

    def _polish(self, grid: LevelGrid, W: Tensor, weight: Tensor) -> LevelGrid:
        """Scale and offset in closed form for the nearest codes, `refits` times; the best is kept."""
        if not self.refits:
            return grid
        x, weight = self._units(grid, W, weight)
        index = grid.table_index().expand(grid.scale.shape).flatten()
        tables = grid.pool.tables(x.dtype, x.device).flatten(0, 1)
        scale = grid.scale.flatten().clone()
        offset = torch.zeros_like(scale) if grid.offset is None else grid.offset.flatten().clone()
        rows = max(1, AT_ONCE // x.shape[-1])
        for top in range(0, len(x), rows):
            part = slice(top, top + rows)
            scale[part], offset[part] = _alternate(
                x[part],
                weight[part],
                tables[index[part]],
                scale[part],
                offset[part],
                self.refits,
                with_offset=grid.offset is not None,
            )
        return replace(
            grid,
            scale=scale.reshape(grid.scale.shape),
            offset=None if grid.offset is None else offset.reshape(grid.scale.shape),
        ).as_stored()

    def _error(self, grid: LevelGrid, W: Tensor, weight: Tensor) -> Tensor:
        """Weighted error of nearest rounding of each unit, in the scale's shape."""
        r, weight = self._units(grid, W - grid.values(grid.round(W)), weight)
        return (r.square() * weight).sum(-1).reshape(grid.scale.shape)

    def _refitted(self, grid: LevelGrid, W: Tensor, H: Tensor) -> tuple[LevelGrid, Tensor]:
        """The grid after refits under H, each row's best, and its error [groups, out, 1]."""
        error = _full_error(grid, W, H)
        for _ in range(self.refits):
            new = grid.refit(grid.round(W), W, H)
            new_error = _full_error(new, W, H)
            better = new_error < error
            grid, error = new.where_units(better, grid), torch.where(better, new_error, error)
        return grid, error

    def _best(self, grids: Sequence[LevelGrid], errors: Sequence[Tensor]) -> LevelGrid:
        """The grids of least error, for the layer, each row or each unit, as the function's scope is."""
        best, least = grids[0], _sum(errors[0], self.function_scope)
        for grid, error in zip(grids[1:], errors[1:], strict=True):
            error = _sum(error, self.function_scope)
            best, least = grid.where_units(error < least, best), torch.minimum(error, least)
        return best


def _full_error(grid: LevelGrid, W: Tensor, H: Tensor) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of nearest rounding, [groups, out, 1]; [1, 1, 1] where rows share parameters."""
    R = W - grid.values(grid.round(W))
    error = ((R @ H.to(R.dtype)) * R).sum(-1, keepdim=True)
    return error.sum().reshape(1, 1, 1) if grid.shared else error


def _sum(x: Tensor, scope: Scope) -> Tensor:
    """Sums of x [groups, out, units, …] over what shares a choice of that scope, 1 in these dimensions."""
    dims = {Scope.channel: (2,), Scope.group: ()}.get(scope, (0, 1, 2))
    return x.sum(dims, keepdim=True) if dims else x


def _alternate(
    x: Tensor,
    weight: Tensor,
    tables: Tensor,
    scale: Tensor,
    offset: Tensor,
    rounds: int,
    *,
    with_offset: bool,
) -> tuple[Tensor, Tensor]:
    """Scale and offset [units] with the least weighted error met while nearest codes on tables [units,
    levels] and least squares take turns; without an offset it stays 0.
    """
    middles = (tables[:, 1:] + tables[:, :-1]) / 2
    total = weight.sum(-1)
    least = torch.full_like(total, torch.inf)
    best = scale, offset
    for remaining in reversed(range(rounds + 1)):
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)[:, None]
        codes = torch.searchsorted(middles, (x - offset[:, None]) / divisor, right=True)
        g = tables.gather(-1, codes)
        residual = torch.addcmul(x - offset[:, None], g, scale[:, None], value=-1)
        error = (weight * residual).mul_(residual).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
        if not remaining:
            break
        # the step from here: least squares of the residual, which is small where x may not be
        weighted = weight * g
        sum_g, sum_gg = weighted.sum(-1), (weighted * g).sum(-1)
        sum_r, sum_gr = (weight * residual).sum(-1), (weighted * residual).sum(-1)
        if with_offset:
            determinant = total * sum_gg - sum_g.square()
            numerator = total * sum_gr - sum_g * sum_r
            solvable = determinant > SOLVABLE * total * sum_gg
        else:
            determinant, numerator, solvable = sum_gg, sum_gr, sum_gg > 0
        step = torch.where(solvable, numerator / determinant.where(solvable, torch.ones_like(total)), 0)
        scale = scale + step
        if with_offset:
            offset = offset + (sum_r - step * sum_g) / total
    return best


def _half_range(x: Tensor, weight: Tensor) -> Tensor:
    """Largest magnitude of each unit, [units]."""
    return (x * (weight > 0)).abs().amax(-1)


def _histogram(x: Tensor, half: Tensor, weight: Tensor, nodes: int) -> Tensor:
    """Weight of x / half on equally spaced nodes of [−1, 1], [units, nodes] float32.

    A value between two nodes is shared by them so that its mean stays; sums are of integers, hence exact.
    """
    safe = torch.where(half > 0, half, torch.ones_like(half))[:, None]
    place = ((x / safe).clamp(-1, 1).float() + 1) * ((nodes - 1) / 2)
    lower = place.long().clamp(0, nodes - 2)
    whole = (weight.float() * FIXED_POINT).round().long()
    upper = (whole * (place - lower)).long()
    counts = torch.zeros(len(x), nodes, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, lower, whole - upper)
    counts.scatter_add_(1, lower + 1, upper)
    return counts.float() / FIXED_POINT


@lru_cache(maxsize=128)
def _candidate_errors(pool: Pool, function: int, factors: tuple[float, ...], device: torch.device) -> Tensor:
    """Squared distance of each histogram node from the nearest level of each candidate of one function,
    [nodes, t · factors] float32.
    """
    nodes = min(max(2**pool.bits * 32, 512), 2048)
    x = torch.linspace(-1, 1, nodes, dtype=torch.float64, device=device)
    factor = torch.tensor(factors, dtype=torch.float64, device=device)[:, None]
    scaled = (x / factor).flatten()  # [factors · nodes]
    levels = pool.tables(torch.float64, device)[function]  # [t, levels]
    near = levels.gather(-1, nearest_level(scaled.expand(len(levels), -1), levels))
    distance = (near.unflatten(-1, (-1, nodes)) * factor - x).square()  # [t, factors, nodes]
    return distance.flatten(0, 1).mT.float().contiguous()
