"""Mixed precision: widths for layers, or for rows of them, that cost the network least within a budget.

The paper on gradient-based PTQ (arXiv 2308.07662) announces such a technique, but its definition is not known
to us. This is a reconstruction: scores of importance (ptq/importance.py) give every width a cost, and the
widths with the least total cost within the budget are found exactly (ptq/knapsack.py). The budget counts
stored bits: codes, scales, tables and, where rows differ, each row's width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq.allocation import Bits
from ptq.calibration import Calibration, NoCalibration
from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.grids.row_widths import RowWidths
from ptq.importance import NEED_NO_DATA, FloatNetwork, Score, costs, limited
from ptq.knapsack import pack
from ptq.layers import weight_matrix
from ptq.methods.method import GridSpec, LayerMethod, RatedGridSpec, check_pair, stored_size
from ptq.methods.selecting import chooses
from ptq.models.adapter import ModelAdapter
from ptq.plan import Plan, allocate
from ptq.problem import LayerProblem
from ptq.solvers.nearest import nearest

ROUNDS = 8  # corrections of the budget where the size of a layer is not the sum of its rows'


class Rounding(Enum):
    """Which Ŵ the scores look at."""

    nearest = "nearest"  # nearest rounding on the fitted grid: quick
    method = (
        "method"  # what the job's method makes of it on the float network's inputs: a solve for each width
    )


class Granularity(Enum):
    """What gets a width of its own."""

    layer = "layer"
    channel = "channel"  # an output channel: a row of the weight matrix


@dataclass(kw_only=True)
class MixedBits(Bits):
    """Widths chosen under a budget, with the exceptions that `Bits` allows: these keep their width, and count
    in the budget.

    `weight` is the width whose stored size is the budget where `budget` is null.
    """

    budget: float | None  # stored bits per coefficient of all quantized layers, everything counted
    score: Score
    rounding: Rounding
    granularity: Granularity
    candidates: list[int]  # widths that may be chosen
    samples: int  # of the calibration set, that scores are measured on

    def __post_init__(self) -> None:
        Bits.__post_init__(self)
        if self.budget is not None and self.budget <= 0:
            raise InputError(f"bits.budget must be positive, or null; got {self.budget:g}")
        rising = self.candidates == sorted(set(self.candidates))
        if not self.candidates or not rising or self.candidates[0] < 1:
            raise InputError(
                f"bits.candidates must name one width or more, positive and rising; got {self.candidates}"
            )
        if self.granularity is Granularity.channel and self.score is Score.probe:
            raise InputError(
                "bits.score=probe tries a layer at a time, not each channel; "
                "use another score with bits.granularity=channel"
            )
        if self.samples < 1:
            raise InputError(f"bits.samples must be at least 1; got {self.samples}")

    def widths(self) -> list[float]:
        return [*Bits.widths(self), *self.candidates]

    def announcement(self) -> str:
        """What is known before anything is measured."""
        budget = f"the bits that {self.weight:g} for all would take" if self.budget is None else "the budget"
        return (
            f"mixed precision: widths among {', '.join(map(str, self.candidates))} for each "
            f"{self.granularity.value}, chosen when the job runs, within {budget}; "
            f"the table has bits.weight={self.weight:g} in their place"
        )


@dataclass(kw_only=True)
class Choice:
    """The widths that were chosen."""

    layers: dict[str, float | None]  # bits per layer in order of execution, the mean over its rows
    rows: dict[str, Tensor]  # [groups, out] bits of each row, where rows of a layer differ
    candidates: list[int]  # what a row's bits are among
    facts: dict[str, Any]  # for the record

    def grid(self, name: str, grid: GridSpec) -> GridSpec:
        """The grid for a layer."""
        if name not in self.rows:
            return grid
        return RowWidths(inner=grid, rows=self.rows[name], widths=self.candidates)


def check_mixed(
    bits: MixedBits, method: object, grid: GridSpec, calibration: Calibration | NoCalibration
) -> None:
    """Raise InputError where method, grid or calibration do not go with mixed precision."""
    if isinstance(grid, RatedGridSpec):
        raise InputError(
            f"bits=mixed chooses among widths, and codes of {type(grid).__name__} have none: their rate is "
            "any number; use a grid of fixed width, or bits.weight=RATE on this one"
        )
    if chooses(method, grid):
        raise InputError(
            f"{type(method).__name__} chooses its grid by trials at one width; use bits=w3 or the like, "
            "or one of its grids with another method"
        )
    if isinstance(calibration, NoCalibration) and bits.score not in NEED_NO_DATA:
        raise InputError(
            f"bits.score={bits.score.value} is measured on calibration samples; "
            "choose bits.score=weight_error or another calibration than none"
        )
    if bits.granularity is Granularity.channel:
        probe = RowWidths(inner=grid, rows=torch.tensor([[bits.candidates[0]]]), widths=bits.candidates)
        try:
            check_pair(method, probe)
        except InputError as error:
            raise InputError(
                f"{type(method).__name__} works on the parameters of its own grid, not on rows of different "
                f"widths; use bits.granularity=layer ({error})"
            ) from error


@dataclass(kw_only=True)
class _Sizer:
    """Stored bits of layers by width."""

    adapter: ModelAdapter
    method: object
    grid: GridSpec
    group_size: int | None

    def weight(self, name: str) -> Tensor:
        return weight_matrix(self.adapter.module.get_submodule(name)).float()

    def layer(self, name: str, width: float) -> int:
        return self._size(self.grid, name, width)

    def rows(self, name: str, rows: Tensor, widths: list[int]) -> int:
        spec = RowWidths(inner=self.grid, rows=rows, widths=widths)
        return self._size(spec, name, float(rows.double().mean()))

    def _size(self, grid: GridSpec, name: str, width: float) -> int:
        return sum(stored_size(self.method, grid, self.weight(name), width, self.group_size).values())


def budget_bits(
    bits: MixedBits, adapter: ModelAdapter, plan: Plan, method: object, grid: GridSpec
) -> tuple[int, int]:
    """The budget in bits, and the number of weights that it is for."""
    sizer = _Sizer(adapter=adapter, method=method, grid=grid, group_size=bits.group_size)
    uniform = allocate(adapter, plan, bits)
    quantized = {name: width for name, width in uniform.items() if width is not None}
    weights = sum(sizer.weight(name).numel() for name in quantized)
    if bits.budget is not None:
        return int(bits.budget * weights), weights
    return sum(sizer.layer(name, width) for name, width in quantized.items()), weights


def choose(
    bits: MixedBits,
    adapter: ModelAdapter,
    plan: Plan,
    batches: list[Any],
    *,
    method: object,
    grid: GridSpec,
    calibration: Calibration | NoCalibration,
    seed: int,
) -> Choice:
    """The widths with the least cost within the budget; `adapter.module` is float and stays as it is.

    `method` is the job's, layer-wise where rounding=method asks it. Raises InputError where the budget is
    too small for the narrowest widths.
    """
    started = time.perf_counter()
    uniform = allocate(adapter, plan, bits)
    # an exception is a layer whose width does not follow the uniform one
    other = allocate(adapter, plan, replace(bits, weight=bits.weight + 1))
    free = [name for name, width in uniform.items() if width is not None and width != other[name]]
    sizer = _Sizer(adapter=adapter, method=method, grid=grid, group_size=bits.group_size)
    total, weights = budget_bits(bits, adapter, plan, method, grid)
    pinned = {name: width for name, width in uniform.items() if width is not None and name not in free}
    left = total - sum(sizer.layer(name, width) for name, width in pinned.items())
    network = FloatNetwork(
        adapter=adapter,
        module=adapter.module,
        batches=limited(batches, bits.samples),
        positions_per_image=calibration.positions_per_image if isinstance(calibration, Calibration) else None,
        seed=seed,
    )

    def rounded(problem: LayerProblem, width: float) -> tuple[Tensor, Grid]:
        if bits.rounding is Rounding.method:
            assert isinstance(method, LayerMethod)
            return method.quantize_layer(problem, grid, width, bits.group_size)
        fitted = grid.fit(problem.W, width, bits.group_size, problem.H)
        return nearest(problem, fitted), fitted

    data = isinstance(calibration, Calibration)
    found = costs(bits.score, network, free, bits.candidates, rounded, needs_gram=data) if free else {}
    scored = time.perf_counter() - started
    if bits.granularity is Granularity.layer:
        layers, rows, exact, stored = _by_layer(bits, sizer, free, found, left)
    else:
        layers, rows, exact, stored = _by_row(bits, sizer, free, found, left)
    mean = (total - left + stored) / max(1, weights)
    facts = {
        "score": bits.score.value,
        "rounding": bits.rounding.value,
        "granularity": bits.granularity.value,
        "budget": total / max(1, weights),
        "bits_per_coefficient": mean,
        "exact": exact,
        "rows": {name: torch.bincount(r.flatten()).tolist() for name, r in rows.items()},
        "costs": {name: cost.sum((1, 2)).tolist() for name, cost in found.items()},
        "score_seconds": scored,
        "seconds": time.perf_counter() - started,
    }
    return Choice(
        layers={name: layers.get(name, width) for name, width in uniform.items()},
        rows=rows,
        candidates=bits.candidates,
        facts=facts,
    )


_Chosen = tuple[dict[str, float], dict[str, Tensor], bool, int]  # bits, rows, whether exact, stored bits


def _too_small(bits: MixedBits, least: int, budget: int) -> InputError:
    return InputError(
        f"the budget leaves {budget} bits for layers that take {least} at {bits.candidates[0]} bits a code; "
        "raise bits.budget, or allow narrower codes in bits.candidates"
    )


def _by_layer(
    bits: MixedBits, sizer: _Sizer, names: list[str], found: dict[str, Tensor], budget: int
) -> _Chosen:
    if not names:
        return {}, {}, True, 0
    sizes = np.array([[sizer.layer(name, width) for width in bits.candidates] for name in names])
    prices = np.stack([found[name].sum((1, 2)).cpu().numpy() for name in names])
    if int(sizes.min(1).sum()) > budget:
        raise _too_small(bits, int(sizes.min(1).sum()), budget)
    packing = pack(prices, sizes, budget)
    layers = {name: float(bits.candidates[k]) for name, k in zip(names, packing.chosen, strict=True)}
    return layers, {}, packing.exact, packing.size


def _by_row(
    bits: MixedBits, sizer: _Sizer, names: list[str], found: dict[str, Tensor], budget: int
) -> _Chosen:
    """Rows of all layers compete with each other. A row counts for an equal share of its layer's size; where
    a layer's size is not the sum of its rows', what is left over, or lacking, is given back and tried again.
    """
    if not names:
        return {}, {}, True, 0
    counts = [found[name].shape[1:].numel() for name in names]
    index_bits = (len(bits.candidates) - 1).bit_length()
    shares = np.concatenate(
        [
            np.tile([-(-sizer.layer(name, w) // count) + index_bits for w in bits.candidates], (count, 1))
            for name, count in zip(names, counts, strict=True)
        ]
    )
    prices = np.concatenate([found[name].flatten(1).T.cpu().numpy() for name in names])
    best: _Chosen | None = None
    asked = budget
    for _ in range(ROUNDS):
        if int(shares.min(1).sum()) > asked:
            asked = int(shares.min(1).sum())
        packing = pack(prices, shares, asked)
        widths = torch.tensor(bits.candidates)[torch.from_numpy(packing.chosen)].split(counts)
        rows = {
            name: w.reshape(found[name].shape[1:]).to(found[name].device)
            for name, w in zip(names, widths, strict=True)
        }
        stored = sum(sizer.rows(name, r, bits.candidates) for name, r in rows.items())
        if stored <= budget and (best is None or stored > best[3]):
            means = {name: float(r.double().mean()) for name, r in rows.items()}
            best = means, rows, packing.exact, stored
        if stored == budget or packing.size + budget - stored == asked:
            break
        asked = packing.size + budget - stored
    if best is None:
        narrow = {name: torch.full_like(r, bits.candidates[0]) for name, r in rows.items()}
        raise _too_small(bits, sum(sizer.rows(n, r, bits.candidates) for n, r in narrow.items()), budget)
    return best
