from __future__ import annotations

import numpy as np
import pytest

from analysis.level_figure import draw_levels, level_points

WEIGHTS = np.array([-1.0, -0.4, -0.1, 0.0, 0.1, 0.4, 0.9, 0.1])
LEVELS = [-1.0, 0.0, 1.0, 2.0]
VALUES = np.array([-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0])


def test_levels_have_their_share_of_the_weights() -> None:
    points = level_points(WEIGHTS, {"affine": (LEVELS, VALUES)})
    levels = points[points["kind"] == "level"].set_index("value")
    assert levels["share"].to_dict() == {-1.0: 1 / 8, 0.0: 6 / 8, 1.0: 1 / 8, 2.0: 0.0}
    error = np.linalg.norm(WEIGHTS - VALUES) / np.linalg.norm(WEIGHTS)
    assert levels["error"].tolist() == pytest.approx([error] * 4)


def test_the_histogram_holds_every_weight_once_with_a_bin_at_zero() -> None:
    bins = level_points(WEIGHTS, {}).set_index("value")
    assert bins["share"].sum() == pytest.approx(1.0)
    assert np.abs(bins.index).min() == pytest.approx(0.0, abs=1e-12)
    assert bins.index.min() - bins["width"].iloc[0] / 2 == pytest.approx(-1.0)


def test_a_panel_per_grid_with_its_error_and_every_level_inside() -> None:
    points = level_points(WEIGHTS, {"affine": (LEVELS, VALUES), "mine": (WEIGHTS, WEIGHTS)})
    first, second = draw_levels(points, "a layer").axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("affine", "mine")
    assert second.get_title(loc="right") == "relative error 0.000"
    drawn = [path for lines in first.collections for path in lines.get_paths()]
    assert len(drawn) == len(LEVELS)
    assert first.get_xlim()[1] > max(LEVELS)
