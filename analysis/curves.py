"""Results against stored bits per coefficient: a panel per model, a line per method, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from analysis.direct_labels import label_lines, labelled_directly
from analysis.files import STYLE
from analysis.names import method_order
from analysis.plotting import (
    NOTE_COLOUR,
    PARETO_LINE,
    float_line,
    handles,
    is_bottom,
    mark,
    panels,
    result_axis,
    seeds_note,
    wide,
)
from analysis.tables import block_metric, split_by_model

HEIGHT = 2.05  # inches of a panel


def curve_points(cells: pd.DataFrame) -> pd.DataFrame:
    """The drawn points, one per cell of `collect.aggregate` that has a result and its bits per coefficient.

    `line` names the curve: the method, and the bits variant (group size, ends) where a figure holds several.
    `pareto` says that no other point of the model is as good with fewer bits, or better with as many.
    """
    metrics = {
        index: metric
        for _, block in split_by_model(cells)
        if (metric := block_metric(block))
        for index in block.index
    }
    drawn = [
        index in metrics and all(math.isfinite(row[key]) for key in ("mean", "bits_per_coefficient"))
        for index, row in cells.iterrows()
    ]
    points = cells[drawn]
    several = points["bits_variant"].nunique() > 1
    lines = [
        f"{row['method']} · {row['bits_variant']}" if several and row["bits_variant"] else row["method"]
        for _, row in points.iterrows()
    ]
    names = ["model", "data", "metric", "method", "bits", "bits_per_coefficient", "mean", "std", "n", "float"]
    points = points[names].copy()
    points.insert(4, "line", lines)
    points["metric"] = [metrics[index].name for index in points.index]
    front = [
        index
        for _, block in split_by_model(points)
        for index in pareto_front(block, "bits_per_coefficient", metrics[block.index[0]].higher_is_better)
    ]
    return points.assign(pareto=points.index.isin(front))


def pareto_front(block: pd.DataFrame, cost: str, higher_is_better: bool) -> list[int]:
    """Index labels of the rows that no other row beats in both `cost` and `mean`, by rising cost."""
    quality = block["mean"] if higher_is_better else -block["mean"]
    order = pd.DataFrame({"cost": block[cost], "quality": quality}).sort_values(
        ["cost", "quality"], ascending=[True, False]
    )
    best = order["quality"].cummax().shift(fill_value=-math.inf)
    return list(order.index[order["quality"] > best])


def draw_curves(points: pd.DataFrame, labels: Sequence[str] = ()) -> Figure:
    """A panel per model: x the exact stored bits per coefficient, y the result, one line per method.

    Up to three panels stand above each other in one column of a page; more than eight in three, too narrow
    for labels at the lines and for a note beside each title. `labels` are those of a larger set of figures
    that share their marks.
    """
    blocks = split_by_model(points)
    count = len(blocks)
    columns = 1 if count <= 3 else 2 if count <= 8 else 3
    with mpl.rc_context(fname=STYLE):
        drawn = sorted(set(points["line"]), key=method_order)
        labels = labels or drawn
        direct = labelled_directly(drawn) and columns < 3
        entries = [] if direct else handles(drawn, labels, with_pareto=True)
        notes = {seeds_note(block["n"]) for _, block in blocks}
        common = notes.pop() if columns == 3 and len(notes) == 1 else ""
        figure, axes = panels(count, columns, wide(columns), HEIGHT, entries, common)
        for position, (axis, (title, block)) in enumerate(zip(axes, blocks, strict=True)):
            _draw_panel(axis, title, block, labels, note=not common)
            if is_bottom(position, count, columns):
                axis.set_xlabel("stored bits per coefficient")
        for axis, (_, block) in zip(axes, blocks, strict=True):
            if direct:
                label_lines(figure, axis, _starts(block), labels)
                # no ticks in the room that labels stand in; a rate of 1 is met within 0.01
                first = math.floor(block["bits_per_coefficient"].min() + 0.01)
                low, high = axis.get_xlim()
                ticks = [tick for tick in axis.get_xticks() if max(first, low) <= tick <= high]
                axis.xaxis.set_major_locator(FixedLocator(ticks))
            metric = block_metric(block)
            assert metric is not None
            float_line(axis, metric, block["float"].dropna())
    return figure


def _draw_panel(axis: Axes, title: str, block: pd.DataFrame, labels: Sequence[str], *, note: bool) -> None:
    metric = block_metric(block)
    assert metric is not None
    front = block[block["pareto"]].sort_values("bits_per_coefficient")
    axis.plot(front["bits_per_coefficient"], front["mean"], **PARETO_LINE)
    for label in sorted(set(block["line"]), key=method_order):
        line = block[block["line"] == label].sort_values("bits_per_coefficient")
        axis.errorbar(
            line["bits_per_coefficient"],
            line["mean"],
            yerr=line["std"].fillna(0.0) if (line["n"] > 1).any() else None,
            elinewidth=0.9,
            **mark(label, labels).options(),
        )
    spread = block["std"].fillna(0.0)
    # On a log axis a spread as large as the mean has no lower end.
    lower = block["mean"] - (spread if metric.higher_is_better else spread.clip(upper=block["mean"] / 2))
    reached = pd.concat([lower, block["mean"] + spread, block["float"]])
    scale = result_axis(axis, metric, reached[np.isfinite(reached)])
    bits = block["bits_per_coefficient"]
    margin = 0.06 * max(bits.max() - bits.min(), 0.5)
    axis.set_xlim(bits.min() - margin, bits.max() + margin)
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_ylabel(f"{metric.title}, {metric.direction}{scale}")
    axis.set_title(title, loc="left")
    if note:
        size = mpl.rcParams["xtick.labelsize"]
        axis.set_title(seeds_note(block["n"]), loc="right", fontsize=size, color=NOTE_COLOUR)


def _starts(block: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """The point with the fewest bits of each line."""
    first = block.sort_values("bits_per_coefficient").drop_duplicates("line")
    return {row["line"]: (row["bits_per_coefficient"], row["mean"]) for _, row in first.iterrows()}
