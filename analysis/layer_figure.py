"""The error of each layer, and its stored bits above the Gaussian rate–distortion limit at that error."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.collect import bits_order
from analysis.files import STYLE
from analysis.names import method_order
from analysis.plotting import FLOAT_LINE, handles, log_axis, mark, panels, strips, wide

MARKED_LAYERS = 12  # more layers than this, or more lines than MARKED_LINES, are drawn without markers
MARKED_LINES = 6
LIMIT_LABEL = "Gaussian limit"
LABELS = {"relative_error": "relative error", "bits_above_limit": "bits above the limit"}


def layer_points(layers: pd.DataFrame) -> pd.DataFrame:
    """Per layer the relative error and the bits above the limit, averaged over seeds, in forward order."""
    keys = ["model", "data", "method", "bits", "position", "layer"]
    limit = layers["limit_bits"].astype(float)
    above = (layers["bits_per_coefficient"].astype(float) - limit).where(np.isfinite(limit))
    found = layers.assign(bits_above_limit=above).groupby(keys, sort=False)
    return found.agg(
        relative_error=("relative_error", "mean"),
        bits_per_coefficient=("bits_per_coefficient", "mean"),
        limit_bits=("limit_bits", "mean"),
        bits_above_limit=("bits_above_limit", "mean"),
        n=("relative_error", "count"),
    ).reset_index()


def draw_layers(
    points: pd.DataFrame, title: str, settings: Sequence[str], labels: Sequence[str] = ()
) -> Figure:
    """One model: a column per bits setting, above the error of each layer, below its bits above the limit.

    Three settings stand side by side, more below. Without a single limit the lower row is left out.
    """
    settings = [each for each in settings if each in set(points["bits"])]
    columns = min(3, len(settings))
    kinds = ["relative_error"]
    if points["bits_above_limit"].notna().any():
        kinds.append("bits_above_limit")
    with mpl.rc_context(fname=STYLE):
        drawn = sorted(set(points["method"]), key=method_order)
        labels = labels or drawn
        entries = handles(drawn, labels, with_float=False, with_markers=_marked(points))
        rows = [(kind, strip) for strip in strips(settings, columns) for kind in kinds]
        figure, axes = panels(len(rows) * columns, columns, wide(columns), 1.55, entries)
        for row, (kind, strip) in enumerate(rows):
            for column, axis in enumerate(axes[row * columns : (row + 1) * columns]):
                if column >= len(strip):
                    axis.remove()
                    continue
                _draw_panel(axis, points[points["bits"] == strip[column]], kind, labels)
                if kind == kinds[0]:
                    axis.set_title(f"{title} · {strip[column]}" if column == 0 else strip[column], loc="left")
                if column == 0:
                    axis.set_ylabel(LABELS[kind])
                if kind == kinds[-1]:
                    axis.set_xlabel("layer, in forward order")
    return figure


def bits_settings(cells: pd.DataFrame) -> list[str]:
    """The bits settings of a frame, the most stored bits first."""
    order = {row["bits"]: bits_order(row) for _, row in cells.iterrows()}
    return sorted(order, key=lambda setting: order[setting])


def _draw_panel(axis: Axes, panel: pd.DataFrame, kind: str, labels: Sequence[str]) -> None:
    drawn = sorted(set(panel["method"]), key=method_order)
    values = panel[kind].where(np.isfinite(panel[kind]))
    if kind == "relative_error":
        values = values.where(values > 0)
        if values.notna().any():
            log_axis(axis, values.dropna(), margin=0.06)
    for label in drawn:
        chosen = panel["method"] == label
        options = mark(label, labels).options()
        options |= {"markersize": 3} if _marked(panel) else {"marker": "", "linewidth": 1.0}
        axis.plot(panel.loc[chosen, "position"], values[chosen], **options)
    if kind == "bits_above_limit":
        axis.axhline(0.0, **FLOAT_LINE)
        bottom, top = axis.get_ylim()
        axis.set_ylim(min(bottom, -0.08 * top), top)
        axis.annotate(
            LIMIT_LABEL,
            (1, 0),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            color=FLOAT_LINE["color"],
            fontsize=6.5,
        )
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _marked(points: pd.DataFrame) -> bool:
    return points["position"].nunique() <= MARKED_LAYERS and points["method"].nunique() <= MARKED_LINES
