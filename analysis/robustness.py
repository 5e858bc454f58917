"""How much each choice of a method matters: `python -m analysis.robustness FOLDER=KEY ...`.

Yvinec et al. ("Challenging the Status Quo", arXiv 2308.07662) find gradient-based PTQ robust to the data it
sees (size and draw of the calibration set, augmentation, which weights are learned) and dependent on how it
is optimised (loss, variables, grid, optimizer). Each folder holds an ablation over one key of the config; all
of them stand in one figure, a row for each key, a dot for each of its values.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.against import UnknownKeyError, against
from analysis.collect import collect_all
from analysis.files import STYLE, write_csv, write_figure, write_text
from analysis.names import METRICS, Metric
from analysis.plotting import FLOAT_COLOUR, FLOAT_LINE
from analysis.records import plain
from analysis.tables import markdown_rows, split_by_model

WIDTH = 5.2  # inches
ROW_HEIGHT = 0.27  # inches of a key
DATA, OPTIMISATION, OTHER = "what the method sees", "how it is optimised", "other"
COLOURS = {DATA: "#0072B2", OPTIMISATION: "#D55E00", OTHER: "#767676"}
TITLES = {
    "calibration.num_samples": ("calibration size", DATA),
    "calibration.balance": ("equal numbers of each class", DATA),
    "calibration.image_augmentation": ("augmented images", DATA),
    "calibration.source": ("calibration data", DATA),
    "seed": ("seed", DATA),
    "method.augmentation": ("augmentation", DATA),
    "method.selection": ("weights that are learned", DATA),
    "method.selected": ("fraction that is learned", DATA),
    "method.loss": ("loss", OPTIMISATION),
    "method.relaxation": ("variable", OPTIMISATION),
    "method.variables": ("freedom", OPTIMISATION),
    "method.unit": ("unit", OPTIMISATION),
    "choices.grid": ("grid", OPTIMISATION),
    "method.optimizer": ("optimizer", OPTIMISATION),
    "method.rounding_rate": ("learning rate", OPTIMISATION),
}


@dataclass(frozen=True)
class Ablation:
    """A folder of records and the key that they vary."""

    folder: Path
    key: str

    @classmethod
    def parse(cls, text: str) -> Ablation:
        """From FOLDER=KEY. Raises ValueError."""
        folder, separator, key = text.rpartition("=")
        if not separator or not folder or not key:
            raise ValueError(f"{text!r} is not FOLDER=KEY, as in outputs/losses=method.loss")
        return cls(Path(folder), key)


def values(ablations: Sequence[Ablation]) -> pd.DataFrame:
    """A row per model, bits, key and value: the best mean over seeds among the runs with that value.

    Where something else varies along with the key (a rate for each optimizer), each value stands at its best.
    Raises UnknownKeyError, and ValueError for a folder without results.
    """
    frames = []
    for ablation in ablations:
        found = collect_all([ablation.folder], None)
        if found.frame.empty:
            raise ValueError(f"no record with a result under {ablation.folder}")
        points = against(found, ablation.key).dropna(subset="mean")
        title, kind = TITLES.get(ablation.key, (ablation.key, OTHER))
        points["width"] = [_width(line) for line in points["line"]]
        points = points.assign(key=ablation.key, title=title, kind=kind)
        for _, cell in points.groupby(["model", "data", "width", "value"], sort=False):
            up = METRICS[cell["metric"].iloc[0]].higher_is_better
            frames.append(cell.loc[[cell["mean"].idxmax() if up else cell["mean"].idxmin()]])
    wanted = ["model", "data", "width", "metric", "kind", "key", "title", "value"]
    return pd.concat(frames, ignore_index=True)[[*wanted, "mean", "std", "n", "float"]]


def _width(line: str) -> str:
    """The bits at the end of a line's label, where the runs had several."""
    return line.partition(" · ")[2]


def spreads(points: pd.DataFrame) -> pd.DataFrame:
    """A row per model, bits and key: how far the worst value lies from the best, the smallest kind first."""
    rows = []
    for (model, data, kind, title, key, width), cell in points.groupby(
        ["model", "data", "kind", "title", "key", "width"], sort=False
    ):
        metric = METRICS[cell["metric"].iloc[0]]
        by_result = cell.sort_values("mean", ascending=not metric.higher_is_better)
        best, worst = by_result.iloc[0], by_result.iloc[-1]
        rows.append(
            {
                "model": model,
                "data": data,
                "metric": cell["metric"].iloc[0],
                "kind": kind,
                "title": f"{title}, {width}" if width else title,
                "key": key,
                "width": width,
                "values": len(cell),
                "best": best["value"],
                "best_result": best["mean"],
                "worst": worst["value"],
                "worst_result": worst["mean"],
                "spread": abs(best["mean"] - worst["mean"]),
                "float": cell["float"].mean(),
            }
        )
    kinds = list(COLOURS)
    return pd.DataFrame(rows).sort_values(
        ["kind", "spread"], key=lambda c: c.map(kinds.index) if c.name == "kind" else c, ignore_index=True
    )


def markdown(summary: pd.DataFrame) -> str:
    """A table per model: a row per key."""
    parts = []
    for title, block in split_by_model(summary):
        metric = METRICS[block["metric"].iloc[0]]
        rows = [["choice", "key", "values", "spread", "best", "worst"]]
        for _, row in block.iterrows():
            ends = [f"{metric.format(row[f'{end}_result'])} ({plain(row[end])})" for end in ("best", "worst")]
            spread = metric.format(row["spread"])
            rows.append([row["title"], f"`{row['key']}`", str(row["values"]), spread, *ends])
        before = " / ".join(sorted({metric.format(x) for x in block["float"].dropna()}))
        parts += [f"### {title} · {metric.title}, {metric.direction}; float {before}", markdown_rows(rows)]
    return "\n\n".join(parts) + "\n"


def draw(points: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """A panel per model: a row per key, its values as dots, the best and the worst named."""
    blocks = split_by_model(summary)
    rows = [len(block) for _, block in blocks]
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(WIDTH, ROW_HEIGHT * sum(rows) + 0.75 * len(blocks) + 0.25))
        heights = [count + 0.5 for count in rows]
        axes = figure.subplots(len(blocks), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axis, (title, block) in zip(axes, blocks, strict=True):
            place = (points["model"] == block["model"].iloc[0]) & (points["data"] == block["data"].iloc[0])
            _draw_panel(axis, points[place], block)
            axis.set_title(title, loc="left")
        kinds = [kind for kind in COLOURS if kind in set(summary["kind"])]
        entries = [
            Line2D([], [], color=COLOURS[kind], marker="o", markersize=4, label=kind) for kind in kinds
        ]
        figure.legend(handles=entries, loc="outside lower center", ncols=len(entries))
    return figure


def _draw_panel(axis: Axes, points: pd.DataFrame, block: pd.DataFrame) -> None:
    metric: Metric = METRICS[block["metric"].iloc[0]]
    for height, (_, row) in enumerate(block[::-1].iterrows()):
        own = points[(points["key"] == row["key"]) & (points["width"] == row["width"])]
        colour = COLOURS[row["kind"]]
        low, high = own["mean"].min(), own["mean"].max()
        axis.plot([low, high], [height, height], color=colour, linewidth=1.2, alpha=0.5, zorder=1.6)
        axis.plot(own["mean"], [height] * len(own), linestyle="", marker="o", color=colour, markersize=4)
        words = {row["best"]: row["best_result"], row["worst"]: row["worst_result"]}
        for word, result in words.items() if row["spread"] > 0 else ():
            right = result == high
            axis.annotate(
                plain(word),
                (result, height),
                xytext=(5 if right else -5, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                fontsize=mpl.rcParams["xtick.labelsize"],
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                zorder=1.7,
            )
    axis.set_yticks(range(len(block)), list(block["title"])[::-1])
    axis.set_ylim(-0.6, len(block) - 0.4)
    axis.grid(False, axis="y")
    before = block["float"].dropna()
    low, high = points["mean"].min(), max(points["mean"].max(), *before)
    span = max(high - low, 1e-9)
    axis.set_xlim(low - 0.3 * span, high + 0.22 * span)
    for value in sorted(set(before)):
        axis.axvline(value, zorder=1.5, **FLOAT_LINE)
    if len(before):
        axis.annotate(
            "float",
            (before.max(), len(block) - 0.4),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=mpl.rcParams["xtick.labelsize"],
            color=FLOAT_COLOUR,
        )
    axis.set_xlabel(f"{metric.title}, {metric.direction}")


def write(ablations: Sequence[Ablation], output: Path) -> str:
    """Write robustness.{md,csv,png,pdf} into `output` and return the table."""
    points = values(ablations)
    summary = spreads(points)
    table = markdown(summary)
    write_text(output / "robustness.md", table)
    write_csv(output / "robustness.csv", points)
    write_figure(draw(points, summary), output, "robustness")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; exit status 1 where there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.robustness", description="How much each choice of a method matters."
    )
    parser.add_argument("ablations", nargs="+", metavar="FOLDER=KEY", help="records, and the key they vary")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where to write")
    options = parser.parse_args(argv)
    try:
        ablations = [Ablation.parse(text) for text in options.ablations]
        print(write(ablations, options.output))
    except (ValueError, UnknownKeyError) as error:
        raise SystemExit(f"analysis.robustness: {error}") from None


if __name__ == "__main__":
    main()
