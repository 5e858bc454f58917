"""What quantization loses on a paper's models beside what it loses on ours, where the models are others."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from analysis.names import MISSING, format_perplexity, method_order

UNITS = {"top1": "points of top-1", "top5": "points of top-5", "perplexity": "per cent of perplexity"}


def only_other_models(rows: pd.DataFrame) -> bool:
    """Whether there are runs, and none of them is of a model in the published tables."""
    ran = rows["run"] != ""
    return bool(ran.any()) and not bool((ran & (rows["method"] != "")).any())


def drop_tables(rows: pd.DataFrame) -> list[tuple[str, list[list[str]]]]:
    """(title, header and rows) per metric; `rows` come from `compare.compare`.

    A row per setting and method: of a published one the median drop over its models, their range and number;
    of a run of ours the drop on each of our models. Settings that we did not run are left out. No tables
    where every run of ours has its own published number.
    """
    runs = rows[(rows["run"] != "") & (rows["status"] != "failed")]
    if runs.empty or (runs["method"] != "").all():
        return []
    tables = []
    for metric in [name for name in UNITS if name in set(runs["metric"])]:
        ours = runs[runs["metric"] == metric].drop_duplicates(["ours", "run", "run_setting"])
        printed = rows[(rows["metric"] == metric) & rows["published_drop"].notna()]
        printed = printed.drop_duplicates(["table", "method", "model", "setting"])
        table = _table(printed, ours)
        tables.append((f"Drops on the paper's models and on ours, {UNITS[metric]}", table))
    return tables


def _table(printed: pd.DataFrame, ours: pd.DataFrame) -> list[list[str]]:
    models = list(dict.fromkeys(ours["ours"]))
    found = [["setting", "method", "paper: median (range; models)", *(f"ours: {model}" for model in models)]]
    metric = ours["metric"].iloc[0]
    settings = ours.drop_duplicates("run_setting")[["run_setting", "weight_bits", "group_size"]]
    for _, place in settings.sort_values("weight_bits", ascending=False, kind="stable").iterrows():
        setting = place["run_setting"]
        here = printed[printed["setting"].map(_plain_setting) == _plain_setting(setting)]
        for method, block in here.groupby("method", sort=False):
            found.append([setting, f"{method} (paper)", _spread(metric, block), *[""] * len(models)])
        cells = ours[ours["run_setting"] == setting]
        for run in sorted(set(cells["run"]), key=method_order):
            drops = cells[cells["run"] == run].set_index("ours")["drop"]
            found.append([setting, run, "", *(_drop(metric, drops.get(model, math.nan)) for model in models)])
    return found


def _plain_setting(setting: str) -> str:
    """The setting without its exceptions: how tensors share scales, and layers at other widths."""
    return setting.replace(" per tensor", "").split(" · ")[0]


def _spread(metric: Any, block: pd.DataFrame) -> str:
    drops = block["published_drop"]
    middle = _drop(metric, drops.median())
    if len(block) == 1:
        return f"{middle} ({block['model'].iloc[0]})"
    return f"{middle} ({_drop(metric, drops.min())} to {_drop(metric, drops.max())}; {len(block)})"


def _drop(metric: Any, value: float) -> str:
    if not math.isfinite(value):
        return MISSING
    if metric != "perplexity":
        return f"{value:.2f}".replace("-", "−")
    text = f"{value:.1f}" if abs(value) < 99.95 else format_perplexity(value)
    return f"{text} %".replace("-", "−")
