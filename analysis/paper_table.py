"""A paper's numbers beside ours as printed: a block per model, in Markdown and as booktabs."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from analysis.names import METRICS, MISSING, format_perplexity
from analysis.paper_drops import drop_tables, only_other_models
from analysis.tables import latex_escape, markdown_rows

NOTE = (
    "Paper: the published number and its drop from the paper's own float model (points, or per cent of "
    "perplexity; a minus is a gain). Ours: mean ± std over n seeds, drop from our float model. Difference: "
    "ours less the paper's, of the results and of the drops. Bits: stored per quantized coefficient. "
    "Protocol: what differs, there → here."
)

HEADER = (
    "setting",
    "method",
    "from",
    "paper",
    "drop",
    "our run",
    "ours",
    "drop",
    "difference",
    "of drops",
    "bits",
    "paper's time",
    "time",
    "memory",
    "protocol",
)
ALWAYS = ("setting", "our run")  # columns that stay although a block leaves them empty


def markdown(rows: pd.DataFrame, paper: str) -> str:
    """All blocks; `rows` come from `compare.compare`."""
    parts = [f"## Published numbers beside ours: {paper}"]
    for title, table in drop_tables(rows):
        parts += [f"### {title}", markdown_rows(table)]
    for title, table, lines in blocks(rows):
        notes = [f"- {line}" for line in lines]
        parts += [f"### {title}", markdown_rows(table), *(["\n".join(notes)] if notes else [])]
    return "\n\n".join([*parts, NOTE]) + "\n"


def blocks(rows: pd.DataFrame) -> list[tuple[str, list[list[str]], list[str]]]:
    """(title, header and rows, notes) per model and metric, those with a run of ours first."""
    return [(title, _table(block), _notes(block)) for title, block in _blocks(rows)]


def latex(rows: pd.DataFrame, paper: str) -> str:
    """A booktabs tabular per block: blocks have different columns."""
    lines = [f"% Published numbers beside ours: {paper}; needs \\usepackage{{booktabs}}", f"% {NOTE}"]
    for title, table in drop_tables(rows):
        lines += _tabular(title, table)
    for marked, block in _blocks(rows):
        lines += _tabular(marked.replace("`", ""), _table(block))
        lines += [f"% {line}" for line in _notes(block)]
    return "\n".join(lines) + "\n"


def _tabular(title: str, table: list[list[str]]) -> list[str]:
    header, *body = [[latex_escape(text) for text in row] for row in table]
    return [
        "",
        f"% {title}",
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        "\\toprule",
        f"\\multicolumn{{{len(header)}}}{{l}}{{\\textbf{{{latex_escape(title)}}}}} \\\\",
        f"{' & '.join(header)} \\\\",
        "\\midrule",
        *(f"{' & '.join(entries)} \\\\" for entries in body),
        "\\bottomrule",
        "\\end{tabular}",
    ]


def _blocks(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, rows) per model and metric, those with a run of ours first.

    The paper's models are left out where all runs are of others: `drop_tables` has their drops.
    """
    found = []
    if only_other_models(rows):
        rows = rows[rows["run"] != ""]
    for (model, metric), block in rows.groupby(["model", "metric"], sort=False):
        ours = next((f" (`{name}`)" for name in block["ours"] if name), "")
        title = METRICS[metric].title if metric in METRICS else GAIN if metric == "top1_gain" else "no result"
        floats = [
            f"{who} {' / '.join(values)}"
            for who, column in (("paper", "published_float"), ("ours", "float"))
            if (values := sorted({_result(metric, value) for value in block[column].dropna()}))
        ]
        before = f"; float: {', '.join(floats)}" if floats else ""
        found.append(((block["run"] == "").all(), f"{model}{ours} · {title}{before}", block))
    return [(title, block) for _, title, block in sorted(found, key=lambda item: item[0])]


GAIN = "gain in top-1 over the base method, points"


def _table(block: pd.DataFrame) -> list[list[str]]:
    """Header and rows, without the columns that are empty in all of them."""
    order = sorted(range(len(block)), key=lambda i: _setting_order(block.iloc[i]))
    several = block.loc[block["paper"] != "", "paper"].nunique() > 1
    entries = [_entries(block.iloc[i], several) for i in order]
    shown = {*ALWAYS, *(("paper",) if (block["method"] != "").any() else ())}
    kept = [
        j
        for j, name in enumerate(HEADER)
        if name in shown or any(row[j] not in ("", MISSING) for row in entries)
    ]
    return [[row[j] for j in kept] for row in [list(HEADER), *entries]]


def _setting_order(row: Any) -> tuple[float, float]:
    """Most bits first, whole rows before groups; within a setting the order of the paper."""
    group_size = -math.inf if math.isnan(row["group_size"]) else -row["group_size"]
    return -row["weight_bits"] if math.isfinite(row["weight_bits"]) else 0.0, group_size


def _entries(row: Any, several: bool) -> list[str]:
    """Cells of one row; `several`: the published numbers come from several papers."""
    metric, run = row["metric"], row["run"] != ""
    printed = row["method"] != ""
    variant = row["run_setting"] if run and printed and row["run_setting"] != row["setting"] else ""
    ours = "failed" if row["status"] == "failed" else ""
    if run and row["status"] != "failed":
        ours = _result(metric, row["mean"])
        if row["n"] > 1:
            ours += f" ± {_result(metric, row['std'])} (n={row['n']:.0f})"
    return [
        row["setting"],
        row["method"],
        row["paper"] if several else "",
        _result(metric, row["published"]) if printed else "",
        drop_text(metric, row["published_drop"]),
        " · ".join(filter(None, [row["run"], variant])) if run else "not run",
        ours,
        drop_text(metric, row["drop"]),
        _signed(row["difference"]),
        _signed(row["drop_difference"]),
        f"{row['bits_per_coefficient']:.2f}" if math.isfinite(row["bits_per_coefficient"]) else MISSING,
        seconds_text(3600 * row["published_hours"]),
        seconds_text(row["seconds"]),
        memory_text(row["peak_memory_bytes"]),
        row["differs"],
    ]


def _notes(block: pd.DataFrame) -> list[str]:
    """What the sources do not state, and which numbers were not found; each line once."""
    silent: dict[str, list[str]] = {}
    for _, row in block[block["unstated"] != ""].iterrows():
        methods = silent.setdefault(row["unstated"], [])
        if row["method"] not in methods:
            methods.append(row["method"])
    lines = [f"not stated for {', '.join(methods)}: {words}" for words, methods in silent.items()]
    gaps = block[(block["method"] != "") & block["published"].isna()]
    return lines + [f"published value not found: {note}" for note in dict.fromkeys(gaps["notes"])]


def _result(metric: str, value: float) -> str:
    if math.isnan(value):
        return MISSING
    return METRICS[metric].format(value) if metric in METRICS else f"{value:+.2f}"


def drop_text(metric: str, value: float) -> str:
    """Points, or per cent of a perplexity."""
    if not math.isfinite(value):
        return MISSING
    if metric == "perplexity":
        return _plain(f"{value:.1f} %" if value < 99.95 else f"{format_perplexity(value)} %")
    return _plain(f"{value:.2f}")


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return MISSING
    return _plain(f"{value:+.2f}" if abs(value) < 99.995 else f"{value:+.3g}")


def _plain(text: str) -> str:
    return text.replace("-", "−")


def seconds_text(seconds: float) -> str:
    """From milliseconds to hours, two digits or so."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def memory_text(count: float) -> str:
    """Bytes as MB or GB."""
    if not math.isfinite(count):
        return MISSING
    return f"{count / 1e6:.0f} MB" if count < 0.9995e9 else f"{count / 1e9:.1f} GB"
