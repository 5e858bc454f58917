from __future__ import annotations

import math
from itertools import pairwise

import pytest

from analysis.direct_labels import spread
from analysis.names import KNOWN_METHODS, short_labels
from analysis.plotting import MARKS, mark, pick_ticks, plain_number


def test_every_known_method_has_its_own_mark() -> None:
    assert set(MARKS) == set(KNOWN_METHODS)
    assert len(set(MARKS.values())) == len(MARKS)
    assert len({colour for colour, _ in MARKS.values()}) == len(MARKS)


def test_a_variant_has_the_colour_of_its_family_and_another_line() -> None:
    labels = ["comq", "comq_release", "rtn"]
    base, variant = mark("comq", labels), mark("comq_release", labels)
    assert (base.colour, base.marker) == (variant.colour, variant.marker)
    assert base.line != variant.line
    assert mark("new_method") == mark("new_method", ["new_method", "rtn"])


def test_variants_without_lines_still_differ() -> None:
    labels = ["comq", "comq (grid=codebook)", "comq (grid=ptnq)"]
    assert len({mark(label, labels).face for label in labels}) == 3


def test_short_labels_drop_the_keys_of_words_only() -> None:
    labels = ["comq (grid=ptnq, sweeps=5)", "comq (grid=codebook) · g128", "gptq (x=true)", "rtn"]
    assert list(short_labels(labels).values()) == [
        "comq · ptnq, sweeps=5",
        "comq · codebook · g128",
        "gptq · x=true",
        "rtn",
    ]


def test_short_labels_stay_apart() -> None:
    alike = ["comq (grid=mse)", "comq (range=mse)"]
    assert list(short_labels(alike).values()) == alike


def test_labels_are_spread_in_order() -> None:
    wanted = {"a": 0.5, "b": 0.51, "c": 0.5, "d": 0.9}
    found = spread(wanted, 0.1)
    assert sorted(found, key=lambda name: found[name]) == ["a", "c", "b", "d"]
    heights = sorted(found.values())
    assert all(b - a > 0.1 - 1e-9 for a, b in pairwise(heights))
    assert found["d"] == 0.9  # far enough already
    assert sum(heights[:3]) / 3 == pytest.approx((0.5 + 0.51 + 0.5) / 3)
    crowded = spread(dict.fromkeys("abcdefgh", 0.99), 0.1)
    assert max(crowded.values()) <= 0.97 + 1e-9


def test_ticks_are_round_first_and_apart() -> None:
    ticks = pick_ticks([[1, 10, 100], [2, 5, 20, 50]], math.log10, 1, 100)
    assert {1, 10, 100} <= set(ticks)
    heights = [math.log10(tick) for tick in ticks]
    assert min(b - a for a, b in pairwise(heights)) >= 0.26


@pytest.mark.parametrize(
    ("value", "text"), [(0.05, "0.05"), (20.0, "20"), (3000.0, "3,000"), (1e6, "1e6"), (1e-5, "1e-5")]
)
def test_plain_number(value: float, text: str) -> None:
    assert plain_number(value) == text
