from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from record_factory import failed, record, write

from analysis.collect import aggregate, collect
from analysis.curves import MARKS, curve_points, draw_curves, mark, pick_ticks, plain_number
from analysis.names import KNOWN_METHODS


def cells(folder: Path, *records: dict) -> pd.DataFrame:
    return aggregate(collect([write(folder, *records)]))


def test_points_are_the_results_at_their_exact_bits(tmp_path: Path) -> None:
    points = curve_points(
        cells(
            tmp_path,
            record(bits=4, result=97.0, stored=4.123, seed=0),
            record(bits=4, result=98.0, stored=4.123, seed=1),
            failed(bits=3),
            record(bits=2, result=40.0, bits_per_coefficient=None),
        )
    )
    (point,) = points.to_dict("records")
    assert (point["bits_per_coefficient"], point["mean"], point["n"]) == (4.123, 97.5, 2)
    assert point["std"] == pytest.approx(math.sqrt(0.5))


def test_group_sizes_are_lines_of_their_own(tmp_path: Path) -> None:
    found = cells(tmp_path, record(), record(bits_config={"group_size": 128}, stored=3.25))
    assert set(curve_points(found)["line"]) == {"comq", "comq · g128"}


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


def test_each_panel_has_its_lines_and_plain_ticks(tmp_path: Path) -> None:
    options = {"metric": "perplexity", "data": "topics", "before": 3.9}
    found = cells(
        tmp_path,
        *(record(method=m, bits=b, result=r) for m in ("rtn", "comq") for b, r in ((4, 97.9), (2, 10.0))),
        *(record("topics_llama", bits=b, result=r, **options) for b, r in ((4, 4.1), (2, 1834.0))),
    )
    percent, perplexity = draw_curves(curve_points(found)).axes
    assert len(percent.containers) >= 2
    assert "higher is better" in percent.get_ylabel()
    assert "lower is better" in perplexity.get_ylabel()
    assert len(percent.get_yticks()) >= 4
    assert max(percent.get_yticks()) >= 95  # near results stay apart although one method is at chance
    assert [tick.get_text() for tick in perplexity.get_yticklabels()][-1].replace(",", "").isdigit()
    low, high = percent.get_ylim()
    assert low < 10 < 98.5 < high


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
