"""What figures share: marks per method, panels, legends, labels beside lines, axes with plain numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.names import Metric, method_family, method_order, short_labels
from analysis.tables import split_by_model

COLUMN_WIDTH = 3.35  # inches: one column of a two-column page
NARROW_WIDTH = 2.3  # three panels side by side on a page
ENTRY_HEIGHT = 0.16  # inches of one line of a legend
FLOAT_LABEL = "full precision"
FLOAT_COLOUR = "#222222"
FLOAT_LINE: dict[str, Any] = {"color": FLOAT_COLOUR, "linestyle": (0, (5, 3)), "linewidth": 0.9}
PARETO_LABEL = "Pareto front"
PARETO_LINE: dict[str, Any] = {"color": "#dcdcdc", "linewidth": 5.5, "solid_capstyle": "round", "zorder": 1.2}
NOTE_COLOUR = "#555555"

# A colour and a marker per method, in every figure. The first eight colours are of Okabe and Ito.
MARKS = {
    "rtn": ("#767676", "o"),
    "gptq": ("#0072B2", "s"),
    "comq": ("#D55E00", "D"),
    "decoupleq": ("#009E73", "^"),
    "ptnq": ("#CC79A7", "v"),
    "ptnq_affine": ("#7A7A00", "*"),
    "hqq": ("#56B4E9", "P"),
    "awq": ("#E69F00", "X"),
    "qft": ("#332288", "p"),
    "gradient_ptq": ("#882255", "h"),
    "adaround": ("#999933", "<"),
    "brecq": ("#117733", ">"),
    "qdrop": ("#661100", "d"),
    "autoround": ("#AA4499", "8"),
    "watersic": ("#44AA99", "H"),
}

VARIANT_LINES: tuple[Any, ...] = ("-", (0, (4, 1.2)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 1, 1, 1, 1, 1)))

# A fall of more points, or a rise by a larger factor, is drawn on an axis logarithmic in the loss.
LINEAR_SPAN = 15.0
LINEAR_FACTOR = 1.6
POINTS_OFFSET = 1.0  # points below the best value where the logarithm begins
NATS_OFFSET = 0.02  # and nats (of log perplexity) above it

ROUND_STEPS = [
    [1],
    [2, 5],
    [3, 7],
    [1.5, 4],
    [2.5, 6, 8],
    [i / 10 for i in range(10, 100, 2)],
    [i / 10 for i in range(11, 100, 2)],
    [i / 100 for i in range(100, 1000)],
]


@dataclass(frozen=True)
class Mark:
    """How one line is drawn; a variant is hollow or pale, and dashed."""

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
    face = (colour, "white", _tint(colour))[min(position, 1) + (position > 1 and position % 2 == 0)]
    return Mark(colour, marker, VARIANT_LINES[position % len(VARIANT_LINES)], face)


def _tint(colour: str) -> str:
    """The colour mixed with as much white."""
    return "#" + "".join(f"{(int(colour[i : i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


def handles(
    drawn: Sequence[str],
    labels: Sequence[str] = (),
    *,
    with_float: bool = True,
    with_pareto: bool = False,
    with_lines: bool = True,
    with_markers: bool = True,
) -> list[Line2D]:
    """The entries of a legend: the labels drawn, marked as among all `labels`."""
    labels = labels or drawn
    short = short_labels(labels)
    found = []
    for label in drawn:
        options = mark(label, labels).options()
        options |= {} if with_lines else {"linestyle": ""}
        options |= {} if with_markers else {"marker": ""}
        found.append(Line2D([], [], label=short[label], **options))
    if with_pareto:
        found.append(Line2D([], [], label=PARETO_LABEL, **PARETO_LINE))
    if with_float:
        found.append(Line2D([], [], label=FLOAT_LABEL, **FLOAT_LINE))
    return found


def panels(
    count: int, columns: int, width: float, height: float, entries: Sequence[Line2D] = (), note: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, `columns` side by side, each `width` × `height` inches, and its legend under
    `note`.

    The legend stands in the place that the last row leaves free if it fits there, else below all panels.
    """
    rows = math.ceil(count / columns)
    labels = [str(entry.get_label()) for entry in entries]
    within = min(2, _columns(labels, width))
    inside = count < rows * columns and math.ceil(len(labels) / within) * ENTRY_HEIGHT < height
    below = 0.0 if inside or not entries else math.ceil(len(labels) / _columns(labels, width * columns))
    figure = Figure(figsize=(width * columns, height * rows + ENTRY_HEIGHT * below + (0.1 if below else 0.0)))
    axes = [figure.add_subplot(rows, columns, position + 1) for position in range(count)]
    if inside and entries:
        corner = figure.add_subplot(rows, columns, rows * columns)
        corner.axis("off")
        corner.legend(handles=list(entries), loc="center", ncols=within, title=note or None)
    elif entries:
        figure.legend(
            handles=list(entries),
            loc="outside lower center",
            ncols=_columns(labels, width * columns),
            title=note or None,
        )
    return figure, axes


def wide(columns: int) -> float:
    """Width of a panel of which `columns` stand side by side, inches."""
    return NARROW_WIDTH if columns > 2 else COLUMN_WIDTH


def strips(settings: Sequence[str], columns: int = 3) -> list[list[str]]:
    """Settings in rows of `columns` panels."""
    return [list(settings[start : start + columns]) for start in range(0, len(settings), columns)]


def strip_rows(
    points: pd.DataFrame, settings: Sequence[str], columns: int = 3
) -> tuple[list[tuple[str, pd.DataFrame, list[str]]], int]:
    """Rows of panels (title, points of one model, bits settings), and the panels that a row has."""
    blocks = split_by_model(points)
    present = [[each for each in settings if each in set(block["bits"])] for _, block in blocks]
    columns = min(columns, max(map(len, present)))
    rows = [
        (title, block, strip)
        for (title, block), own in zip(blocks, present, strict=True)
        for strip in strips(own, columns)
    ]
    return rows, columns


def strip_panels(
    axes: Sequence[Axes], rows: Sequence[tuple[str, pd.DataFrame, list[str]]], columns: int, x_label: str
) -> Iterator[tuple[Axes, pd.DataFrame, bool]]:
    """The panels of `strip_rows` on `axes`, titled, with the points of their bits setting and whether they
    stand first in their row; axes without a panel are removed.
    """
    for row, (title, block, strip) in enumerate(rows):
        for column, axis in enumerate(axes[row * columns : (row + 1) * columns]):
            if column >= len(strip):
                axis.remove()
                continue
            yield axis, block[block["bits"] == strip[column]], column == 0
            axis.set_title(f"{title} · {strip[column]}" if column == 0 else strip[column], loc="left")
            if row == len(rows) - 1:
                axis.set_xlabel(x_label)


def is_bottom(position: int, count: int, columns: int) -> bool:
    """Whether no panel stands below this one."""
    return position + columns >= count


def float_line(axis: Axes, metric: Metric, values: Iterable[float]) -> None:
    """The results before quantization, each a line, named where no point is in the way; limits are set."""
    before = sorted(set(values))
    for value in before:
        axis.axhline(value, zorder=1.5, **FLOAT_LINE)
    if not before:
        return
    above = metric.higher_is_better
    level = max(before) if above else min(before)
    to_axes = axis.transData + axis.transAxes.inverted()
    height = to_axes.transform((0, level))[1]
    taken = [
        to_axes.transform(point)
        for line in axis.get_lines()
        if line.get_transform() == axis.transData
        for point in np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float)
    ]
    near = [x for x, y in taken if 0.02 < (y - height if above else height - y) + 0.04 < 0.18]
    start = min((0.01, 0.64, 0.33), key=lambda x: sum(x - 0.03 <= other <= x + 0.36 for other in near))
    axis.annotate(
        f"float {' / '.join(map(metric.format, before))}",
        (start, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2 if above else -2.5),
        textcoords="offset points",
        va="bottom" if above else "top",
        color=FLOAT_COLOUR,
    )


def result_axis(axis: Axes, metric: Metric, values: pd.Series) -> str:
    """Set an axis that keeps near results apart when one collapses; return what its label must add."""
    if metric.higher_is_better:
        low, high = values.min(), values.max()
        if high - low <= LINEAR_SPAN:
            margin = 0.12 * max(high - low, 0.5)
            axis.set_ylim(low - margin, high + margin)
            axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            return ""
        _drop_axis(axis, low, high)
        return "\n(log scale of the drop)"
    values = values[values > 0]
    if values.max() <= LINEAR_FACTOR * values.min():
        log_axis(axis, values, margin=0.17)
        return ""
    _rise_axis(axis, values.min(), values.max())
    return "\n(log scale of the rise)"


def log_axis(axis: Axes, values: pd.Series, margin: float, which: str = "y") -> None:
    """A log axis around positive `values` whose ticks are plain numbers."""
    low, high = math.log10(values.min()), math.log10(values.max())
    margin *= max(high - low, 0.02)
    bottom, top = 10 ** (low - margin), 10 ** (high + margin)
    ticks = pick_ticks(_round_numbers(low - margin, high + margin), math.log10, 10 ** (low - margin / 2), top)
    texts = [plain_number(tick) for tick in ticks]
    if which == "x":
        axis.set_xscale("log")
        axis.set_xlim(bottom, top)
        axis.set_xticks(ticks, texts)
        axis.set_xticks([], minor=True)
        return
    axis.set_yscale("log")
    axis.set_ylim(bottom, top)
    _set_ticks(axis, ticks)


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


def seeds_note(n: pd.Series) -> str:
    """`n = 1 seed`, `mean ± std, n = 2–3 seeds`."""
    low, high = int(n.min()), int(n.max())
    if high == 1:
        return "n = 1 seed"
    return f"mean ± std, n = {low} seeds" if low == high else f"mean ± std, n = {low}–{high} seeds"


def _columns(labels: Sequence[str], width: float) -> int:
    """The most columns that fit; a legend is filled column by column, each as wide as its longest label."""
    for columns in range(min(6, len(labels)), 1, -1):
        rows = math.ceil(len(labels) / columns)
        longest = [max(map(len, labels[start : start + rows])) for start in range(0, len(labels), rows)]
        if sum(0.5 + 0.056 * length for length in longest) <= width:
            return columns
    return 1


def _round_numbers(low: float, high: float) -> list[list[float]]:
    """Numbers from 10^low to 10^high, the roundest first."""
    decades = range(math.floor(low) - 1, math.ceil(high) + 1)
    return [[float(f"{step}e{decade}") for decade in decades for step in level] for level in ROUND_STEPS]


def _drop_axis(axis: Axes, low: float, high: float) -> None:
    """Percent on an axis on which the distance below the best value is logarithmic."""
    edge = high + POINTS_OFFSET

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


def _rise_axis(axis: Axes, low: float, high: float) -> None:
    """Perplexity on an axis on which the nats above the best value are logarithmic."""
    edge = math.log(low) - NATS_OFFSET

    def forward(value: Any) -> Any:
        rise = np.log(np.maximum(np.asarray(value, dtype=float), 1e-300)) - edge
        return np.log10(np.maximum(rise, 1e-9))

    def backward(height: Any) -> Any:
        return np.exp(edge + 10.0 ** np.asarray(height, dtype=float))

    margin = 0.1 * (forward(high) - forward(low))
    bottom, top = (float(backward(end)) for end in (forward(low) - 2 * margin, forward(high) + margin))
    axis.set_yscale("function", functions=(forward, backward))
    axis.set_ylim(bottom, top)
    levels = _round_numbers(math.log10(low), math.log10(high))
    _set_ticks(axis, pick_ticks(levels, forward, low, top, enough=5))


def _set_ticks(axis: Axes, ticks: Sequence[float]) -> None:
    axis.set_yticks(ticks, [plain_number(tick) for tick in ticks])
    axis.set_yticks([], minor=True)
