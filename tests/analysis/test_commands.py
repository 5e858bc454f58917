from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis.commands import GROUPS, command
from analysis.records import Record
from ptq.config import CONF_DIR
from ptq.runner import GROUPS as ALL_GROUPS

CHOICES = {"model": "digits_vit", "data": "digits", "method": "comq", "grid": "affine_float", "bits": "w3"}
CHOICES |= {"calibration": "default", "tuning": "none", "eval": "default"}
CHOICES |= {"activations": "percentile", "preparation": "equalize"}


def composed(words: list[str]) -> dict[str, Any]:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        found = OmegaConf.to_container(compose("config", words), resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def test_the_command_composes_the_recorded_config() -> None:
    words = [
        "model=digits_vit",
        "bits=w3",
        "method.sweeps=7",
        "method.shrink=[1.0,0.5]",
        "seed=3",
        "name=mine",
    ]
    words += ["calibration.target=float_path", "bits.group_size=32", "bits.activation=8", "tf32=true"]
    words += ["activations=percentile", "activations.percentile=99.5", "preparation=equalize"]
    config = composed(words)
    made = shlex.split(command(Record(Path("record.json"), {"config": {**config, "choices": CHOICES}}, 0.0)))
    assert made[0] == "ptq-run"
    assert "method.sweeps=7" in made
    assert not any(word.startswith("method.order") for word in made)
    assert composed(made[1:]) == config


def test_a_choice_that_is_gone_is_still_named() -> None:
    content = {"config": {"choices": {"method": "forgotten"}, "method": {"x": 1}}}
    assert command(Record(Path("record.json"), content, 0.0)) == "ptq-run method=forgotten"


def test_a_group_without_values_changes_nothing() -> None:
    content = {"config": {"choices": {"method": "rtn", "data": "digits"}, "method": {}}}
    assert command(Record(Path("record.json"), content, 0.0)) == "ptq-run data=digits method=rtn"


def test_every_group_is_told() -> None:
    assert {*GROUPS, "tracker"} == set(ALL_GROUPS)
