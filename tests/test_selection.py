"""A job that chooses by the task: the record, the file of trials, resuming and sharing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from ptq.config import CONF_DIR
from ptq.runner import run

FAST = [
    "model=digits_resnet",
    "calibration=none",
    "eval.num_samples=60",
    "progress=false",
    "device=cpu",
    "grid.functions=[linear,tanh,square]",
    "grid.initialisations=[ones]",
    "grid.schedules=[linear]",
    "grid.steps=3",
    "method.validation_samples=50",
]
CHOICES = {"model": "digits_resnet", "data": "digits", "method": "ptnq_paper", "grid": "ptnq_paper"}


def job(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose(
            "config", overrides=["method=ptnq_paper", f"output_dir={tmp_path}", *FAST, *overrides]
        )
    record = run(config, CHOICES)
    assert record["status"] == "done", record["error"]
    return record


def test_the_record_and_the_shared_file_of_trials(tmp_path: Path) -> None:
    first = job(tmp_path, "bits=w4", "method.widths=[8]")
    facts = first["selection"]
    assert facts["candidates"] == 3
    assert facts["signs"]["unsigned_only"] == ["square"]
    assert facts["chosen"] in facts["widths"][-1]["metrics"]
    assert facts["validation"]["samples"] == facts["reference"]["samples"] == 50
    assert first["quantized"]["samples"] == 60
    chosen = facts["widths"][-1]["metrics"]
    assert chosen[facts["chosen"]]["top1"] == max(m["top1"] for m in chosen.values())
    [trials] = (tmp_path / ".selection").glob("*.jsonl")
    lines = trials.read_text().splitlines()
    assert len(lines) == 1 + facts["tried"]  # the float model, and each trial once
    # widths above are shared by a job at fewer bits, and a line cut short is tried again
    trials.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    trials.write_text(trials.read_text() + "\n")
    second = job(tmp_path, "bits=w3", "method.widths=[8,4]")
    assert second["selection"]["widths"][0] == facts["widths"][0]
    assert second["selection"]["widths"][1] == facts["widths"][1]
    names = [json.loads(line)["candidate"] for line in trials.read_text().splitlines() if line.endswith("}")]
    assert sum(name.endswith("at 8") for name in names) == 3
    again = job(tmp_path, "bits=w4", "method.widths=[8]", "rerun=true")
    assert again["selection"] == facts
    assert again["quantized"] == first["quantized"]


def test_a_single_function_is_a_job_like_any_other(tmp_path: Path) -> None:
    record = job(tmp_path, "grid.functions=[tanh]", "save_model=true", "bits=w3")
    assert "selection" not in record
    count = sum(layer["shape"][0] * layer["shape"][1] * layer["shape"][2] for layer in record["layers"])
    assert record["saved_bytes"] * 8 / count == pytest.approx(
        record["bits_per_coefficient"]["total"], abs=0.01
    )
