"""record.json as read: tolerant of every missing key, strict about what is no record at all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.records import LATER


@dataclass
class Record:
    """One record.json as read, before anything is made of it."""

    path: Path
    content: dict[str, Any]
    written: float  # modification time of the file, seconds

    @property
    def config(self) -> dict[str, Any]:
        return dict_at(self.content, "config")

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
    _fill_later(records)
    return records, problems


def _fill_later(records: list[Record]) -> None:
    """Give records the keys that came after them, where other records of the same class have them, with the
    value that all jobs had before: such jobs are alike.
    """
    for name, value in LATER.items():
        *section, key = name.split(".")
        nodes = [dict_at(record.config, section[0]) if section else record.config for record in records]
        known = {node.get("_target_") for node in nodes if key in node}
        for node in nodes:
            if node and key not in node and node.get("_target_") in known:
                node[key] = value


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dicts."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def dict_at(content: dict[str, Any], key: str) -> dict[str, Any]:
    """The dict at a key; an empty one where there is none."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float:
    """A float; NaN for whatever is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def product(shape: Any) -> float:
    """Number of coefficients of a shape; NaN for whatever is none."""
    return math.prod(map(number, shape)) if isinstance(shape, list) and shape else math.nan


def plain(value: Any) -> str:
    """A value as it reads in a label: 3.0 as 3, None as null, the rest as on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
