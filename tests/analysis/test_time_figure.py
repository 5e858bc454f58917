from __future__ import annotations

from pathlib import Path

import pandas as pd
from record_factory import record, write

from analysis.collect import aggregate, collect
from analysis.time_figure import draw_times, time_points


def points(folder: Path, *records: dict) -> pd.DataFrame:
    return time_points(aggregate(collect([write(folder, *records)])))


def timed(seconds: float, **options: object) -> dict:
    return record(seconds={"solve": seconds, "limit": 0.0, "total": 100.0}, **options)


def test_the_front_is_per_width(tmp_path: Path) -> None:
    found = points(
        tmp_path,
        timed(1.0, method="rtn", bits=4, result=97.0),
        timed(5.0, method="comq", bits=4, result=96.0),
        timed(1.0, method="rtn", bits=2, result=50.0),
        timed(5.0, method="comq", bits=2, result=96.0),
    )
    front = found[found["pareto"]]
    assert list(zip(front["method"], front["bits"], strict=True)) == [
        ("rtn", "W4"),
        ("rtn", "W2"),
        ("comq", "W2"),
    ]
    assert found["solve_seconds"].tolist() == [1.0, 1.0, 5.0, 5.0]


def test_a_row_of_panels_per_model(tmp_path: Path) -> None:
    widths = [timed(1.0 + b, bits=b, result=90.0 + b) for b in (4, 3, 2)]
    found = points(tmp_path, *widths, timed(3.0, model="digits_vit", bits=2, result=80.0))
    axes = draw_times(found, ["W4", "W3", "W2"]).axes
    assert [axis.get_title(loc="left") for axis in axes] == [
        "Digits ResNet · W4",
        "W3",
        "W2",
        "Digits ViT · W2",
    ]
    assert {axis.get_xscale() for axis in axes} == {"log"}
    assert "higher is better" in axes[0].get_ylabel()


def test_nothing_without_times(tmp_path: Path) -> None:
    assert points(tmp_path, record(seconds={"total": 3.0})).empty
