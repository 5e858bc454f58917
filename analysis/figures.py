"""All figures of a report, drawn once for every format, and the numbers they show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.curves import curve_points, draw_curves
from analysis.error_figure import draw_errors, error_points
from analysis.files import write_csv, write_figure
from analysis.layer_figure import bits_settings, draw_layers, layer_points
from analysis.loss_curves import draw_losses
from analysis.tables import split_by_model
from analysis.time_figure import draw_times, time_points


@dataclass
class Drawings:
    """Figures by the name of their files, `of_model` those of one model, and the CSVs drawn."""

    figures: dict[str, Figure] = field(default_factory=dict)
    of_model: dict[tuple[str, str], str] = field(default_factory=dict)  # (model, data) → name of its figure
    points: dict[str, pd.DataFrame] = field(default_factory=dict)

    def add_losses(self, losses: pd.DataFrame, cells: pd.DataFrame) -> None:
        """Loss curves, from `loss_points`, where a job has recorded any."""
        if not losses.empty:
            self.figures["losses"] = draw_losses(losses, bits_settings(cells))
            self.points["losses"] = losses

    def write(self, folder: Path) -> list[Path]:
        """NAME.png and NAME.pdf of each figure, NAME.csv of what was drawn."""
        paths = []
        for name, figure in self.figures.items():
            paths += write_figure(figure, folder, name)
        return paths + [write_csv(folder / f"{name}.csv", frame) for name, frame in self.points.items()]


def draw(cells: pd.DataFrame, layers: pd.DataFrame) -> Drawings:
    """The figures for which there is something to draw; `cells` from `aggregate`, `layers` from `collect`."""
    drawn, settings = Drawings(), bits_settings(cells)
    points = curve_points(cells)
    if not points.empty:
        drawn.figures["curves"], drawn.points["curves"] = draw_curves(points), points
    times = time_points(cells)
    if not times.empty:
        drawn.figures["time"], drawn.points["time"] = draw_times(times, settings), times
    limits = error_points(layers)
    if not limits.empty:
        drawn.figures["errors"], drawn.points["errors"] = draw_errors(limits), limits
    errors = layer_points(layers)
    several = errors.groupby("model")["data"].nunique()
    for title, block in split_by_model(errors):
        model, data = block[["model", "data"]].iloc[0]
        if (block["relative_error"] > 0).any():
            name = f"layers_{model}_{data}" if several[model] > 1 else f"layers_{model}"
            drawn.figures[name] = draw_layers(block, title, settings)
            drawn.of_model[model, data] = name
            drawn.points["layers"] = errors
    return drawn
