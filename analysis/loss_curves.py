"""How training went: the loss of each tuned block or network, over its steps.

Losses of different methods and units are of different kinds and sizes, so each curve is drawn relative to its
first point; where a job trains many units, the line is the geometric mean of theirs. The CSV has the losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.collect import Collection
from analysis.files import STYLE
from analysis.names import method_order
from analysis.plotting import handles, log_axis, mark, panels, strip_panels, strip_rows, wide
from analysis.records import number

COLUMNS = ["model", "data", "method", "bits", "seed", "unit", "step", "loss"]
GRID = np.linspace(0.0, 1.0, 101)  # fractions of a training at which curves are averaged


def loss_points(found: Collection) -> pd.DataFrame:
    """Every recorded mean loss of every finished job, at the step in the middle of its stretch."""
    points = []
    for record, (_, row) in zip(found.records, found.frame.iterrows(), strict=True):
        tuned = record.content.get("tuning") if record.done else None
        for unit in tuned if isinstance(tuned, list) else []:
            losses = unit.get("losses") if isinstance(unit, dict) else None
            if not isinstance(losses, list) or len(losses) < 2:
                continue
            stretch = number(unit.get("steps")) / len(losses)
            points += [
                {
                    **{key: row[key] for key in COLUMNS[:5]},
                    "unit": str(unit.get("unit", "")),
                    "step": (k + 0.5) * stretch,
                    "loss": number(loss),
                }
                for k, loss in enumerate(losses)
            ]
    return pd.DataFrame(points, columns=COLUMNS)


def mean_curve(points: pd.DataFrame) -> np.ndarray | None:
    """Geometric mean over units and seeds of loss / first loss, at `GRID`; None where no loss is positive."""
    logarithms = []
    for _, curve in points.groupby(["seed", "unit"], sort=False, dropna=False):
        curve = curve[curve["loss"] > 0]
        if len(curve) > 1:
            share = (curve["step"] - curve["step"].iloc[0]) / (curve["step"].iloc[-1] - curve["step"].iloc[0])
            logarithms.append(np.interp(GRID, share, np.log(curve["loss"] / curve["loss"].iloc[0])))
    return np.exp(np.mean(logarithms, axis=0)) if logarithms else None


def draw_losses(points: pd.DataFrame, settings: Sequence[str]) -> Figure:
    """A row of panels per model, a panel per bits setting: x the part of the steps done, y the loss."""
    rows, columns = strip_rows(points, settings)
    with mpl.rc_context(fname=STYLE):
        labels = sorted(set(points["method"]), key=method_order)
        entries = handles(labels, with_float=False, with_markers=False)
        figure, axes = panels(len(rows) * columns, columns, wide(columns), 1.75, entries)
        for axis, panel, first in strip_panels(axes, rows, columns, "steps done, %"):
            reached = []
            for label in labels:
                curve = mean_curve(panel[panel["method"] == label])
                if curve is not None:
                    axis.plot(100 * GRID, curve, **mark(label, labels).options() | {"marker": ""})
                    reached.append(curve)
            if reached:
                log_axis(axis, pd.Series(np.concatenate(reached)), margin=0.1)
            if first:
                axis.set_ylabel("loss / first loss")
    return figure
