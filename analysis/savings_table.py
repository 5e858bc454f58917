"""The bits saved as printed: under each model's table in Markdown, and as booktabs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from analysis.names import METRICS, MISSING
from analysis.tables import latex_escape, markdown_rows, split_by_model

NOTE = (
    "Bits saved: stored bits per coefficient that the baseline needs more than the method, averaged over the "
    "results that both reach; in brackets the 95 % bootstrap interval. Bits at a drop: stored bits that keep "
    "the result within that drop of float, in parentheses the saving; > and ≤ are bounds where no width "
    "measured is near enough, nothing is extrapolated. Above the limit: stored bits of the layers less the "
    "Gaussian rate-distortion function at their error."
)
NO_WIDTHS = "none, because each method has one width only; a curve takes two stored widths at least"


def above_limit(layers: pd.DataFrame) -> pd.DataFrame:
    """Bits above the Gaussian limit per (model, data, method, bits), summed over coefficients and records.

    Layers without a finite limit (none stored, or no error at all) are left out.
    """
    keys = ["model", "data", "method", "bits"]
    numbers = layers[["limit_bits", "bits_per_coefficient", "coefficients"]].astype(float)
    known = layers[np.isfinite(numbers).all(axis=1)]
    excess = (known["bits_per_coefficient"] - known["limit_bits"]) * known["coefficients"]
    sums = known[keys].assign(coefficients=known["coefficients"], excess=excess)
    return sums.groupby(keys, sort=False, as_index=False)[["coefficients", "excess"]].sum()


def with_limit(savings: pd.DataFrame, points: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """`savings` with `above_limit`, the mean over the coefficients of all widths and seeds of each curve.

    `points` come from `curves.curve_points` and say which bits settings a curve has.
    """
    if savings.empty:
        return savings
    sums = points.merge(above_limit(layers), on=["model", "data", "method", "bits"])
    sums = sums.groupby(["model", "data", "line"])[["excess", "coefficients"]].sum()
    means = (sums["excess"] / sums["coefficients"]).to_dict()
    places = zip(savings["model"], savings["data"], savings["line"], strict=True)
    return savings.assign(above_limit=[means.get(place, math.nan) for place in places])


def markdown(savings: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Markdown per (model, data), to set under its method table."""
    return {
        (block["model"].iloc[0], block["data"].iloc[0]): _markdown_block(block)
        for _, block in _blocks(savings)
    }


def latex(savings: pd.DataFrame) -> str:
    """A booktabs tabular, all models in one."""
    found = _blocks(savings)
    if not found:
        return f"% Bits saved: {NO_WIDTHS}.\n"
    width = max((len(rows(block)[0]) for _, block in found), default=1)
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}", "\\toprule"]
    for position, (title, block) in enumerate(found):
        lines += ["\\midrule[\\heavyrulewidth]"] if position else []
        lines.append(
            f"\\multicolumn{{{width}}}{{l}}{{\\textbf{{{latex_escape(title)}}} "
            f"{latex_escape('· ' + subtitle(block))}}} \\\\"
        )
        if one_width(block):
            continue
        header, *body = [[latex_escape(text) for text in row] for row in rows(block)]
        lines += [_latex_line(header), "\\midrule", *map(_latex_line, body)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", f"% {latex_escape(NOTE)}"]) + "\n"


def _latex_line(entries: list[str]) -> str:
    return " & ".join(entries) + r" \\"


def _blocks(savings: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return split_by_model(savings) if len(savings) else []


def one_width(block: pd.DataFrame) -> bool:
    """Whether no method has a curve, so that nothing can be said of bits saved."""
    return bool((block["points"] < 2).all())


def subtitle(block: pd.DataFrame) -> str:
    """What a block's table holds, or why there is none."""
    if one_width(block):
        return f"Bits saved: {NO_WIDTHS}"
    baseline = block["baseline"].iloc[0]
    if not baseline:
        return "Bits needed; the baseline has no result on this model"
    resampled = {text for text in block["interval"] if text and not text.startswith("n/a")}
    return f"Bits saved against {baseline}" + (
        f"; intervals over {resampled.pop()}" if len(resampled) == 1 else ""
    )


def _markdown_block(block: pd.DataFrame) -> str:
    if one_width(block):
        return f"{subtitle(block)}."
    lines = [f"- {line}" for line in notes(block)]
    table = markdown_rows(rows(block))
    return "\n\n".join([f"{subtitle(block)}:", table, *(["\n".join(lines)] if lines else [])])


def notes(block: pd.DataFrame) -> list[str]:
    """Why a number or an interval is missing, each reason once with the curves it is of."""
    reasons: dict[str, list[str]] = {}
    for _, row in block.iterrows():
        interval = row["interval"].removeprefix("n/a: ")
        no_interval = f"no interval ({interval})" if interval != row["interval"] else ""
        reasons.setdefault(row["reason"] or no_interval, []).append(row["line"])
    return [f"{', '.join(lines)}: {reason}" for reason, lines in reasons.items() if reason]


def rows(block: pd.DataFrame) -> list[list[str]]:
    """Header and a row per curve."""
    metric = METRICS[block["metric"].iloc[0]]
    numbers = [name.removeprefix("drop_") for name in block.columns if name.startswith("drop_")]
    drops = [f"bits at {block[f'drop_{i}'].iloc[0]}" for i in numbers]
    rows = [["method", "bits saved", f"over {metric.title}", *drops, "above the limit"]]
    for _, row in block.iterrows():
        baseline = row["line"] == row["baseline"]
        known = math.isfinite(row["saved"])
        ends = [metric.format(row[name]) for name in ("range_low", "range_high")] if known else []
        rows.append(
            [
                row["line"],
                "baseline" if baseline else _saved(row) if known else MISSING,
                " to ".join(ends) if known else "" if baseline else MISSING,
                *(_needed(row, i) for i in numbers),
                f"{row['above_limit']:.2f}" if math.isfinite(row["above_limit"]) else MISSING,
            ]
        )
    return rows


def _saved(row: Any) -> str:
    text = f"{row['saved']:.2f}"
    if math.isfinite(row["saved_low"]):
        text += f" [{row['saved_low']:.2f}, {row['saved_high']:.2f}]"
    return text.replace("-", "−")


def _needed(row: Any, i: str) -> str:
    needed = _bound(row[f"needed_{i}_low"], row[f"needed_{i}_high"])
    saved = _bound(row[f"saved_{i}_low"], row[f"saved_{i}_high"])
    return needed if saved == MISSING else f"{needed} ({saved})"


def _bound(low: float, high: float) -> str:
    """A number, a bound on one side, or nothing known."""
    if math.isfinite(low) and math.isfinite(high):
        text = f"{low:.2f}"
    elif math.isfinite(low):
        text = f"> {low:.2f}"
    elif math.isfinite(high):
        text = f"≤ {high:.2f}"
    else:
        return MISSING
    return text.replace("-", "−")
