from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from record_factory import record, write

from analysis.collect import aggregate, collect_all
from analysis.figures import draw
from analysis.layer_figure import bits_settings
from analysis.loss_curves import GRID, draw_losses, loss_points, mean_curve


def unit(name: str, *losses: float, steps: int = 40) -> dict:
    return {"unit": name, "steps": steps, "losses": list(losses)}


def test_points_lie_in_the_middle_of_their_stretch(tmp_path: Path) -> None:
    write(tmp_path, record(tuning=[unit("a", 4.0, 2.0, 1.0, 0.5), unit("short", 1.0)]), record(bits=2))
    points = loss_points(collect_all([tmp_path]))
    assert points["unit"].tolist() == ["a"] * 4
    assert points["step"].tolist() == [5.0, 15.0, 25.0, 35.0]
    assert points["loss"].tolist() == [4.0, 2.0, 1.0, 0.5]


def test_the_line_is_the_geometric_mean_of_relative_losses(tmp_path: Path) -> None:
    write(tmp_path, record(tuning=[unit("a", 4.0, 1.0), unit("b", 100.0, 100.0), unit("c", 0.0, 0.0)]))
    curve = mean_curve(loss_points(collect_all([tmp_path])))
    assert curve is not None
    assert (len(curve), curve[0], curve[-1]) == (len(GRID), 1.0, pytest.approx(0.5))
    assert (np.diff(curve) < 0).all()


def test_a_panel_per_model_and_bits(tmp_path: Path) -> None:
    tuned = [unit("network", 3.0, 2.0, 1.0)]
    write(
        tmp_path,
        *(record(method="qft", bits=bits, tuning=tuned) for bits in (4, 2)),
        record("digits_vit", method="brecq", tuning=tuned),
        record("digits_vit", method="comq"),
    )
    found = collect_all([tmp_path])
    cells = aggregate(found.frame)
    axes = draw_losses(loss_points(found), bits_settings(cells)).axes
    assert len(axes) == 3
    assert [len(axis.lines) for axis in axes] == [1, 1, 1]
    assert axes[0].get_ylabel() == "loss / first loss"
    drawn = draw(cells, found.layers)
    drawn.add_losses(loss_points(found), cells)
    assert {path.name for path in drawn.write(tmp_path / "out")} >= {"losses.pdf", "losses.csv"}


def test_nothing_is_drawn_without_losses(tmp_path: Path) -> None:
    write(tmp_path, record())
    found = collect_all([tmp_path])
    cells = aggregate(found.frame)
    drawn = draw(cells, found.layers)
    drawn.add_losses(loss_points(found), cells)
    assert "losses" not in drawn.figures
