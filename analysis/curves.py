"""Figures: results against stored bits per coefficient, and the relative error of each layer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.collect import bits_order
from analysis.files import STYLE, write_csv, write_figure
from analysis.names import Metric, method_family, method_order
from analysis.tables import block_metric, split_by_model

COLUMN_WIDTH = 3.35  # inches: one column of a two-column page
FLOAT_LABEL = "full precision"
FLOAT_COLOUR = "#222222"
FLOAT_LINE: dict[str, Any] = {"color": FLOAT_COLOUR, "linestyle": (0, (5, 3)), "linewidth": 0.9}

# A colour and a marker per method, in every figure. The first eight colours are of Okabe and Ito.
MARKS = {
    "rtn": ("#767676", "o"),
    "gptq": ("#0072B2", "s"),
    "comq": ("#D55E00", "D"),
    "decoupleq": ("#009E73", "^"),
    "ptnq": ("#CC79A7", "v"),
    "hqq": ("#56B4E9", "P"),
    "awq": ("#E69F00", "X"),
    "qft": ("#332288", "p"),
    "gradient_ptq": ("#882255", "h"),
    "adaround": ("#999933", "<"),
    "brecq": ("#117733", ">"),
    "qdrop": ("#661100", "d"),
    "autoround": ("#AA4499", "8"),
}

VARIANT_LINES: tuple[Any, ...] = ("-", (0, (4, 1.2)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 1, 1, 1, 1, 1)))

# A fall of more points than this is drawn on an axis that is logarithmic below the best value.
LINEAR_SPAN = 15.0
LOG_OFFSET = 1.0


@dataclass(frozen=True)
class Mark:
    """How one line is drawn; a variant is hollow and dashed."""

    colour: str
    marker: str
    line: Any
    face: str

    def options(self) -> dict[str, Any]:
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.line,
            "markerfacecolor": self.face,
            "markeredgecolor": self.colour,
        }


def mark(label: str, family_labels: Sequence[str] = ()) -> Mark:
    """The mark of a label among all labels of a figure: variants of one family differ in their line."""
    family = method_family(label)
    if family in MARKS:
        colour, marker = MARKS[family]
    else:
        number = zlib.crc32(family.encode())
        marks = list(MARKS.values())
        colour, marker = marks[number % len(marks)][0], marks[number // len(marks) % len(marks)][1]
    relatives = {label, *(other for other in family_labels if method_family(other) == family)}
    position = sorted(relatives, key=method_order).index(label)
    return Mark(colour, marker, VARIANT_LINES[position % len(VARIANT_LINES)], "white" if position else colour)


def curve_points(cells: pd.DataFrame) -> pd.DataFrame:
    """The drawn points, one per cell of `collect.aggregate` that has a result and its bits per coefficient.

    `line` names the curve: the method, and the bits variant (group size, ends) where a figure holds several.
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
    return points


def draw_curves(points: pd.DataFrame) -> Figure:
    """A panel per model: x the exact stored bits per coefficient, y the result, one line per method."""
    panels = split_by_model(points)
    with mpl.rc_context(fname=STYLE):
        labels = sorted(set(points["line"]), key=method_order)
        columns = 1 if len(panels) <= 3 else 2
        figure, axes = _panels(len(panels), columns, COLUMN_WIDTH, 2.05, labels)
        bits = points["bits_per_coefficient"]
        margin = 0.06 * max(bits.max() - bits.min(), 0.5)
        for axis, (title, panel) in zip(axes, panels, strict=True):
            _draw_panel(axis, title, panel, labels)
            axis.set_xlim(bits.min() - margin, bits.max() + margin)
        _legend(figure, labels)
    return figure


def write_curves(cells: pd.DataFrame, folder: Path) -> list[Path]:
    """Write curves.png, .pdf and .csv; nothing when no cell has a result."""
    points = curve_points(cells)
    if points.empty:
        return []
    return [*write_figure(draw_curves(points), folder, "curves"), write_csv(folder / "curves.csv", points)]


def layer_points(layers: pd.DataFrame) -> pd.DataFrame:
    """Relative error per layer, averaged over seeds, layers in forward order."""
    keys = ["model", "data", "method", "bits", "position", "layer"]
    errors = layers.groupby(keys, sort=False)["relative_error"].agg(relative_error="mean", n="count")
    return errors.reset_index()


def draw_layer_errors(points: pd.DataFrame, bits: Sequence[str]) -> Figure:
    """A row of panels per model, a panel per bits setting in the order of `bits`, one line per method."""
    settings = {
        title: [each for each in bits if each in set(model["bits"])]
        for title, model in split_by_model(points)
    }
    panels = [
        (f"{title} · {setting}", model[model["bits"] == setting])
        for title, model in split_by_model(points)
        for setting in settings[title]
    ]
    columns = min(3, max(map(len, settings.values())))
    with mpl.rc_context(fname=STYLE):
        labels = sorted(set(points["method"]), key=method_order)
        figure, axes = _panels(len(panels), columns, COLUMN_WIDTH if columns == 1 else 2.3, 1.7, labels)
        for position, (axis, (title, panel)) in enumerate(zip(axes, panels, strict=True)):
            for label, line in panel.groupby("method"):
                shown = line[line["relative_error"] > 0]
                axis.plot(shown["position"], shown["relative_error"], **mark(label, labels).options())
            errors = panel.loc[panel["relative_error"] > 0, "relative_error"]
            if not errors.empty:
                _log_axis(axis, errors, margin=0.06)
            axis.set_title(title, loc="left")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            if position % columns == 0:
                axis.set_ylabel("relative error")
            if position + columns >= len(panels):
                axis.set_xlabel("layer, in forward order")
        _legend(figure, labels, with_float=False)
    return figure


def write_layer_errors(layers: pd.DataFrame, cells: pd.DataFrame, folder: Path) -> list[Path]:
    """Write layer_errors.png, .pdf and .csv; nothing when no record lists a positive error."""
    points = layer_points(layers)
    if not (points["relative_error"] > 0).any():
        return []
    order = {row["bits"]: bits_order(row) for _, row in cells.iterrows()}
    figure = draw_layer_errors(points, sorted(order, key=lambda setting: order[setting]))
    return [*write_figure(figure, folder, "layer_errors"), write_csv(folder / "layer_errors.csv", points)]


def pick_ticks(
    levels: Iterable[Sequence[float]],
    place: Callable[[float], float],
    low: float,
    high: float,
    enough: int = 4,
) -> list[float]:
    """Tick values between `low` and `high`: the roundest level first, none nearer than labels need.

    `place` maps a value to its height on the axis. Once `enough` are found, no less round level is asked.
    """
    gap = 0.13 * abs(place(high) - place(low))
    chosen: list[float] = []
    for level in levels:
        if len(chosen) >= enough:
            break
        for value in level:
            if low <= value <= high and all(abs(place(value) - place(other)) >= gap for other in chosen):
                chosen.append(value)
    return sorted(chosen)


def plain_number(value: float) -> str:
    """A tick label without a power of ten from 0.0001 up to a million: 0.05, 20, 3,000; else 1e6, 1e-5."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.10g}"


def _panels(
    count: int, columns: int, width: float, height: float, labels: Sequence[str]
) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(count / columns)
    legend_rows = math.ceil((len(labels) + 1) / _legend_columns([*labels, FLOAT_LABEL], width * columns))
    figure = Figure(figsize=(width * columns, height * rows + 0.16 * legend_rows + 0.25))
    axes = [figure.add_subplot(rows, columns, position + 1) for position in range(count)]
    return figure, axes


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """The most columns that fit; a legend is filled column by column, each as wide as its longest label."""
    for columns in range(min(5, len(labels)), 1, -1):
        rows = math.ceil(len(labels) / columns)
        longest = [max(map(len, labels[start : start + rows])) for start in range(0, len(labels), rows)]
        if sum(0.5 + 0.056 * length for length in longest) <= width:
            return columns
    return 1


def _legend(figure: Figure, labels: Sequence[str], with_float: bool = True) -> None:
    handles = [Line2D([], [], label=label, **mark(label, labels).options()) for label in labels]
    if with_float:
        handles.append(Line2D([], [], label=FLOAT_LABEL, **FLOAT_LINE))
    ncols = _legend_columns([str(handle.get_label()) for handle in handles], figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols)


def _draw_panel(axis: Axes, title: str, panel: pd.DataFrame, labels: Sequence[str]) -> None:
    metric = block_metric(panel)
    assert metric is not None
    for label in labels:
        line = panel[panel["line"] == label].sort_values("bits_per_coefficient")
        axis.errorbar(
            line["bits_per_coefficient"],
            line["mean"],
            yerr=line["std"].fillna(0.0) if (line["n"] > 1).any() else None,
            elinewidth=0.9,
            **mark(label, labels).options(),
        )
    before = panel["float"].dropna().unique()
    for value in before:
        axis.axhline(value, zorder=1.5, **FLOAT_LINE)
    spread = panel["std"].fillna(0.0)
    # On a log axis a spread as large as the mean has no lower end.
    lower = panel["mean"] - (spread if metric.higher_is_better else spread.clip(upper=panel["mean"] / 2))
    reached = pd.concat([lower, panel["mean"] + spread, panel["float"]])
    scale = _set_result_axis(axis, metric, reached[np.isfinite(reached)])
    if len(before):
        above = metric.higher_is_better
        axis.annotate(
            f"float {' / '.join(map(metric.format, sorted(before)))}",
            (0.01, max(before) if above else min(before)),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2 if above else -2.5),
            textcoords="offset points",
            va="bottom" if above else "top",
            color=FLOAT_COLOUR,
        )
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_xlabel("stored bits per coefficient")
    axis.set_ylabel(f"{metric.title}, {metric.direction}{scale}")
    axis.set_title(title, loc="left")
    axis.set_title(_count(panel["n"]), loc="right", fontsize=mpl.rcParams["xtick.labelsize"], color="#555555")


def _count(n: pd.Series) -> str:
    low, high = int(n.min()), int(n.max())
    if high == 1:
        return "n = 1 seed"
    return f"mean ± std, n = {low} seeds" if low == high else f"mean ± std, n = {low}–{high} seeds"


def _set_result_axis(axis: Axes, metric: Metric, values: pd.Series) -> str:
    """Set an axis that keeps near results apart when one collapses; return what its label must add."""
    if not metric.higher_is_better:
        _log_axis(axis, values[values > 0], margin=0.12)
        return ""
    low, high = values.min(), values.max()
    if high - low <= LINEAR_SPAN:
        margin = 0.12 * max(high - low, 0.5)
        axis.set_ylim(low - margin, high + margin)
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        return ""
    _drop_axis(axis, low, high)
    return "\n(log scale of the drop)"


def _drop_axis(axis: Axes, low: float, high: float) -> None:
    """Percent on an axis on which the distance below the best value is logarithmic."""
    edge = high + LOG_OFFSET

    def forward(value: Any) -> Any:
        return -np.log10(np.maximum(edge - np.asarray(value, dtype=float), 1e-9))

    def backward(height: Any) -> Any:
        return edge - 10.0 ** -np.asarray(height, dtype=float)

    margin = 0.12 * (forward(high) - forward(low))
    bottom = max(float(backward(forward(low) - 0.6 * margin)), -2.0)
    top = float(backward(forward(high) + margin))
    levels = [[*range(0, 100, step)][::-1] for step in (10, 5, 2, 1)]
    axis.set_yscale("function", functions=(forward, backward))
    axis.set_ylim(bottom, top)
    _set_ticks(axis, pick_ticks(levels, forward, max(bottom, 0.0), high, enough=8))


def _log_axis(axis: Axes, values: pd.Series, margin: float) -> None:
    """A log axis around `values` whose ticks are plain numbers."""
    low, high = math.log10(values.min()), math.log10(values.max())
    margin *= max(high - low, 0.02)
    bottom, top = 10 ** (low - margin), 10 ** (high + margin)
    decades = range(math.floor(low - margin) - 1, math.ceil(high + margin) + 1)
    steps = [
        [1],
        [2, 5],
        [3, 7],
        [1.5, 4],
        [i / 10 for i in range(10, 100)],
        [i / 100 for i in range(100, 1000)],
    ]
    levels = [[float(f"{step}e{decade}") for decade in decades for step in level] for level in steps]
    axis.set_yscale("log")
    axis.set_ylim(bottom, top)
    _set_ticks(axis, pick_ticks(levels, math.log10, 10 ** (low - margin / 2), top))


def _set_ticks(axis: Axes, ticks: Sequence[float]) -> None:
    axis.set_yticks(ticks, [plain_number(tick) for tick in ticks])
    axis.set_yticks([], minor=True)
