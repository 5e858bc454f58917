"""The command that does a recorded job again, from the choices and values its record holds."""

from __future__ import annotations

import shlex
from functools import lru_cache
from typing import Any

from omegaconf import OmegaConf

from analysis.records import Record, dict_at, flatten
from ptq.config import load_choice
from ptq.errors import InputError

# all but the tracker, which says where a run is logged
GROUPS = (
    "model",
    "data",
    "method",
    "grid",
    "bits",
    "activations",
    "calibration",
    "preparation",
    "tuning",
    "eval",
)

# with what they are where a command leaves them out
ROOT = {"seed": 0, "device": "auto", "tf32": False, "bfloat16": False}


def command(record: Record) -> str:
    """`ptq-run model=… method=…`: every choice, and each value that is not the choice's own."""
    config = record.config
    choices = dict_at(config, "choices")
    words = [f"{group}={choices[group]}" for group in GROUPS if choices.get(group)]
    for group in GROUPS:
        if choices.get(group):
            words += _changes(group, str(choices[group]), dict_at(config, group))
    words += [f"{key}={config[key]}" for key, usual in ROOT.items() if config.get(key, usual) != usual]
    if config.get("name"):
        words.append(f"name={config['name']}")
    return shlex.join(["ptq-run", *words])


def _changes(group: str, choice: str, values: dict[str, Any]) -> list[str]:
    """Overrides that turn a choice of today's conf/ into the recorded values; none for a choice it lacks."""
    usual = _usual(group, choice)
    if usual is None:
        return []
    found = []
    for key, value in flatten(values):
        if not key or (key in usual and (usual[key] == value or "${" in str(usual[key]))):
            continue
        found.append(f"{'' if key in usual else '+'}{group}.{key}={_written(value)}")
    return found


@lru_cache(maxsize=256)
def _usual(group: str, choice: str) -> dict[str, Any] | None:
    try:
        node = load_choice(group, choice)
    except InputError:
        return None
    return dict(flatten(OmegaConf.to_container(node)))


def _written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(each)}' for key, each in value.items())}}}"
    return str(value)
