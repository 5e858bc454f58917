"""Weighted k-means in one dimension, for many units at once.

Sources: Lloyd 1957 (the alternation); Panter and Dite 1951 (levels as dense as density^⅓, a start); Wang and
Song 2011 (the exact dynamic programme, here over at most CELLS runs of values, a start too).
A unit's values are sorted once. A cluster is then a run of them, and running sums give its mass and mean, so
that one step costs a binary search per level and not a pass over the values.
Shapes: x, mass [units, n]; levels [units, L], increasing; all float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CELLS = 128  # a unit of no more values than this is solved exactly
PLAN_BLOCK = 2**20  # elements of the [units, CELLS, CELLS] costs held at once: what stays near the processor


class SortedUnits:
    """The values of some units in increasing order, with running sums of their mass and moment."""

    def __init__(self, x: Tensor, mass: Tensor) -> None:
        """`mass` must not be negative; a unit without any counts its values equally."""
        total = mass.sum(-1, keepdim=True)
        mass = torch.where(total > 0, mass / torch.where(total > 0, total, 1.0), 1 / x.shape[-1])
        self.x, order = x.double().sort(-1)
        self.mass = mass.double().gather(-1, order)
        self.mass_below = torch.nn.functional.pad(self.mass.cumsum(-1), (1, 0))  # [units, n + 1]
        self.moment_below = torch.nn.functional.pad((self.mass * self.x).cumsum(-1), (1, 0))

    def edges(self, levels: Tensor) -> Tensor:
        """Where each level's run of nearest values begins and ends, [units, L + 1]; a tie takes the upper
        level.
        """
        inner = torch.searchsorted(self.x, (levels[:, 1:] + levels[:, :-1]) / 2)
        ends = inner.new_tensor([0, self.x.shape[-1]]).expand(len(inner), -1)
        return torch.cat([ends[:, :1], inner, ends[:, 1:]], -1)

    def cost(self, levels: Tensor) -> Tensor:
        """Σ mass · (x − nearest level)² per unit, less the levels' share Σ mass · x², [units]."""
        mass, moment = self._sums(self.edges(levels))
        return (levels * (levels * mass - 2 * moment)).sum(-1)

    def cheapest(self, tables: Iterable[Tensor]) -> Tensor:
        """The table with the least cost for each unit; the first of equals."""
        best = best_cost = None
        for table in tables:
            cost = self.cost(table)
            if best is None or best_cost is None:
                best, best_cost = table, cost
            else:
                best = torch.where((cost < best_cost)[:, None], table, best)
                best_cost = torch.minimum(cost, best_cost)
        assert best is not None
        return best

    def lloyd(self, levels: Tensor, iterations: int) -> Tensor:
        """Levels after alternating nearest level and mean until nothing moves, `iterations` times at most.

        No step raises the cost; a level that nothing is nearest to stays where it is.
        """
        before = None
        for _ in range(iterations):
            edges = self.edges(levels)
            if before is not None and torch.equal(edges, before):
                break
            before = edges
            occupied = self._sums(edges)[0] > 0
            levels = torch.where(occupied, self.means(edges), levels).cummax(-1).values
        return levels

    def means(self, edges: Tensor) -> Tensor:
        """Mean of each run; of a run without mass, some value at its place."""
        mass, moment = self._sums(edges)
        last = self.x.shape[-1] - 1
        begin = edges[:, :-1].clamp_max(last)
        end = torch.maximum((edges[:, 1:] - 1).clamp_min(0), begin)
        # a difference of running sums may err by more than a light run weighs: keep the mean inside its run
        mean = moment / torch.where(mass > 0, mass, 1.0)
        return mean.clamp(self.x.gather(-1, begin), self.x.gather(-1, end))

    def _sums(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        return self.mass_below.gather(-1, edges).diff(), self.moment_below.gather(-1, edges).diff()

    def distinct_quantiles(self, num_levels: int) -> Tensor:
        """Every so many distinct values one, the extremes included: exact where there are no more of them
        than levels.
        """
        rank = torch.nn.functional.pad((self.x.diff() > 0).cumsum(-1), (1, 0))  # [units, n]
        steps = torch.arange(num_levels, dtype=torch.float64, device=self.x.device) / (num_levels - 1)
        wanted = (rank[:, -1:] * steps).round().long()
        return self.x.gather(-1, torch.searchsorted(rank, wanted))

    def cube_root_density(self, num_levels: int) -> Tensor:
        """Levels at equal steps of ∫ density^⅓, the asymptotic optimum."""
        steps = (torch.arange(num_levels, dtype=torch.float64, device=self.x.device) + 0.5) / num_levels
        return self.x.gather(-1, self._cube_root_quantiles(steps))

    def _cube_root_quantiles(self, steps: Tensor) -> Tensor:
        """Index of the value where ∫ density^⅓ passes each fraction of itself, from the spacing of the
        values.
        """
        between = (self.mass[:, 1:] + self.mass[:, :-1]) / 2
        share = (between * self.x.diff().square()).pow(1 / 3)
        below = torch.nn.functional.pad(share.cumsum(-1), (1, 0))  # [units, n]
        return torch.searchsorted(below, below[:, -1:] * steps).clamp_max(self.x.shape[-1] - 1)

    def partitioned(self, num_levels: int) -> Tensor:
        """Levels of the best partition into runs, found exactly by dynamic programming where a unit has no
        more than CELLS values, and elsewhere over borders that are dense where levels should be.
        """
        n, device = self.x.shape[-1], self.x.device
        if n <= CELLS:
            borders = torch.arange(n + 1, device=device).expand(len(self.x), -1)
        else:
            steps = torch.arange(1, CELLS, dtype=torch.float64, device=device) / CELLS
            inner = self._cube_root_quantiles(steps)
            borders = torch.nn.functional.pad(inner, (1, 0))
            borders = torch.cat([borders, torch.full_like(borders[:, :1], n)], -1)
        mass, moment = self.mass_below.gather(-1, borders), self.moment_below.gather(-1, borders)
        at_once = max(1, PLAN_BLOCK // borders.shape[-1] ** 2)
        cuts = [
            _cheapest_runs(*sums, num_levels)
            for sums in zip(mass.split(at_once), moment.split(at_once), strict=True)
        ]
        return self.means(borders.gather(-1, torch.cat(cuts)))

    def evenly_spaced(self, num_levels: int, shrinks: list[float]) -> Tensor:
        """The cheapest table for each unit of the affine grids' (float offset, integer zero point with and
        without 0 in the range, symmetric) with a factor of `shrinks` on the range.
        """
        codes = torch.arange(num_levels, dtype=torch.float64, device=self.x.device)
        low, high = self.x[:, :1], self.x[:, -1:]
        largest = torch.maximum(low.abs(), high.abs())
        offset_step = _positive((high - low) / (num_levels - 1))
        zero_step = _positive((high.clamp_min(0) - low.clamp_max(0)) / (num_levels - 1))
        bases = [
            low + offset_step * codes,
            offset_step * (codes - (-low / offset_step).round()),
            zero_step * (codes - (-low.clamp_max(0) / zero_step).round()),
            _positive(2 * largest / (num_levels - 1)) * (codes - num_levels // 2),
        ]
        return self.cheapest(shrink * base for base in bases for shrink in shrinks)


def _cheapest_runs(mass: Tensor, moment: Tensor, num_runs: int) -> Tensor:
    """Where to cut, [units, num_runs + 1] indices of borders, for running sums [units, borders] at them."""
    run_mass = mass[:, None, :] - mass[:, :, None]  # [units, from, to]
    run_moment = moment[:, None, :] - moment[:, :, None]
    # less the runs' share of Σ mass · x²; a run must not end before it begins
    cost = -run_moment.square() / torch.where(run_mass > 0, run_mass, 1.0)
    cost.masked_fill_(torch.ones_like(cost[0]).tril(-1).bool(), torch.inf)
    best = [cost[:, 0]]  # [units, to], by the number of runs less one
    for _ in range(num_runs - 1):
        best.append((best[-1][..., None] + cost).amin(1))
    end = torch.full_like(cost[:, 0, :1], cost.shape[-1] - 1, dtype=torch.int64)
    cuts = [end]
    for earlier in best[-2::-1]:  # from the last run back to the first
        reach = cuts[-1][:, None].expand(-1, cost.shape[1], -1)
        cuts.append((earlier + cost.gather(-1, reach)[..., 0]).argmin(-1, keepdim=True))
    cuts.append(torch.zeros_like(end))
    return torch.cat(cuts[::-1], -1)


def _positive(step: Tensor) -> Tensor:
    return torch.where(step > 0, step, torch.ones_like(step))


def scalar_kmeans(
    x: Tensor, mass: Tensor, num_levels: int, *, iterations: int, shrinks: list[float]
) -> Tensor:
    """The best levels [units, L] of several starts for x [units, n], each unit for itself.

    None of them is worse than an affine table with a factor of `shrinks` on its range.
    """
    units = SortedUnits(x, mass)
    starts = [
        units.evenly_spaced(num_levels, shrinks),
        units.distinct_quantiles(num_levels),
        units.cube_root_density(num_levels),
    ]
    if x.shape[-1] <= CELLS or 4 * num_levels <= CELLS:
        # so near the optimum that iterations from the others would be lost
        return units.lloyd(units.cheapest([*starts, units.partitioned(num_levels)]), iterations)
    return units.cheapest(starts + [units.lloyd(start, iterations) for start in starts])
