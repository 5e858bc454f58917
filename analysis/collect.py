"""Records on disk → one tidy frame: a row per record, a readable label per method, seeds in one cell."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.names import method_order
from analysis.protocol import PROTOCOL, protocol

# Keys of the config that say where a job runs or writes, not what it computes.
NOT_A_CHOICE = {
    "seed",
    "label",
    "name",
    "tracker",
    "output_dir",
    "progress",
    "dry_run",
    "save_model",
    "rerun",
    "report",
}

# What a row and a column of a table already say, and where the run was logged.
IN_THE_LABELS = {
    "choices.model",
    "choices.data",
    "choices.method",
    "choices.grid",
    "choices.bits",
    "choices.tracker",
    "bits.weight",
    "bits.group_size",
    "bits.first_last",
}

UNSET = "unset"

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
    "model_bits_per_coefficient",
    "seconds",
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
class Record:
    """One record.json as read, before anything is made of it."""

    path: Path
    content: dict[str, Any]
    written: float  # modification time of the file, seconds

    @property
    def config(self) -> dict[str, Any]:
        return _dict(self.content, "config")

    @property
    def done(self) -> bool:
        return self.content.get("status") == "done"

    @property
    def config_hash(self) -> str:
        """The stored hash, or one made here: of the config, of the path where a record has no config."""
        identity = json.dumps(self.config, sort_keys=True) if self.config else str(self.path)
        return str(self.content.get("config_hash") or hashlib.sha256(identity.encode()).hexdigest())

    @property
    def seed(self) -> int | None:
        seed = self.content.get("seed", self.config.get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def error(self) -> str:
        """The error in one line, empty when there is none."""
        error = self.content.get("error")
        if isinstance(error, dict):
            layer = f" (layer {error['layer']!r})" if error.get("layer") else ""
            error = f"{error.get('type', 'Error')}: {error.get('message', '')}{layer}"
        return " ".join(str(error).split()) if error else ""


@dataclass
class Collection:
    """What was found: `frame` a row per record, `layers` a row per record's layer, `problems` lines."""

    frame: pd.DataFrame
    layers: pd.DataFrame
    problems: list[str] = field(default_factory=list)


def collect(dirs: Iterable[Path], metric: str | None = None) -> pd.DataFrame:
    """One row per record under `dirs`, no duplicates, sorted."""
    return collect_all(dirs, metric).frame


def collect_all(dirs: Iterable[Path], metric: str | None = None) -> Collection:
    """Read every record.json under `dirs`. `metric` is the image metric to report, top1 unless told."""
    records, problems = read_records(dirs)
    records = [records[i] for i in _newest(records, [record.config_hash for record in records])]
    labels = method_labels(records)
    rows = [_row(record, label, metric or "top1") for record, label in zip(records, labels, strict=True)]
    order = sorted(_newest(records, [_cell_key(row) for row in rows]), key=lambda i: _row_order(rows[i]))
    records, rows = [records[i] for i in order], [rows[i] for i in order]
    problems += filter(None, map(_problem, records, rows))
    return Collection(pd.DataFrame(rows, columns=COLUMNS), _layers(records, rows), problems)


def read_records(dirs: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Every record.json under `dirs`, each once, and a line for each file that is not a record."""
    records, problems = [], []
    paths = {path.resolve(): path for folder in dirs for path in sorted(Path(folder).rglob("record.json"))}
    for path in paths.values():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            written = path.stat().st_mtime
        except (OSError, ValueError) as error:
            problems.append(f"{path}: cannot be read as a record: {' '.join(str(error).split())}")
            continue
        if not isinstance(content, dict) or "status" not in content:
            problems.append(f"{path}: not a record: an object with the key 'status' is expected")
            continue
        records.append(Record(path, content, written))
    return records, problems


def bits_label(bits: dict[str, Any]) -> str:
    """`W3`, `W3 g128`, `W3 · 8-bit ends`: the nominal setting, as a column is called."""
    weight, variant = bits.get("weight"), bits_variant(bits)
    label = f"W{_plain(weight)}" if weight is not None else "W?"
    if variant.startswith("g"):
        return f"{label} {variant}"
    return f"{label} · {variant}" if variant else label


def bits_variant(bits: dict[str, Any]) -> str:
    """What is left of the label without the width: `g128`, `8-bit ends`, `g128 · 8-bit ends` or nothing."""
    parts = []
    if bits.get("group_size") is not None:
        parts.append(f"g{_plain(bits['group_size'])}")
    if bits.get("first_last") is not None:
        parts.append(f"{_plain(bits['first_last'])}-bit ends")
    return " · ".join(parts)


def method_labels(records: Sequence[Record]) -> list[str]:
    """One label per record: the method, and in brackets whatever sets it apart.

    That is the grid when it is not the method's most common one, and the config keys that differ among
    records which would otherwise be the same cell of a table with the same seed. A key is left out where it
    has the method's most common value.
    """
    choices = [_dict(record.config, "choices") for record in records]
    configs = [dict(_flatten(record.config)) for record in records]
    names = [
        str(record.content.get("label") or choice.get("method") or "unknown method")
        for record, choice in zip(records, choices, strict=True)
    ]
    collisions: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    members: dict[str, list[int]] = defaultdict(list)
    for i, (record, choice, name) in enumerate(zip(records, choices, names, strict=True)):
        cell = (choice.get("model"), choice.get("data"), choice.get("grid"))
        bits = bits_label(_dict(record.config, "bits"))
        collisions[(name, *map(str, cell), bits, record.seed)].append(i)
        members[name].append(i)
    keys: dict[str, set[str]] = {name: {"choices.grid"} for name in members}
    for (name, *_), group in collisions.items():
        keys[name] |= _differing([configs[i] for i in group])
    places = [(choice.get("model"), choice.get("data")) for choice in choices]
    labels = list(names)
    for name, group in members.items():
        short = _short_names(keys[name])
        shown: dict[int, list[str]] = defaultdict(list)
        for key in sorted(keys[name], key=lambda key: (key != "choices.grid", key)):
            values = {i: _plain(configs[i].get(key, UNSET)) for i in group}
            # A method's own key has one usual value everywhere, a key of calibration or eval one per model.
            own = key == "choices.grid" or key.startswith(("method.", "grid."))
            for peers in [group] if own else _grouped(group, places):
                usual = _most_common([values[i] for i in peers])
                for i in peers:
                    if values[i] != usual:
                        shown[i].append(f"{short[key]}={values[i]}")
        for i, parts in shown.items():
            labels[i] = f"{name} ({', '.join(parts)})"
    return labels


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
                        "model_bits_per_coefficient",
                        "seconds",
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
    choices, bits = _dict(config, "choices"), _dict(config, "bits")
    before, after = _dict(content, "float"), _dict(content, "quantized")
    measured = before.keys() | after.keys()
    metric = "perplexity" if "perplexity" in measured else image_metric if image_metric in measured else ""
    stored = _dict(content, "bits_per_coefficient")
    return {
        "model": str(choices.get("model", "unknown model")),
        "data": str(choices.get("data", "unknown data")),
        "method": method,
        "method_name": str(choices.get("method", "unknown method")),
        "grid": str(choices.get("grid", "")),
        "bits": bits_label(bits),
        "bits_variant": bits_variant(bits),
        "weight_bits": _number(bits.get("weight")),
        "group_size": _number(bits.get("group_size")),
        "first_last_bits": _number(bits.get("first_last")),
        "calibration": str(choices.get("calibration", "")),
        "seed": record.seed,
        "metric": metric,
        "float": _number(before.get(metric)),
        "quantized": _number(after.get(metric)),
        "samples": _number(after.get("samples")),
        "codes_bits": _number(stored.get("codes")),
        "parameters_bits": _number(stored.get("parameters")),
        "bits_per_coefficient": _number(stored.get("total")),
        "model_bits_per_coefficient": _number(content.get("model_bits_per_coefficient")),
        "seconds": _number(_dict(content, "seconds").get("total")),
        "peak_memory_bytes": _number(content.get("peak_memory_bytes")),
        "device": str(content.get("device") or ""),
        "status": "done" if record.done else "failed",
        "error": record.error,
        "config_hash": record.config_hash,
        "path": str(record.path),
        **protocol(content, config),
    }


def _row_order(row: dict[str, Any]) -> tuple[Any, ...]:
    seed = -1 if row["seed"] is None else row["seed"]
    return row["model"], row["data"], method_order(row["method"]), bits_order(row), seed


def _cell_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["data"], row["method"], row["bits"], row["seed"]


def _problem(record: Record, row: dict[str, Any]) -> str | None:
    if not record.done:
        return f"{record.path}: {record.content['status']}: {record.error or 'no error message'}"
    if not math.isfinite(row["quantized"]):
        return f"{record.path}: done, but {row['metric'] or 'its metric'} is {_plain(row['quantized'])}"
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
                        "layer_bits": _number(layer.get("bits")),
                        "relative_error": _number(layer.get("relative_error")),
                        "coefficients": _product(layer.get("shape")),
                        "bits_per_coefficient": _number(layer.get("bits_per_coefficient")),
                        "limit_bits": _number(layer.get("limit_bits")),
                    }
                )
    return pd.DataFrame(found, columns=LAYER_COLUMNS)


def _newest(records: Sequence[Record], keys: Sequence[Any]) -> list[int]:
    """Per key the position of one record: the newest finished one, or the newest where none finished."""
    best: dict[Any, int] = {}
    for i, (record, key) in enumerate(zip(records, keys, strict=True)):
        rival = records[best.setdefault(key, i)]
        if (record.done, record.written) >= (rival.done, rival.written):
            best[key] = i
    return list(best.values())


def _differing(configs: Sequence[dict[str, Any]]) -> set[str]:
    """Keys on which the configs differ; keys of a group whose choice alone explains them are left out."""
    known = {key for config in configs for key in config if key.split(".")[0] not in NOT_A_CHOICE}
    values = {key: {_plain(config.get(key, UNSET)) for config in configs} for key in known - IN_THE_LABELS}
    keys = {key for key in values if len(values[key]) > 1}
    choices = {key.split(".")[1] for key in keys if key.startswith("choices.")}
    return {
        key
        for key in keys
        if key.split(".")[0] not in choices or not _explained(configs, key, by=f"choices.{key.split('.')[0]}")
    }


def _explained(configs: Sequence[dict[str, Any]], key: str, by: str) -> bool:
    pairs = {(_plain(config.get(by, UNSET)), _plain(config.get(key, UNSET))) for config in configs}
    return len(pairs) == len({choice for choice, _ in pairs})


def _most_common(values: Sequence[str]) -> str | None:
    """The most common value; None when two are equally common, so that both get named."""
    ranked = Counter(values).most_common(2)
    return None if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _grouped(items: Sequence[int], keys: Sequence[Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for item in items:
        groups[keys[item]].append(item)
    return list(groups.values())


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    last = Counter(key.rsplit(".", 1)[-1] for key in keys)
    return {key: short if last[short := key.rsplit(".", 1)[-1]] == 1 else key for key in keys}


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _dict(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    """A float; NaN for whatever is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _product(shape: Any) -> float:
    """Number of coefficients of a shape; NaN for whatever is none."""
    return math.prod(map(_number, shape)) if isinstance(shape, list) and shape else math.nan


def _plain(value: Any) -> str:
    """A value as it reads in a label: 3.0 as 3, None as null, the rest as on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
