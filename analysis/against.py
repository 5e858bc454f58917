"""Results against one key of the config, for ablations: sweeps, calibration size, λ, a grid's function."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.collect import Collection
from analysis.labels import UNSET, bits_label, method_labels
from analysis.names import METRICS, MISSING, method_order
from analysis.records import Record, dict_at, flatten, plain
from analysis.tables import markdown_rows, split_by_model

NOTE = (
    "In brackets: the mean over layers of the relative output error (without calibration data: weight error) "
    "on the inputs that the solver saw."
)


class UnknownKeyError(ValueError):
    """The records do not differ in this key; the message names those in which they do."""


def against(found: Collection, key: str) -> pd.DataFrame:
    """A row per model, line and value of `key` (`method.sweeps`): result and mean layer error over seeds.

    A line is a method with whatever else sets its runs apart, and the bits where a model has several. Values
    keep their type where they are numbers; lists of one stand for their item. Raises UnknownKeyError.
    """
    configs = [dict(flatten(record.config)) for record in found.records]
    values = [_value(config.get(key, UNSET)) for config in configs]
    if len(set(values)) < 2:
        known = ", ".join(_swept(configs)) or "none"
        raise UnknownKeyError(f"all records have one value of {key!r}; they differ in: {known}")
    lines = method_labels([_without(record, key) for record in found.records])
    bits = [bits_label(dict_at(record.config, "bits")) for record in found.records]
    errors = [_layer_error(record) for record in found.records]
    frame = found.frame.assign(value=values, line=lines, bits=bits, error=errors)
    frame = frame[(frame["status"] == "done") & (frame["value"] != UNSET)]
    several = frame["bits"].nunique() > 1
    rows = []
    for (model, data, line, width, value), cell in frame.groupby(
        ["model", "data", "line", "bits", "value"], sort=False
    ):
        rows.append(
            {
                "model": model,
                "data": data,
                "metric": cell["metric"].iloc[0],
                "line": f"{line} · {width}" if several else line,
                "value": value,
                "mean": cell["quantized"].mean(skipna=False),
                "std": cell["quantized"].std(ddof=1) if len(cell) > 1 else math.nan,
                "n": len(cell),
                "float": cell["float"].mean(),
                "layer_error": cell["error"].mean(),
                "bits_per_coefficient": cell["bits_per_coefficient"].mean(),
                "solve_seconds": cell["solve_seconds"].mean(),
            }
        )
    return pd.DataFrame(rows)


def ordered(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers by size, words as they came."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct) if numeric(distinct) else distinct


def numeric(values: Sequence[Any]) -> bool:
    """Whether all are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def markdown(points: pd.DataFrame, key: str) -> str:
    """A table per model: a row per value, a column per line."""
    parts = [f"## Results against `{key}`"]
    for title, block in split_by_model(points):
        metric = METRICS[block["metric"].iloc[0]]
        lines = sorted(set(block["line"]), key=method_order)
        by_place = {(row["value"], row["line"]): row for _, row in block.iterrows()}
        rows = [[key.rsplit(".", 1)[-1], *lines]]
        for value in ordered(list(block["value"])):
            cells = [by_place.get((value, line)) for line in lines]
            rows.append([plain(value), *(_entry(row) for row in cells)])
        before = " / ".join(sorted({metric.format(x) for x in block["float"].dropna()}))
        parts += [f"### {title} · {metric.title}, {metric.direction}; float {before}", markdown_rows(rows)]
    return "\n\n".join([*parts, NOTE]) + "\n"


def _entry(row: Any) -> str:
    if row is None:
        return MISSING
    text = METRICS[row["metric"]].format(row["mean"])
    if row["n"] > 1:
        text += f" ± {METRICS[row['metric']].format(row['std'])}"
    return text if math.isnan(row["layer_error"]) else f"{text} ({row['layer_error']:.3f})"


def _value(value: Any) -> Any:
    """A list of one as its item, other lists and what is no number as words."""
    if value == []:
        return "none"
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else ", ".join(map(plain, value))
    return value if numeric([value]) else plain(value)


def _swept(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Keys that have several values, but for the names of choices."""
    keys = {key for config in configs for key in config if not key.startswith("choices.")}
    return sorted(key for key in keys if len({plain(config.get(key, UNSET)) for config in configs}) > 1)


def _without(record: Record, key: str) -> Record:
    """The record as if its config had no such key; without a choice its group's values go too."""
    content = {**record.content, "config": copy.deepcopy(record.config)}
    *path, last = key.split(".")
    node: Any = content["config"]
    for word in path:
        node = node.get(word, {}) if isinstance(node, dict) else {}
    if isinstance(node, dict):
        node.pop(last, None)
    if path == ["choices"]:
        content["config"].pop(last, None)
    return Record(record.path, content, record.written)


def _layer_error(record: Record) -> float:
    layers = record.content.get("layers") if record.done else None
    errors = [layer.get("relative_error") for layer in layers or [] if isinstance(layer, dict)]
    known = [float(error) for error in errors if isinstance(error, int | float)]
    return sum(known) / len(known) if known else math.nan
