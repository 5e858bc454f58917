"""One option for each item, the least total cost within a total size: bits for layers or rows under a budget.

The Lagrangian relaxation min Σ cost + λ (Σ size − budget) gives a lower bound for every λ ≥ 0. At the best λ
each option has a reduced cost, what it adds to the bound; dynamic programming over the items then keeps only
states (size, cost) that no other beats in both and whose bound is below the cost of a solution already known.
What is left is small, and the result is exact.
Shapes: costs, sizes [items, options]; costs may fall or rise along the options.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq.errors import InputError

MOST_STATES = 2**17  # kept after an item; beyond it the states with the worst bound are dropped
LAMBDA_STEPS = 100  # halvings of the interval of λ

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(kw_only=True)
class Packing:
    """An option for each item."""

    chosen: Integers  # [items]
    size: int
    cost: float
    exact: bool  # no choice within the budget costs less


def pack(costs: Floats, sizes: Integers, budget: int) -> Packing:
    """Options with the least Σ cost among those with Σ size ≤ budget; of equal ones, the smaller size.

    Raises InputError where even the smallest options do not fit.
    """
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes, np.int64)
    least = int(sizes.min(1).sum())
    if least > budget:
        raise InputError(f"the smallest options take {least} of a budget of {budget}")
    multiplier = _multiplier(costs, sizes, budget)
    incumbent = _filled(costs, sizes, budget, multiplier)
    known = _total(costs, incumbent)
    reduced = costs + multiplier * sizes
    base = reduced.min(1)
    # what the bound allows above Σ base: a state's reduced costs so far may not sum to more
    slack = known + multiplier * budget - float(base.sum())
    slack += 1e-9 * (abs(known) + float(np.abs(base).sum()))
    reduced = reduced - base[:, None]
    # items whose best option is beyond doubt first: states stay few until the doubtful ones come
    doubt = np.partition(reduced, 1, axis=1)[:, 1] if reduced.shape[1] > 1 else np.zeros(len(reduced))
    order = np.argsort(-doubt, kind="stable")
    rest = np.concatenate([np.cumsum(sizes.min(1)[order][::-1])[::-1][1:], [0]])  # least size of later items
    chosen, exact = _states(costs[order], sizes[order], reduced[order], rest, budget, slack)
    result = incumbent
    if chosen is not None:
        found = np.empty_like(incumbent)
        found[order] = chosen
        better = (_total(costs, found), _total(sizes, found)) < (known, _total(sizes, incumbent))
        result = found if better else incumbent
    return Packing(
        chosen=result, size=int(_total(sizes, result)), cost=float(_total(costs, result)), exact=exact
    )


def _total(values: NDArray, chosen: Integers) -> float:
    return values[np.arange(len(values)), chosen].sum()


def _cheapest(costs: Floats, sizes: Integers, multiplier: float) -> Integers:
    """The option with the least cost + λ · size of each item; of equal ones, the smaller."""
    reduced = costs + multiplier * sizes
    ties = reduced <= reduced.min(1, keepdims=True)
    return np.where(ties, sizes, np.iinfo(np.int64).max).argmin(1)


def _multiplier(costs: Floats, sizes: Integers, budget: int) -> float:
    """The least λ ≥ 0 whose cheapest options fit the budget, to rounding."""
    if _total(sizes, _cheapest(costs, sizes, 0.0)) <= budget:
        return 0.0
    low, high = 0.0, max(float(np.ptp(costs)), np.finfo(np.float64).tiny)
    while _total(sizes, _cheapest(costs, sizes, high)) > budget:
        low, high = high, 4 * high
    for _ in range(LAMBDA_STEPS):
        middle = (low + high) / 2
        if _total(sizes, _cheapest(costs, sizes, middle)) > budget:
            low = middle
        else:
            high = middle
    return high


def _filled(costs: Floats, sizes: Integers, budget: int, multiplier: float) -> Integers:
    """The cheapest options at λ, then single exchanges that save cost and fit, the most worthwhile first."""
    chosen = _cheapest(costs, sizes, multiplier)
    items = np.arange(len(costs))
    left = budget - int(_total(sizes, chosen))
    for _ in range(4 * len(costs)):
        gain = costs[items, chosen][:, None] - costs
        grown = sizes - sizes[items, chosen][:, None]
        fits = (gain > 0) & (grown <= left)
        if not fits.any():
            break
        worth = np.where(fits, gain / np.maximum(grown, 1), -np.inf)
        item, option = np.unravel_index(int(worth.argmax()), worth.shape)
        left -= int(grown[item, option])
        chosen[item] = option
    return chosen


def _states(
    costs: Floats, sizes: Integers, reduced: Floats, rest: Integers, budget: int, slack: float
) -> tuple[Integers | None, bool]:
    """The best choice whose reduced costs sum to no more than `slack`, or None; and whether none was lost."""
    size, cost, over = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    steps: list[tuple[Integers, Integers]] = []  # per item: the state before, the option taken
    exact = True
    for k in range(len(costs)):
        options = np.flatnonzero(reduced[k] <= slack)
        grown = (size[:, None] + sizes[k, options]).ravel()
        paid = (cost[:, None] + costs[k, options]).ravel()
        bound = (over[:, None] + reduced[k, options]).ravel()
        kept = np.flatnonzero((grown + rest[k] <= budget) & (bound <= slack))
        if not len(kept):
            return None, exact
        kept = kept[np.lexsort((paid[kept], grown[kept]))]
        cheaper = np.minimum.accumulate(paid[kept])
        kept = kept[np.concatenate([[True], paid[kept][1:] < cheaper[:-1]])]
        if len(kept) > MOST_STATES:
            exact = False
            kept = np.sort(kept[np.argsort(bound[kept], kind="stable")[:MOST_STATES]])
        steps.append((kept // len(options), options[kept % len(options)]))
        size, cost, over = grown[kept], paid[kept], bound[kept]
    state = int(np.lexsort((size, cost))[0])
    chosen = np.empty(len(costs), np.int64)
    for k in range(len(costs) - 1, -1, -1):
        before, option = steps[k]
        chosen[k], state = option[state], int(before[state])
    return chosen, exact
