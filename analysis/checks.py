"""What makes the numbers of one table hard to compare: jobs of one cell's column that were not run alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from analysis.names import METRICS, MISSING
from analysis.protocol import PROTOCOL
from analysis.records import Record, dict_at
from analysis.tables import split_by_model

WORDS = {
    "activation_bits": "activation bits",
    "first_last": "first and last layers",
    "tuning": "tuning",
    "calibration_data": "calibration data",
    "calibration_samples": "calibration samples",
    "context": "context length",
    "samples": "evaluation samples",
    "float": "result of the float model",
    "device": "device, so times do not compare",
}
OF_CALIBRATION = ("calibration_data", "calibration_samples")
WITHIN_ALL = ("float", "device")  # these should agree over all bits settings of a model
SHOWN = 3  # labels named for a value that few jobs have


def mixed_protocols(frame: pd.DataFrame, records: Sequence[Record] = ()) -> list[str]:
    """A line per model and thing that differs among finished jobs of one bits setting; then mixed versions.

    `frame` comes from `collect.collect`. Jobs without calibration are not held against those with it.
    """
    done = frame[frame["status"] == "done"]
    lines = []
    for title, block in split_by_model(done):
        for name in (*PROTOCOL, "samples", "float", "device"):
            compared = block
            if name in OF_CALIBRATION:
                compared = block[block["calibration_data"] != "none"]
            words = compared.apply(lambda row, name=name: _word(name, row), axis=1) if len(compared) else None
            if words is None:
                continue
            columns = [words] if name in WITHIN_ALL else [part for _, part in words.groupby(compared["bits"])]
            if any(column.nunique() > 1 for column in columns):
                lines.append(f"{title}: {WORDS[name]}: {_values(words, compared['method'])}")
    return lines + _mixed_versions(records)


def _mixed_versions(records: Sequence[Record]) -> list[str]:
    found = [dict_at(record.content, "versions") for record in records if record.done]
    lines = []
    for name in ("torch", "commit"):
        counts = Counter(str(each[name]) for each in found if name in each)
        if len(counts) > 1:
            parts = [f"{value} ({_jobs(number)})" for value, number in counts.most_common()]
            lines.append(f"all models: {name}: {', '.join(parts)}")
    return lines


def _word(name: str, row: pd.Series) -> str:
    value = row[name]
    if isinstance(value, str):
        return value or MISSING
    if pd.isna(value):
        return MISSING
    if name == "float" and row["metric"] in METRICS:
        return METRICS[row["metric"]].format(value)
    return f"{value:g}"


def _values(words: pd.Series, methods: pd.Series) -> str:
    """`none (20 jobs), block (2 jobs: decoupleq)`: the usual value first, who has the others."""
    parts = []
    for position, (value, number) in enumerate(words.value_counts().items()):
        who = list(dict.fromkeys(methods[words == value]))
        named = f": {', '.join(who)}" if position and len(who) <= SHOWN else ""
        parts.append(f"{value} ({_jobs(number)}{named})")
    return ", ".join(parts)


def _jobs(number: int) -> str:
    return f"{number} job" if number == 1 else f"{number} jobs"
