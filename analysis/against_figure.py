"""The figure of an ablation: a row per model, the result on the left, the layers' error on the right."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from analysis.against import numeric, ordered
from analysis.files import STYLE
from analysis.names import METRICS, method_order
from analysis.plotting import (
    COLUMN_WIDTH,
    NOTE_COLOUR,
    float_line,
    handles,
    log_axis,
    mark,
    panels,
    result_axis,
)
from analysis.records import plain
from analysis.tables import split_by_model

HEIGHT = 1.9  # inches of a panel
LINE_HEIGHT = 0.14  # inches of a word on the axis
FLOAT_WITHIN = 2  # spans of the results that the float line may lie away from the nearest
LOG_FROM = 8  # numbers that span more than this factor stand on a log axis
ERROR_LABEL = "mean error of the layers"


def draw_against(points: pd.DataFrame, key: str) -> Figure:
    """Numbers run along the x axis, in lines; words stand in rows, the best of the first line on top."""
    blocks = split_by_model(points)
    labels = sorted(set(points["line"]), key=method_order)
    words = not numeric(list(points["value"]))
    height = max(HEIGHT, 0.6 + LINE_HEIGHT * points["value"].nunique()) if words else HEIGHT
    with mpl.rc_context(fname=STYLE):
        drawn = words or any(_is_near(_finite(b["mean"]), b["float"].dropna()) for _, b in blocks)
        entries = handles(labels, with_lines=not words, with_float=drawn)
        figure, axes = panels(2 * len(blocks), 2, COLUMN_WIDTH, height, entries)
        for row, (title, block) in enumerate(blocks):
            left, right = axes[2 * row : 2 * row + 2]
            left.set_title(title, loc="left")
            if words:
                _draw_words(left, right, block, labels)
            else:
                _draw_numbers(left, right, block, labels, key)
    return figure


def _draw_numbers(left: Axes, right: Axes, block: pd.DataFrame, labels: Sequence[str], key: str) -> None:
    values = [float(value) for value in ordered(list(block["value"]))]
    metric = METRICS[block["metric"].iloc[0]]
    for label in sorted(set(block["line"]), key=method_order):
        line = block[block["line"] == label].sort_values("value")
        for axis, column in ((left, "mean"), (right, "layer_error")):
            axis.plot(line["value"].astype(float), line[column], **mark(label, labels).options())
    for axis in (left, right):
        if values[0] > 0 and values[-1] > LOG_FROM * values[0]:
            axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(values, [plain(value) for value in values])
        axis.set_xlabel(key)
    results, before = _finite(block["mean"]), block["float"].dropna()
    near = _is_near(results, before)
    scale = result_axis(left, metric, pd.concat([results, before]) if near else results)
    left.set_ylabel(f"{metric.title}, {metric.direction}{scale}")
    _error_axis(right, block)
    right.set_ylabel(ERROR_LABEL)
    if near:
        float_line(left, metric, before)
    elif len(before):
        note = f"float {metric.format(before.mean())}, off the axis"
        left.set_title(note, loc="right", fontsize=mpl.rcParams["xtick.labelsize"], color=NOTE_COLOUR)


def _is_near(results: pd.Series, before: pd.Series) -> bool:
    """Whether an axis that reaches to the float result still shows how the results differ."""
    if results.empty or before.empty:
        return False
    distance = (results - before.mean()).abs()
    return bool(distance.min() <= FLOAT_WITHIN * max(results.max() - results.min(), 1e-9))


def _draw_words(left: Axes, right: Axes, block: pd.DataFrame, labels: Sequence[str]) -> None:
    metric = METRICS[block["metric"].iloc[0]]
    lines = sorted(set(block["line"]), key=method_order)
    first = block[block["line"] == lines[0]].set_index("value")["mean"]
    best = first.sort_values(ascending=metric.higher_is_better, na_position="first")
    words = [*(value for value in ordered(list(block["value"])) if value not in best.index), *best.index]
    places = {value: place for place, value in enumerate(words)}
    for label in lines:
        line = block[block["line"] == label]
        heights = [places[value] for value in line["value"]]
        for axis, column in ((left, "mean"), (right, "layer_error")):
            axis.plot(line[column], heights, **(mark(label, labels).options() | {"linestyle": ""}))
    for axis in (left, right):
        axis.set_yticks(range(len(words)), [plain(value) for value in words])
        axis.set_ylim(-0.6, len(words) - 0.4)
        axis.grid(True, axis="y")
    if not metric.higher_is_better and block["mean"].max() > 3 * block["mean"].min():
        log_axis(left, block["mean"], margin=0.1, which="x")
    before = block["float"].dropna()
    if len(before):
        left.axvline(before.mean(), color="#222222", linestyle=(0, (5, 3)), linewidth=0.9, zorder=1.5)
    left.set_xlabel(f"{metric.title}, {metric.direction}")
    errors = _finite(block["layer_error"])
    if len(errors) and errors.max() > 3 * errors.min() > 0:
        log_axis(right, errors, margin=0.1, which="x")
    else:
        right.xaxis.set_major_locator(MaxNLocator(4))
    right.set_xlabel(ERROR_LABEL)


def _error_axis(axis: Axes, block: pd.DataFrame) -> None:
    errors = _finite(block["layer_error"])
    errors = errors[errors > 0]
    if not errors.empty:
        log_axis(axis, errors, margin=0.1)


def _finite(values: pd.Series) -> pd.Series:
    return values[np.isfinite(values.astype(float))]
