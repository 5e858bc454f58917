from __future__ import annotations

import math
from pathlib import Path

import pytest
from record_factory import record, write

from analysis.against import against
from analysis.collect import aggregate, collect_all
from analysis.figures import draw
from analysis.layer_figure import LIMIT_LABEL, draw_layers, layer_points
from analysis.report import write_report


def layers(*errors: float | None, limit: float | None = 2.0) -> list[dict]:
    return [
        {
            "name": f"layer{i}",
            "shape": [1, 8, 8],
            "relative_error": e,
            "bits_per_coefficient": 3.5,
            "limit_bits": limit,
        }
        for i, e in enumerate(errors)
    ]


def test_points_are_means_over_seeds_with_the_bits_above_the_limit(tmp_path: Path) -> None:
    write(tmp_path, record(seed=0, layers=layers(0.1, 0.2)), record(seed=1, layers=layers(0.3, 0.2)))
    points = layer_points(collect_all([tmp_path]).layers)
    assert points["relative_error"].tolist() == pytest.approx([0.2, 0.2])
    assert points["bits_above_limit"].tolist() == [1.5, 1.5]
    assert points["n"].tolist() == [2, 2]
    assert points["position"].tolist() == [1, 2]


def test_a_column_per_width_and_a_row_for_the_limit(tmp_path: Path) -> None:
    write(tmp_path, *(record(bits=bits, layers=layers(0.1, 0.01)) for bits in (4, 2)))
    points = layer_points(collect_all([tmp_path]).layers)
    axes = draw_layers(points, "Digits", ["W4", "W3", "W2"]).axes
    assert [axis.get_title(loc="left") for axis in axes] == ["Digits · W4", "W2", "", ""]
    assert [axis.get_yscale() for axis in axes] == ["log", "log", "linear", "linear"]
    assert all(LIMIT_LABEL in [text.get_text() for text in axis.texts] for axis in axes[2:])
    assert axes[2].get_ylim()[0] < 0 < 1.5 < axes[2].get_ylim()[1]


def test_without_a_limit_errors_only(tmp_path: Path) -> None:
    write(tmp_path, record(layers=layers(0.1, 0.0, limit=None)))
    points = layer_points(collect_all([tmp_path]).layers)
    assert len(draw_layers(points, "Digits", ["W3"]).axes) == 1


def test_a_fourth_width_goes_below(tmp_path: Path) -> None:
    write(tmp_path, *(record(bits=bits, layers=layers(0.1, 0.2)) for bits in (2, 3, 4, 5)))
    points = layer_points(collect_all([tmp_path]).layers)
    titles = [axis.get_title(loc="left") for axis in draw_layers(points, "D", ["W5", "W4", "W3", "W2"]).axes]
    assert [title for title in titles if title] == ["D · W5", "W4", "W3", "D · W2"]


def test_a_figure_per_model_and_nothing_without_errors(tmp_path: Path) -> None:
    write(tmp_path, record(), record("digits_vit", layers=layers(0.0)))
    found = collect_all([tmp_path])
    drawn = draw(aggregate(found.frame), found.layers)
    assert list(drawn.figures) == ["curves", "time", "layers_digits_resnet"]
    assert drawn.of_model == {("digits_resnet", "digits"): "layers_digits_resnet"}


def test_a_network_whose_errors_are_not_known_leaves_gaps(tmp_path: Path) -> None:
    """As where one too large to keep its problems is trained as a whole."""
    unknown = record(method="brecq", method_config={"sweeps": 1}, layers=layers(None, None, limit=None))
    write(tmp_path, record(layers=layers(0.1, 0.2), method_config={"sweeps": 2}), unknown)
    found = collect_all([tmp_path])
    points = layer_points(found.layers)
    assert points.groupby("method")["n"].sum().to_dict() == {"brecq": 0, "comq": 2}
    drawn = draw(aggregate(found.frame), found.layers)
    assert set(drawn.points["errors"]["method"]) == {"comq"}
    write_report([tmp_path], tmp_path / "out", html=True)
    assert "layer1" in (tmp_path / "out" / "report.html").read_text()
    by_sweeps = against(found, "method.sweeps").set_index("value")["layer_error"]
    assert by_sweeps[2] == pytest.approx(0.15)
    assert math.isnan(by_sweeps[1])
