from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from record_factory import failed, record, write

from analysis.collect import aggregate, collect
from analysis.curves import curve_points, draw_curves


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


def test_many_panels_have_one_legend_and_say_their_seeds_once(tmp_path: Path) -> None:
    many = [record(f"model{k}", bits=b, result=90.0 + b) for k in range(9) for b in (4, 2)]
    figure = draw_curves(curve_points(cells(tmp_path, *many)))
    assert not any(axis.get_title("right") for axis in figure.axes)
    assert not any(axis.texts and axis.texts[0].get_text() == "comq" for axis in figure.axes)
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "n = 1 seed"
    few = draw_curves(curve_points(cells(tmp_path / "few", *many[:4])))
    assert {axis.get_title("right") for axis in few.axes} == {"n = 1 seed"}


def test_the_front_is_what_nothing_beats(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        record(method="rtn", bits=4, result=97.0, stored=4.1),
        record(method="comq", bits=4, result=97.0, stored=4.2),
        record(method="comq", bits=2, result=90.0, stored=2.2),
        record(method="gptq", bits=3, result=89.0, stored=3.1),
        record("topics_llama", "rtn", 4, 4.0, metric="perplexity", before=3.9, stored=4.1),
        record("topics_llama", "rtn", 3, 5.0, metric="perplexity", before=3.9, stored=3.1),
        record("topics_llama", "comq", 4, 4.5, metric="perplexity", before=3.9, stored=4.0),
    )
    points = curve_points(found).set_index(["model", "method", "bits"])
    assert set(points.index[points["pareto"]]) == {
        ("digits_resnet", "rtn", "W4"),
        ("digits_resnet", "comq", "W2"),
        ("topics_llama", "rtn", "W4"),
        ("topics_llama", "rtn", "W3"),
        ("topics_llama", "comq", "W4"),
    }


def test_one_width_only_still_draws(tmp_path: Path) -> None:
    found = cells(tmp_path, record(method="rtn", result=80.0), record(method="comq", result=90.0))
    (axis,) = draw_curves(curve_points(found)).axes
    assert axis.get_xlim()[0] < 3.0625 < axis.get_xlim()[1]
    assert {text.get_text() for text in axis.texts} >= {"rtn", "comq", "float 98.50"}


def test_few_lines_are_labelled_in_place_and_many_in_a_legend(tmp_path: Path) -> None:
    few = [record(method=name, bits=b, result=50 + 10 * b) for name in ("rtn", "comq") for b in (2, 3, 4)]
    figure = draw_curves(curve_points(cells(tmp_path / "few", *few)))
    assert figure.legends == []
    many = [record(method=f"method{i}", bits=b, result=50 + 10 * b + i) for i in range(12) for b in (2, 3, 4)]
    figure = draw_curves(curve_points(cells(tmp_path / "many", *many)))
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(entries) == 14  # with the front and full precision
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().height > 0.9 * figure.dpi  # the legend squeezes nothing


def test_a_collapsed_point_does_not_squash_the_rest(tmp_path: Path) -> None:
    options = {"metric": "perplexity", "data": "topics", "before": 3.9}
    results = ((4, 3.95), (3, 4.3), (2, 60_000.0))
    found = cells(tmp_path, *(record("topics_llama", bits=b, result=r, **options) for b, r in results))
    (axis,) = draw_curves(curve_points(found)).axes
    heights = [axis.transAxes.inverted().transform(axis.transData.transform((3, r)))[1] for _, r in results]
    assert heights[1] - heights[0] > 0.1
    assert 0 < min(heights) < max(heights) < 1
