"""The layers' error against stored bits, and what no code can beat: the Gaussian rate–distortion function.

A point is a run: the geometric mean of its layers' relative errors over the mean of their stored bits, each
layer counting as its weights do. For a layer's error the limit needs the bits of ptq/limit.py; their mean
over the layers of each run of one method is the line.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.files import STYLE
from analysis.layer_figure import LIMIT_LABEL
from analysis.names import method_order
from analysis.plotting import COLUMN_WIDTH, FLOAT_LINE, handles, is_bottom, log_axis, mark, panels
from analysis.tables import split_by_model

HEIGHT = 2.5  # inches of a panel


def error_points(layers: pd.DataFrame) -> pd.DataFrame:
    """Per model, method and bits: error, stored bits and bits of the limit, over layers and seeds.

    Layers without a limit or an error are left out, and so are runs that have none with both.
    """
    numbers = ["relative_error", "bits_per_coefficient", "limit_bits", "coefficients"]
    known = layers.assign(**{name: layers[name].astype(float) for name in numbers})
    known = known[np.isfinite(known[numbers]).all(axis=1) & (known["relative_error"] > 0)]
    rows = []
    for (model, data, method, bits), run in known.groupby(["model", "data", "method", "bits"], sort=False):
        share = run["coefficients"] / run["coefficients"].sum()
        rows.append(
            {
                "model": model,
                "data": data,
                "method": method,
                "bits": bits,
                "bits_per_coefficient": float((share * run["bits_per_coefficient"]).sum()),
                "limit_bits": float((share * run["limit_bits"]).sum()),
                "relative_error": float(np.exp((share * np.log(run["relative_error"])).sum())),
            }
        )
    columns = ["model", "data", "method", "bits", *numbers[:3]]
    return pd.DataFrame(rows, columns=columns)


def draw_errors(points: pd.DataFrame) -> Figure:
    """A panel per model, a line per method, the limit dashed."""
    labels = sorted(set(points["method"]), key=method_order)
    blocks = split_by_model(points)
    columns = min(2, len(blocks))
    with mpl.rc_context(fname=STYLE):
        entries = handles(labels, with_float=False)
        figure, axes = panels(len(blocks), columns, COLUMN_WIDTH, HEIGHT, entries)
        for position, (axis, (title, block)) in enumerate(zip(axes, blocks, strict=True)):
            _draw_panel(axis, block, labels)
            axis.set_title(title, loc="left")
            if position % columns == 0:
                axis.set_ylabel("relative error of the layers")
            if is_bottom(position, len(blocks), columns):
                axis.set_xlabel("stored bits per coefficient")
    return figure


def limit_line(block: pd.DataFrame) -> pd.DataFrame:
    """The limit of one model, the smallest error first: that of the method with the most points, of the
    smallest error where several have as many. Other methods spread the same error otherwise over the layers,
    and so have a limit a little beside it.
    """
    runs = block.groupby("method")["relative_error"].agg(["count", "min"])
    method = runs.sort_values(["count", "min"], ascending=[False, True]).index[0]
    own = block.loc[block["method"] == method, ["limit_bits", "relative_error"]]
    return own.sort_values("relative_error", ignore_index=True)


def _draw_panel(axis: Axes, block: pd.DataFrame, labels: Sequence[str]) -> None:
    log_axis(axis, block["relative_error"], margin=0.1)
    for label in sorted(set(block["method"]), key=method_order):
        line = block[block["method"] == label].sort_values("bits_per_coefficient")
        axis.plot(line["bits_per_coefficient"], line["relative_error"], **mark(label, labels).options())
    limit = limit_line(block)
    axis.plot(limit["limit_bits"], limit["relative_error"], zorder=1.5, **FLOAT_LINE)
    lowest = limit.iloc[0]
    axis.annotate(
        LIMIT_LABEL,
        (lowest["limit_bits"], lowest["relative_error"]),
        xytext=(-4, -1),
        textcoords="offset points",
        ha="right",
        va="center",
        color=FLOAT_LINE["color"],
        fontsize=6.5,
    )
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
