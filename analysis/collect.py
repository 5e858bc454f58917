"""Records on disk → one tidy frame: a row per record, a readable label per method, seeds in one cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.labels import bits_label, bits_variant, method_labels
from analysis.names import method_order
from analysis.protocol import PROTOCOL, protocol
from analysis.records import Record, dict_at, number, plain, product, read_records

COLUMNS = [
    "model",
    "data",
    "method",
    "method_name",
    "grid",
    "bits",
    "bits_variant",
    "weight_bits",
    "group_size",
    "first_last_bits",
    "calibration",
    "seed",
    "metric",
    "float",
    "quantized",
    "samples",
    "codes_bits",
    "parameters_bits",
    "bits_per_coefficient",
    "file_bits_per_coefficient",
    "model_bits_per_coefficient",
    "seconds",
    "solve_seconds",
    "peak_memory_bytes",
    "device",
    "status",
    "error",
    "config_hash",
    "path",
    *PROTOCOL,
]

LAYER_COLUMNS = [
    "model",
    "data",
    "method",
    "bits",
    "seed",
    "position",
    "layer",
    "layer_bits",
    "relative_error",
    "coefficients",
    "bits_per_coefficient",
    "limit_bits",
]


@dataclass
class Collection:
    """What was found: `frame` a row per job, `layers` a row per job's layer, `records` those behind the rows.

    `problems` has a line per record without a result, `duplicates` one per record that another replaces.
    """

    frame: pd.DataFrame
    layers: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def collect(dirs: Iterable[Path], metric: str | None = None) -> pd.DataFrame:
    """One row per record under `dirs`, no duplicates, sorted."""
    return collect_all(dirs, metric).frame


def collect_all(dirs: Iterable[Path], metric: str | None = None) -> Collection:
    """Read every record.json under `dirs`. `metric` is the image metric to report, top1 unless told."""
    records, problems = read_records(dirs)
    kept, duplicates = _newest(records, [record.config_hash for record in records])
    records = [records[i] for i in kept]
    labels = method_labels(records)
    rows = [_row(record, label, metric or "top1") for record, label in zip(records, labels, strict=True)]
    kept, more = _newest(records, [_cell_key(row) for row in rows])
    order = sorted(kept, key=lambda i: _row_order(rows[i]))
    records, rows = [records[i] for i in order], [rows[i] for i in order]
    problems += filter(None, map(_problem, records, rows))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return Collection(frame, _layers(records, rows), problems, duplicates + more, records)


def aggregate(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, data, method, bits): mean, std and number of finished seeds; number of failed."""
    rows = []
    for (model, data, method, bits), cell in frame.groupby(["model", "data", "method", "bits"], sort=False):
        done = cell[cell["status"] == "done"]
        first = cell.iloc[0]
        rows.append(
            {
                "model": model,
                "data": data,
                "method": method,
                "grid": first["grid"],
                "bits": bits,
                "bits_variant": first["bits_variant"],
                "weight_bits": first["weight_bits"],
                "group_size": first["group_size"],
                "first_last_bits": first["first_last_bits"],
                "metric": next((name for name in [*done["metric"], *cell["metric"]] if name), ""),
                "float": cell["float"].mean(),
                "mean": done["quantized"].mean(skipna=False),
                "std": done["quantized"].std(ddof=1, skipna=False) if len(done) > 1 else math.nan,
                "n": len(done),
                "failed": len(cell) - len(done),
                "seeds": " ".join(f"{seed:.0f}" for seed in done["seed"].dropna()),
                **{
                    name: done[name].mean()
                    for name in (
                        "codes_bits",
                        "parameters_bits",
                        "bits_per_coefficient",
                        "file_bits_per_coefficient",
                        "model_bits_per_coefficient",
                        "seconds",
                        "solve_seconds",
                        "peak_memory_bytes",
                    )
                },
            }
        )
    return pd.DataFrame(rows)


def bits_order(row: Any) -> tuple[float, float, float, str]:
    """Sort key of a bits setting, the most stored bits first."""
    group_size = row["group_size"] if not pd.isna(row["group_size"]) else math.inf
    ends = row["first_last_bits"] if not pd.isna(row["first_last_bits"]) else 0.0
    weight = row["weight_bits"] if not pd.isna(row["weight_bits"]) else 0.0
    return -weight, group_size, -ends, row["bits"]


def _row(record: Record, method: str, image_metric: str) -> dict[str, Any]:
    content, config = record.content, record.config
    choices, bits = dict_at(config, "choices"), dict_at(config, "bits")
    before, after = dict_at(content, "float"), dict_at(content, "quantized")
    measured = before.keys() | after.keys()
    metric = "perplexity" if "perplexity" in measured else image_metric if image_metric in measured else ""
    stored = dict_at(content, "bits_per_coefficient")
    return {
        "model": str(choices.get("model", "unknown model")),
        "data": str(choices.get("data", "unknown data")),
        "method": method,
        "method_name": str(choices.get("method", "unknown method")),
        "grid": str(choices.get("grid", "")),
        "bits": bits_label(bits),
        "bits_variant": bits_variant(bits),
        "weight_bits": number(bits.get("weight") if bits.get("budget") is None else bits["budget"]),
        "group_size": number(bits.get("group_size")),
        "first_last_bits": number(bits.get("first_last")),
        "calibration": str(choices.get("calibration", "")),
        "seed": record.seed,
        "metric": metric,
        "float": number(before.get(metric)),
        "quantized": number(after.get(metric)),
        "samples": number(after.get("samples")),
        "codes_bits": number(stored.get("codes")),
        "parameters_bits": number(stored.get("parameters")),
        "bits_per_coefficient": number(stored.get("total")),
        "file_bits_per_coefficient": number(content.get("file_bits_per_coefficient")),
        "model_bits_per_coefficient": number(content.get("model_bits_per_coefficient")),
        "seconds": number(dict_at(content, "seconds").get("total")),
        "solve_seconds": _solve_seconds(dict_at(content, "seconds")),
        "peak_memory_bytes": number(content.get("peak_memory_bytes")),
        "device": str(content.get("device") or ""),
        "status": "done" if record.done else "failed",
        "error": record.error,
        "config_hash": record.config_hash,
        "path": str(record.path),
        **protocol(content, config),
    }


def _solve_seconds(seconds: dict[str, Any]) -> float:
    """What the method itself took: choices by trials, solving and tuning, but no calibration passes."""
    if "solve" not in seconds:
        return math.nan
    spent = sum(number(seconds.get(name, 0.0)) for name in ("select", "solve", "tune"))
    return spent - number(seconds.get("limit", 0.0))  # the pipeline finds the limit inside solving


def _row_order(row: dict[str, Any]) -> tuple[Any, ...]:
    seed = -1 if row["seed"] is None else row["seed"]
    return row["model"], row["data"], method_order(row["method"]), bits_order(row), seed


def _cell_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["data"], row["method"], row["bits"], row["seed"]


def _problem(record: Record, row: dict[str, Any]) -> str | None:
    if not record.done:
        return f"{record.path}: {record.content['status']}: {record.error or 'no error message'}"
    if not math.isfinite(row["quantized"]):
        return f"{record.path}: done, but {row['metric'] or 'its metric'} is {plain(row['quantized'])}"
    if not math.isfinite(row["bits_per_coefficient"]):
        return f"{record.path}: done, but without bits per coefficient, so it is in no curve"
    return None


def _layers(records: Sequence[Record], rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Each layer of each finished record: its error, size, stored bits, and the bits of the Gaussian limit.

    Layers are numbered from 1 in forward order.
    """
    found = []
    for record, row in zip(records, rows, strict=True):
        layers = record.content.get("layers") if record.done else None
        for position, layer in enumerate(layers if isinstance(layers, list) else [], start=1):
            if isinstance(layer, dict):
                found.append(
                    {
                        **{key: row[key] for key in ("model", "data", "method", "bits", "seed")},
                        "position": position,
                        "layer": str(layer.get("name", position)),
                        "layer_bits": number(layer.get("bits")),
                        "relative_error": number(layer.get("relative_error")),
                        "coefficients": product(layer.get("shape")),
                        "bits_per_coefficient": number(layer.get("bits_per_coefficient")),
                        "limit_bits": number(layer.get("limit_bits")),
                    }
                )
    return pd.DataFrame(found, columns=LAYER_COLUMNS)


def _newest(records: Sequence[Record], keys: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Per key the position of one record: the newest finished one, or the newest where none finished.

    And a line for each other record.
    """
    best: dict[Any, int] = {}
    for i, (record, key) in enumerate(zip(records, keys, strict=True)):
        rival = records[best.setdefault(key, i)]
        if (record.done, record.written) >= (rival.done, rival.written):
            best[key] = i
    lines = [
        f"{record.path}: the same job as {records[best[key]].path}, which counts: the newest that finished"
        for i, (record, key) in enumerate(zip(records, keys, strict=True))
        if best[key] != i
    ]
    return list(best.values()), lines
