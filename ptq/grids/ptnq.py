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
FIXED_POINT = 2.0**24  # histograms are sums of integers: equal on every device and in every order


class Scope(Enum):
    """What shares one choice."""

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

    One function for a whole model, the paper's choice, is a pool of one: functions=[tan].
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
    finalists: int  # functions that metric=gram compares in full
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
        start = self._grid(W, int(bits), group_size)
        weight = self._weights(W, H)
        errors, best = self._search(start, W, weight)
        if self.metric is not Metric.gram or H is None:
            return self._polish(self._choose(start, W, weight, errors, best), W, weight)
        order = errors.amin(-1).sum((0, 1, 2)).argsort(stable=True).tolist()
        grids = []
        for k in order[: self.finalists]:
            only = torch.full_like(errors, torch.inf)
            only[..., k, :] = errors[..., k, :]
            grids.append(self._polish(self._choose(start, W, weight, only, best), W, weight))
        if self.function_scope is not Scope.layer:
            grids.insert(0, self._polish(self._choose(start, W, weight, errors, best), W, weight))
        return self._best_in_full(grids, W, H)

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        self.check(bits, group_size)
        return self._grid(W, int(bits), group_size).storage_bits(W)

    def _grid(self, W: Tensor, bits: int, group_size: int | None) -> LevelGrid:
        """The grid before anything is known: everything zero, in the shapes that it keeps."""
        groups, out, in_features = W.shape
        units = -(-in_features // (group_size or in_features))
        shape = (1, 1, 1) if self.granularity is Granularity.tensor else (groups, out, units)
        index_shape = {
            Scope.layer: (1, 1, 1),
            Scope.channel: (*shape[:2], 1),
            Scope.group: shape,
        }
        zeros = W.new_zeros(shape)
        return LevelGrid(
            scale=zeros,
            offset=zeros if self.offset else None,
            function=zeros.new_zeros(index_shape[self.function_scope], dtype=torch.int64),
            t=zeros.new_zeros(index_shape[self.t_scope], dtype=torch.int64),
            pool=Pool(functions=tuple(self.functions), steps=self.t_steps, layout=self.layout, bits=bits),
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
        middle = (x.where(inside, x.new_tensor(torch.inf)).amin(-1) / 2) + (
            x.where(inside, x.new_tensor(-torch.inf)).amax(-1) / 2
        )
        if self.range is Range.min_max:
            return middle[None]
        return torch.stack([middle, (x * weight).sum(-1) / weight.sum(-1)])

    def _search(self, grid: LevelGrid, W: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Least error of each unit for each function (and t, where t is chosen for several units), and the
        candidate that has it: both [groups, out, units, functions, t or 1].
        """
        x, weight = self._units(grid, W, weight)
        tables = _candidate_errors(grid.pool, self._factors(), x.device)  # [functions, nodes, t · factors]
        functions, nodes, _ = tables.shape
        steps = grid.pool.t_steps if self.t_scope is not Scope.group else 1
        rows = max(1, 2**24 // max(nodes, x.shape[-1]))
        errors, best = [], []
        for top in range(0, len(x), rows):
            part, part_weight = x[top : top + rows], weight[top : top + rows]
            least: Tensor | None = None
            for k, centre in enumerate(self._centres(part, part_weight)):
                shifted = part - centre[:, None]
                half = _half_range(shifted, part_weight)
                histogram = _histogram(shifted, half, part_weight, nodes)
                square = half.square().float()[:, None, None]
                found = []
                for table in tables:
                    e = (histogram @ table).unflatten(-1, (steps, -1))  # [units, t or 1, rest]
                    found.append(e.min(-1))
                error = torch.stack([f.values for f in found], 1) * square[..., :1]
                candidate = torch.stack([f.indices for f in found], 1) + k * tables.shape[-1] // steps
                if least is None:
                    least, arg = error, candidate
                else:
                    better = error < least
                    least, arg = torch.where(better, error, least), torch.where(better, candidate, arg)
            assert least is not None
            errors.append(least)
            best.append(arg)
        shape = (*grid.scale.shape, functions, steps)
        return torch.cat(errors).double().reshape(shape), torch.cat(best).reshape(shape)

    def _factors(self) -> tuple[float, ...]:
        if self.range is Range.min_max or self.range_steps == 1:
            return (1.0,)
        return tuple(self.min_shrink ** (k / (self.range_steps - 1)) for k in range(self.range_steps))

    def _choose(self, grid: LevelGrid, W: Tensor, weight: Tensor, errors: Tensor, best: Tensor) -> LevelGrid:
        """Function, t, range and offset with the least error, each by its scope."""
        over = {Scope.layer: (0, 1, 2), Scope.channel: (2,), Scope.group: ()}
        by_t = errors.sum(over[self.t_scope], keepdim=True) if over[self.t_scope] else errors
        by_function, t = by_t.min(-1)  # [.., functions]
        if over[self.function_scope]:
            by_function = by_function.sum(over[self.function_scope], keepdim=True)
        function = by_function.argmin(-1)  # [groups or 1, out or 1, units or 1]
        chosen = function.expand(t.shape[:-1])
        t = t.gather(-1, chosen[..., None])[..., 0]
        every = (*grid.scale.shape, 1)
        candidate = best.gather(
            3, function.expand(every[:-1])[..., None, None].expand(*every, best.shape[-1])
        )
        candidate = candidate[..., 0, :].gather(-1, t.expand(every[:-1])[..., None])[..., 0]
        factors = torch.tensor(self._factors(), dtype=W.dtype, device=W.device)
        if self.t_scope is Scope.group:
            per_centre = grid.pool.t_steps * len(factors)
            t = candidate % per_centre // len(factors)
        else:
            per_centre = len(factors)
        x, weight = self._units(grid, W, weight)
        centres = self._centres(x, weight)
        centre = centres.gather(0, (candidate.reshape(1, -1) // per_centre))[0]
        half = _half_range(x - centre[:, None], weight)
        scale = half * factors[(candidate % len(factors)).flatten()]
        # a constant unit: the lowest level, −1, reaches its value
        magnitude = (x * (weight > 0)).abs().amax(-1)
        flat = half <= magnitude * torch.finfo(W.dtype).eps * 4
        if self.offset:
            scale, centre = torch.where(flat, magnitude, scale), torch.where(flat, centre + magnitude, centre)
        else:
            value = x[:, 0]
            constant = (((x - value[:, None]) * (weight > 0)) == 0).all(-1)
            scale = torch.where(constant, -value, scale)
        return replace(
            grid,
            scale=scale.reshape(grid.scale.shape),
            offset=centre.reshape(grid.scale.shape) if self.offset else None,
            function=function,
            t=t,
        ).as_stored()

    def _polish(self, grid: LevelGrid, W: Tensor, weight: Tensor) -> LevelGrid:
        """Closed-form scale and offset for the nearest codes, as often as `refits`; kept where the error
        falls.
        """
        error = self._error(grid, W, weight)
        x, unit_weight = (u.double() for u in self._units(grid, W, weight))
        for _ in range(self.refits):
            g = self._units(grid, grid.levels(grid.round(W)), weight)[0].double()
            total, sum_g, sum_gg = (
                unit_weight.sum(-1),
                (unit_weight * g).sum(-1),
                (unit_weight * g * g).sum(-1),
            )
            sum_x, sum_gx = (unit_weight * x).sum(-1), (unit_weight * g * x).sum(-1)
            old_scale = grid.scale.flatten().double()
            if grid.offset is None:
                scale = torch.where(sum_gg > 0, sum_gx / sum_gg, old_scale)
                offset = None
            else:
                determinant = total * sum_gg - sum_g.square()
                solvable = determinant > 1e-9 * total * sum_gg
                scale = torch.where(solvable, (total * sum_gx - sum_g * sum_x) / determinant, old_scale)
                offset = ((sum_x - scale * sum_g) / total).to(W.dtype).reshape(grid.scale.shape)
            new = replace(grid, scale=scale.to(W.dtype).reshape(grid.scale.shape), offset=offset).as_stored()
            new_error = self._error(new, W, weight)
            better = new_error < error
            grid, error = new.where_units(better, grid), torch.where(better, new_error, error)
        return grid

    def _error(self, grid: LevelGrid, W: Tensor, weight: Tensor) -> Tensor:
        """Weighted error of nearest rounding of each unit, in the scale's shape."""
        r, unit_weight = self._units(grid, W - grid.values(grid.round(W)), weight)
        return (r.double().square() * unit_weight).sum(-1).reshape(grid.scale.shape)

    def _best_in_full(self, grids: list[LevelGrid], W: Tensor, H: Tensor) -> LevelGrid:
        """The grid with the least tr(R H Rᵀ) after refits under H, for the layer or for each row."""
        best: LevelGrid | None = None
        for grid in grids:
            error = _full_error(grid, W, H)
            for _ in range(self.refits):
                new = grid.refit(grid.round(W), W, H)
                new_error = _full_error(new, W, H)
                better = new_error < error
                grid, error = new.where(better, grid), torch.where(better, new_error, error)
            if best is None:
                best, best_error = grid, error
            elif grid.shared or self.function_scope is Scope.layer:
                if error.sum() < best_error.sum():
                    best, best_error = grid, error
            else:
                better = error < best_error
                best, best_error = grid.where(better, best), torch.where(better, error, best_error)
        assert best is not None
        return best


def _full_error(grid: LevelGrid, W: Tensor, H: Tensor) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of nearest rounding, [groups, out]; [1, 1] where rows share their parameters."""
    R = W - grid.values(grid.round(W))
    error = ((R @ H.to(R.dtype)) * R).sum(-1)
    return error.sum().reshape(1, 1) if grid.shared else error


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


@lru_cache(maxsize=8)
def _candidate_errors(pool: Pool, factors: tuple[float, ...], device: torch.device) -> Tensor:
    """Squared distance of each histogram node from the nearest level of each candidate,
    [functions, nodes, t · factors] float32.
    """
    nodes = min(max(2**pool.bits * 32, 512), 2048)
    x = torch.linspace(-1, 1, nodes, dtype=torch.float64, device=device)
    factor = torch.tensor(factors, dtype=torch.float64, device=device)[:, None]
    scaled = (x / factor).flatten()  # [factors · nodes]
    tables = pool.tables(torch.float64, device)
    errors = []
    for levels in tables:  # [t, levels]
        near = levels.gather(-1, nearest_level(scaled.expand(len(levels), -1), levels))
        distance = (near.unflatten(-1, (-1, nodes)) * factor - x).square()  # [t, factors, nodes]
        errors.append(distance.flatten(0, 1).mT.float().contiguous())
    return torch.stack(errors)
