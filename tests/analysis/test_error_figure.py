"""Errors against stored bits: means over layers by their weights, and the limit's line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from record_factory import record, write

from analysis.collect import aggregate, collect_all
from analysis.error_figure import draw_errors, error_points, limit_line
from analysis.figures import draw
from analysis.layer_figure import LIMIT_LABEL


def layer(error: float, limit: float | None, stored: float = 3.5, weights: int = 64) -> dict[str, Any]:
    shape = [1, 1, weights]
    return {
        "name": "l",
        "shape": shape,
        "relative_error": error,
        "bits_per_coefficient": stored,
        "limit_bits": limit,
    }


def points(folder: Path, *records: dict[str, Any]) -> pd.DataFrame:
    return error_points(collect_all([write(folder, *records)]).layers)


def test_layers_count_as_their_weights_and_those_without_a_limit_do_not(tmp_path: Path) -> None:
    layers = [
        layer(0.1, 1.0, weights=100),
        layer(0.001, 3.0, 5.5, weights=300),
        layer(0.5, None),
        layer(0, 9.0),
    ]
    found = points(tmp_path, record(layers=layers))
    assert found["bits_per_coefficient"].tolist() == [5.0]
    assert found["limit_bits"].tolist() == [2.5]
    assert found["relative_error"].tolist() == pytest.approx([10**-2.5])


def test_the_line_is_that_of_the_method_with_the_most_points(tmp_path: Path) -> None:
    runs = [("rtn", 3, 0.2, 1.0), ("comq", 3, 0.05, 3.0), ("rtn", 2, 0.4, 0.5), ("gptq", 3, 0.1, 2.0)]
    found = points(tmp_path, *(record(method=m, bits=b, layers=[layer(e, r)]) for m, b, e, r in runs))
    line = limit_line(found)
    assert line["limit_bits"].tolist() == [1.0, 0.5]
    assert line["relative_error"].tolist() == pytest.approx([0.2, 0.4])
    assert limit_line(found[found["bits"] == "W3"])["limit_bits"].tolist() == [3.0]
    axis = draw_errors(found).axes[0]
    assert LIMIT_LABEL in [text.get_text() for text in axis.texts]
    assert axis.get_yscale() == "log"


def test_drawn_where_there_is_a_limit(tmp_path: Path) -> None:
    with_limit = collect_all([write(tmp_path / "a", record(layers=[layer(0.1, 1.0)]))])
    without = collect_all([write(tmp_path / "b", record(layers=[layer(0.1, None)]))])
    assert "errors" in draw(aggregate(with_limit.frame), with_limit.layers).figures
    assert "errors" not in draw(aggregate(without.frame), without.layers).figures
