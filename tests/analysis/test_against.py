from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from record_factory import failed, record, write

from analysis.against import UnknownKeyError, against, markdown, ordered
from analysis.against_figure import draw_against
from analysis.collect import collect_all
from analysis.report import main


def swept(sweeps: int, result: float, order: str = "greedy", **options: Any) -> dict[str, Any]:
    return record(result=result, method_config={"sweeps": sweeps, "order": order}, **options)


def functions(name: str, result: float, **options: Any) -> dict[str, Any]:
    return record(method="ptnq_function", result=result, config={"grid": {"functions": [name]}}, **options)


def points(folder: Path, key: str, *records: dict[str, Any]) -> pd.DataFrame:
    return against(collect_all([write(folder, *records)]), key)


def test_a_row_per_value_and_line(tmp_path: Path) -> None:
    found = points(
        tmp_path,
        "method.sweeps",
        *(
            swept(k, 80 + k + shift, order)
            for k in (4, 1, 2)
            for order, shift in (("greedy", 1), ("natural", 0))
        ),
    )
    assert sorted(set(found["line"])) == ["comq (order=greedy)", "comq (order=natural)"]
    natural = found[found["line"] == "comq (order=natural)"].sort_values("value")
    assert natural["value"].tolist() == [1, 2, 4]
    assert natural["mean"].tolist() == [81, 82, 84]
    # the factory's errors at 3 bits are 0.04, 0.08, 0.12 and 0.16
    assert natural["layer_error"].tolist() == pytest.approx([0.1] * 3)


def test_seeds_are_one_point_and_failures_none(tmp_path: Path) -> None:
    found = points(
        tmp_path,
        "method.sweeps",
        swept(1, 80, seed=0),
        swept(1, 84, seed=1),
        swept(2, 90),
        failed(method_config={"sweeps": 3}),
    )
    one = found.set_index("value").loc[1]
    assert (one["mean"], one["n"], one["std"]) == (82, 2, pytest.approx(math.sqrt(8)))
    assert found["value"].tolist() == [1, 2]


def test_widths_are_lines_of_their_own(tmp_path: Path) -> None:
    jobs = [
        record(result=80, bits=bits, method_config={"shrink": [x]}) for bits in (2, 3) for x in (1.0, 0.65)
    ]
    found = points(tmp_path, "method.shrink", *jobs)
    assert set(found["line"]) == {"comq · W2", "comq · W3"}
    assert set(found["value"]) == {1.0, 0.65}  # a list of one is its item


def test_numbers_by_size_words_as_they_came() -> None:
    assert ordered([16, 4, 64, 4]) == [4, 16, 64]
    assert ordered(["sin", "exp", "sin"]) == ["sin", "exp"]


def test_a_key_with_one_value_is_refused_with_those_that_differ(tmp_path: Path) -> None:
    with pytest.raises(UnknownKeyError, match=r"one value of 'method.swps'.*differ in: method.sweeps"):
        points(tmp_path, "method.swps", swept(1, 80), swept(2, 81))


def test_markdown_and_figure_of_numbers(tmp_path: Path) -> None:
    found = points(tmp_path, "method.sweeps", swept(1, 80), swept(2, 81.5), swept(32, 90))
    text = markdown(found, "method.sweeps")
    assert "| sweeps |" in text
    assert "80.00 (0.100)" in text
    left, right, *_ = draw_against(found, "method.sweeps").axes
    assert left.get_xscale() == right.get_xscale() == "log"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1", "2", "32"]
    assert left.get_lines()[0].get_ydata().tolist() == [80, 81.5, 90]


def test_a_float_result_far_away_is_told_and_not_drawn(tmp_path: Path) -> None:
    options = {"metric": "perplexity", "before": 3.56}
    found = points(tmp_path, "method.sweeps", swept(1, 20.0, **options), swept(2, 21.0, **options))
    left, *_ = draw_against(found, "method.sweeps").axes
    assert left.get_title(loc="right") == "float 3.56, off the axis"
    assert left.get_ylim()[0] > 3.56


def test_words_stand_in_rows_the_best_on_top(tmp_path: Path) -> None:
    jobs = [functions("log", 10), functions("sin", 97), functions("linear", 95)]
    found = points(tmp_path, "grid.functions", *jobs)
    left, *_ = draw_against(found, "grid.functions").axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["log", "linear", "sin"]


def test_report_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "in", swept(1, 80), swept(2, 81))
    main([str(folder), "--output", str(tmp_path / "out"), "--against", "method.sweeps"])
    assert (tmp_path / "out" / "against.md").read_text().strip() in capsys.readouterr().out
    assert {"against.csv", "against.pdf", "against.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit, match="one value of 'seed'"):
        main([str(folder), "--against", "seed"])


def test_grids_are_one_column(tmp_path: Path) -> None:
    """Though each grid has keys of its own."""
    found = points(
        tmp_path,
        "choices.grid",
        record(grid="affine", result=90.0, config={"grid": {"range": "mse", "parameter_bits": 16}}),
        record(grid="power", result=91.0, config={"grid": {"t": [1.0, 0.5]}}),
    )
    assert set(found["line"]) == {"comq"}
    assert found.set_index("value")["mean"].to_dict() == {"affine": 90.0, "power": 91.0}
