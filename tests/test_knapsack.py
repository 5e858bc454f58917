"""The best options within a budget: against every combination, and at sizes where these cannot be listed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ptq import knapsack
from ptq.errors import InputError
from ptq.knapsack import pack


def every_combination(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    items = range(len(costs))
    return min(
        sum(costs[i, c[i]] for i in items)
        for c in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if sum(sizes[i, c[i]] for i in items) <= budget
    )


@pytest.mark.parametrize("kind", ["falling", "any"])
@pytest.mark.parametrize("seed", range(40))
def test_the_best_of_all_combinations(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    items, options = random.integers(1, 6), random.integers(1, 5)
    sizes = random.integers(1, 60, items)[:, None] * np.arange(2, 2 + options)
    sizes = sizes + random.integers(0, 5, sizes.shape)
    costs = random.normal(size=sizes.shape)
    if kind == "falling":
        costs = np.exp2(-2.0 * np.arange(options)) * random.exponential(size=(items, 1))
    budget = int(random.integers(sizes.min(1).sum(), sizes.max(1).sum() + 3))
    packing = pack(costs, sizes, budget)
    rows = np.arange(items)
    assert packing.exact
    assert packing.size == sizes[rows, packing.chosen].sum() <= budget
    assert packing.cost == pytest.approx(costs[rows, packing.chosen].sum())
    assert packing.cost == pytest.approx(every_combination(costs, sizes, budget), abs=1e-12)


def test_equal_items_get_equal_options() -> None:
    costs = np.tile([1.0, 1 / 4, 1 / 16, 1 / 64], (12, 1))
    sizes = np.tile([200, 300, 400, 500], (12, 1))
    packing = pack(costs, sizes, 12 * 300)
    assert packing.chosen.tolist() == [1] * 12
    assert packing.size == 12 * 300


def test_the_smaller_of_two_that_cost_the_same() -> None:
    assert pack(np.zeros((3, 2)), np.array([[1, 2]] * 3), 6).size == 3


def layers(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    weights = random.choice([144, 288, 576, 4096, 36864], count)
    sizes = weights[:, None] * np.arange(2, 9) + 40
    uneven = np.exp(0.2 * random.normal(size=sizes.shape))
    return random.exponential(size=(count, 1)) * weights[:, None] * 4.0 ** -np.arange(2, 9) * uneven, sizes


def test_a_thousand_items_are_solved_exactly() -> None:
    costs, sizes = layers(1000)
    packing = pack(costs, sizes, int(sizes[:, 1].sum()))
    assert packing.exact
    assert 0 <= sizes[:, 1].sum() - packing.size < 144
    assert packing.cost < 0.7 * costs[:, 1].sum()


def test_with_too_many_states_the_result_still_fits_and_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, sizes = layers(60)
    budget = int(sizes[:, 1].sum()) - 7
    best = pack(costs, sizes, budget)
    monkeypatch.setattr(knapsack, "MOST_STATES", 4)
    near = pack(costs, sizes, budget)
    assert best.exact
    assert not near.exact
    assert near.size <= budget
    assert best.cost <= near.cost <= 1.02 * best.cost


def test_a_budget_below_the_smallest_options_is_refused() -> None:
    with pytest.raises(InputError, match="take 30 of a budget of 29"):
        pack(np.ones((3, 2)), np.array([[10, 20]] * 3), 29)
