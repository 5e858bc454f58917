"""The weights of a row as a histogram, and the values that each grid allows for them: why shapes matter."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from analysis.files import STYLE
from analysis.plotting import COLUMN_WIDTH, NOTE_COLOUR

HISTOGRAM_COLOUR = "#d0d0d0"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#332288", "#882255")
KNOWN = {"affine": "#0072B2", "ptnq": "#CC79A7", "codebook": "#D55E00", "normal_float": "#009E73"}


def level_points(weights: ArrayLike, grids: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> pd.DataFrame:
    """What the figure shows: rows of kind `bin` (of the weights) and of kind `level` (of a grid).

    `weights` [inputs] are one row of a matrix; per grid come its levels, and the row's values on it [inputs].
    `share` is that of the weights in the bin or on the level; `error` is the relative one of the values.
    """
    w = np.asarray(weights, float)
    bins = 2 * math.ceil(1.2 * math.sqrt(w.size)) + 1  # odd, so that one is centred on zero
    reach = float(np.abs(w).max())
    counts, edges = np.histogram(w, bins=bins, range=(-reach, reach))
    found = [
        {"kind": "bin", "grid": "", "value": (a + b) / 2, "width": b - a, "share": count / w.size}
        for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    for name, (levels, values) in grids.items():
        v = np.asarray(values, float)
        error = float(np.linalg.norm(w - v) / np.linalg.norm(w))
        for level in np.unique(np.asarray(levels, float)):
            share = float(np.isclose(v, level, rtol=1e-5, atol=1e-7 * reach).mean())
            found.append({"kind": "level", "grid": name, "value": level, "share": share, "error": error})
    return pd.DataFrame(found, columns=["kind", "grid", "value", "width", "share", "error"])


def draw_levels(points: pd.DataFrame, title: str) -> Figure:
    """A panel per grid: behind, the weights; in front a line at each level, dotted if it has no weight."""
    bins, levels = points[points["kind"] == "bin"], points[points["kind"] == "level"]
    grids = list(dict.fromkeys(levels["grid"]))
    reach = 1.05 * max((bins["value"] + bins["width"] / 2).max(), levels["value"].abs().max())
    top = 1.15 * bins["share"].max()
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(COLUMN_WIDTH, 0.5 + 0.85 * len(grids)))
        axes = figure.subplots(len(grids), 1, sharex=True, squeeze=False)[:, 0]
        for axis, name in zip(axes, grids, strict=True):
            own, colour = levels[levels["grid"] == name], _colour(name)
            axis.bar(bins["value"], bins["share"], bins["width"], color=HISTOGRAM_COLOUR)
            for used, line in ((True, "-"), (False, ":")):
                values = own.loc[(own["share"] > 0) == used, "value"]
                axis.vlines(values, 0, top, color=colour, linewidth=1.2, linestyles=line)
            axis.set(ylim=(0, top), xlim=(-reach, reach), yticks=[])
            axis.grid(visible=False)
            axis.spines["left"].set_visible(False)
            axis.set_title(name, loc="left", color=colour, fontsize=mpl.rcParams["axes.labelsize"], pad=2)
            axis.set_title(
                f"relative error {own['error'].iloc[0]:.3f}",
                loc="right",
                color=NOTE_COLOUR,
                fontsize=mpl.rcParams["xtick.labelsize"],
                pad=2,
            )
        axes[-1].set_xlabel("weight")
        figure.suptitle(title, x=0.01, ha="left", fontsize=mpl.rcParams["axes.titlesize"])
    return figure


def _colour(grid: str) -> str:
    family = max((known for known in KNOWN if grid.startswith(known)), key=len, default="")
    return KNOWN[family] if family else COLOURS[zlib.crc32(grid.encode()) % len(COLOURS)]
