"""What a result costs: the seconds of the method against the result, a panel per model and bits setting.

The passes that collect calibration statistics are the same for all methods and are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.curves import pareto_front
from analysis.direct_labels import label_points, labelled_directly
from analysis.files import STYLE
from analysis.names import method_order
from analysis.plotting import (
    NOTE_COLOUR,
    PARETO_LINE,
    float_line,
    handles,
    log_axis,
    mark,
    panels,
    result_axis,
    strip_panels,
    strip_rows,
    wide,
)
from analysis.tables import block_metric, split_by_model

SECONDS = "solve_seconds"
X_LABEL = "seconds, without calibration"


def time_points(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with a result and a time; `pareto`: no other of its panel is as good in less time."""
    known = [
        math.isfinite(row["mean"]) and math.isfinite(row[SECONDS]) and row[SECONDS] > 0
        for _, row in cells.iterrows()
    ]
    names = ["model", "data", "metric", "method", "bits", SECONDS, "mean", "std", "n", "float"]
    points = cells.loc[known, names].copy()
    front: list[int] = []
    for _, block in split_by_model(points):
        metric = block_metric(block)
        assert metric is not None
        for _, panel in block.groupby("bits"):
            front += pareto_front(panel, SECONDS, metric.higher_is_better)
    return points.assign(pareto=points.index.isin(front))


def draw_times(points: pd.DataFrame, settings: Sequence[str], labels: Sequence[str] = ()) -> Figure:
    """A row of panels per model, a panel per bits setting: x the seconds on a log axis, y the result."""
    rows, columns = strip_rows(points, settings)
    with mpl.rc_context(fname=STYLE):
        shown = sorted(set(points["method"]), key=method_order)
        labels, direct = labels or shown, labelled_directly(shown)
        entries = [] if direct else handles(shown, labels, with_pareto=True, with_lines=False)
        figure, axes = panels(len(rows) * columns, columns, wide(columns), 1.75, entries)
        drawn: list[tuple[Axes, pd.DataFrame]] = []
        for axis, panel, first in strip_panels(axes, rows, columns, X_LABEL):
            _draw_panel(axis, panel, labels, named=first, margin=0.2 if direct else 0.1)
            drawn.append((axis, panel))
        for axis, panel in drawn:
            metric = block_metric(panel)
            assert metric is not None
            if direct:
                places = {row["method"]: (row[SECONDS], row["mean"]) for _, row in panel.iterrows()}
                label_points(figure, axis, places, labels, panel["float"].dropna())
            float_line(axis, metric, panel["float"].dropna())
    return figure


def _draw_panel(
    axis: Axes, panel: pd.DataFrame, labels: Sequence[str], *, named: bool, margin: float
) -> None:
    metric = block_metric(panel)
    assert metric is not None
    front = panel[panel["pareto"]].sort_values(SECONDS)
    axis.plot(front[SECONDS], front["mean"], **PARETO_LINE)
    for label in sorted(set(panel["method"]), key=method_order):
        cell = panel[panel["method"] == label]
        options = mark(label, labels).options() | {"linestyle": ""}
        spread = cell["std"].fillna(0.0) if (cell["n"] > 1).any() else None
        axis.errorbar(cell[SECONDS], cell["mean"], yerr=spread, elinewidth=0.9, **options)
    reached = pd.concat([panel["mean"], panel["float"]])
    scale = result_axis(axis, metric, reached[np.isfinite(reached)])
    log_axis(axis, panel[SECONDS], margin=margin, which="x")
    if named:
        axis.set_ylabel(f"{metric.title}, {metric.direction}{scale}")
    elif scale:
        size = mpl.rcParams["xtick.labelsize"]
        axis.set_title(scale.strip("\n()"), loc="right", fontsize=size, color=NOTE_COLOUR)
