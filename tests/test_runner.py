"""Jobs: the record, skipping what is done, failures that stop nothing, interruptions that lose nothing, the
command.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import ptq
from ptq import layers, walk
from ptq.config import CONF_DIR, choices
from ptq.errors import InputError
from ptq.hardware import peak_memory_bytes
from ptq.records import config_hash, write_json
from ptq.runner import run

FAST = ["eval.num_samples=60", "calibration.num_samples=40", "progress=false", "device=cpu"]
CHOICES = {
    "model": "digits_resnet",
    "data": "digits",
    "method": "rtn",
    "grid": "affine",
    "bits": "w4",
    "calibration": "default",
}


def config(tmp_path: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=["method=rtn", f"output_dir={tmp_path}", *FAST, *overrides])


def command(*arguments: str, expect: int = 0, **environment: str) -> str:
    """Run `python -m experiments.run` and return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=CONF_DIR.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_record(tmp_path: Path) -> None:
    record = run(config(tmp_path, "method=gptq", "save_model=true", "bits=w3"), CHOICES)
    assert record["status"] == "done"
    directory = Path(record["directory"])
    assert json.loads((directory / "record.json").read_text())["config_hash"] == record["config_hash"]
    assert set(record["float"]) == {"top1", "top5", "samples"} == set(record["quantized"])
    bits = record["bits_per_coefficient"]
    assert bits["total"] == pytest.approx(bits["codes"] + bits["parameters"])
    weights = sum(np.prod(layer["shape"]) for layer in record["layers"])
    assert record["saved_bytes"] * 8 / weights == pytest.approx(bits["total"], abs=0.01)
    size = (directory / "model" / "quantized.safetensors").stat().st_size
    assert record["file_bits_per_coefficient"] * weights == pytest.approx(8 * size)
    assert record["model_bits_per_coefficient"] > bits["total"]
    assert {layer["bits"] for layer in record["layers"]} == {3}
    assert all(0 < layer["relative_error"] < 0.5 for layer in record["layers"])
    assert record["skipped_layers"] == []
    for key in ("calibrate_and_quantize", "evaluate", "total", "capture", "solve"):
        assert record["seconds"][key] > 0
    assert record["peak_memory_bytes"] > 2**20
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    model = ptq.load(directory / "model")
    assert isinstance(model, torch.nn.Module)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a peak be reset")
def test_peak_memory_is_the_jobs_own(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    before = torch.ones(2**28).sum()  # 1 GiB, as an earlier job of the same process may have taken
    earlier = peak_memory_bytes(cpu)
    assert before > 0
    assert earlier > 2**30
    record = run(config(tmp_path), CHOICES)
    assert 2**20 < record["peak_memory_bytes"] < earlier - 2**28


def test_a_finished_job_is_not_run_again_and_float_metrics_are_reused(tmp_path: Path) -> None:
    first = run(config(tmp_path), CHOICES)
    path = Path(first["directory"]) / "record.json"
    stamp = path.stat().st_mtime_ns
    assert run(config(tmp_path), CHOICES)["config_hash"] == first["config_hash"]
    assert path.stat().st_mtime_ns == stamp
    assert run(config(tmp_path, "rerun=true"), CHOICES)["status"] == "done"
    assert path.stat().st_mtime_ns > stamp
    [cached] = (tmp_path / ".float_metrics").glob("*.json")
    write_json(cached, {"top1": 12.5, "top5": 50.0, "samples": 60})
    assert run(config(tmp_path, "bits=w3"), CHOICES)["float"]["top1"] == 12.5


def test_same_seed_same_record_other_seed_other_draw(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    records = [
        run(config(tmp_path / str(k), "method=comq", "bits=w2", f"seed={k // 2}"), CHOICES) for k in range(3)
    ]
    errors = [[layer["relative_error"] for layer in record["layers"]] for record in records]
    assert errors[0] == errors[1] != errors[2]
    assert records[0]["quantized"] == records[1]["quantized"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bits.weight=0"], "bits.weight must be positive; got 0"),
        (["bits.weight=1.5"], "integer from 1 to 16.*got 1.5"),
        (["bits.weight=17"], "integer from 1 to 16.*got 17"),
        (["bits.weight=-3"], "must be positive; got -3"),
        (["bits.group_size=0"], "group_size must be at least 1.*got 0"),
        (["bits.group_size=-1"], "group_size must be at least 1.*got -1"),
        (["calibration.num_samples=0"], "num_samples must be at least 1; got 0"),
        (["calibration.num_samples=5000"], "1200.*5000"),
        (["data=topics"], "language_modeling|classification"),
        (["model.checkpoint=/no/such/file.safetensors"], "/no/such/file.safetensors"),
        (["device=cuda:99"], "device=cuda:99|cuda"),
        (["device=quantum"], "device must be auto, cpu"),
        (["+bits.layers={stem9: 8}"], "'stem9'"),
        (["calibration.source=digitz"], "did you mean 'digits'"),
        (["calibration.source=random_tokens"], "random_tokens is text.*for images choose noise"),
        (["data=noise"], "it only calibrates.*calibration.source=noise"),
        (["calibration.source=noise", "calibration.balance=true"], "these have no labels"),
        (
            ["calibration.source=noise", "tuning=network", "tuning.loss=cross_entropy"],
            "calibration.source=noise has none",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_leaves_a_record_with_its_error(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    record = run(config(tmp_path, *overrides), CHOICES)
    assert record["status"] == "failed"
    assert record["error"]["type"] == "InputError"
    assert record["error"]["traceback"] is None
    assert re.search(message, record["error"]["message"], re.DOTALL), record["error"]["message"]
    # before work starts: nothing was evaluated
    assert not (tmp_path / ".float_metrics").exists()


def test_a_failed_job_is_tried_again(tmp_path: Path) -> None:
    failing = config(tmp_path, "model.checkpoint=/no/such/file.safetensors")
    assert run(failing, CHOICES)["status"] == "failed"
    assert run(failing, CHOICES)["status"] == "failed"
    assert run(config(tmp_path), CHOICES)["status"] == "done"


@pytest.mark.parametrize("value", [None, "/no/such/folder"], ids=["unset", "wrong"])
def test_data_folder_unset_or_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("PTQ_DATA", raising=False)
    else:
        monkeypatch.setenv("PTQ_DATA", value)
    record = run(config(tmp_path, "model=cifar10_resnet20"), CHOICES)
    assert record["status"] == "failed"
    assert "PTQ_DATA" in record["error"]["message"]


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot be written.*set output_dir"):
        run(config(tmp_path / "file"), CHOICES)


def test_dry_run_says_what_would_happen_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(tmp_path, "dry_run=true", "method=comq", "bits=w2"), CHOICES)
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    record = run(config(tmp_path, "method=comq", "bits=w2"), CHOICES)
    assert f"{record['bits_per_coefficient']['total']:.4f} bits per coefficient" in said
    for layer in record["layers"]:
        assert layer["name"] in said
        assert layer["activation"] is None
    assert "memory to expect" in said
    assert "time to expect" in said
    with pytest.raises(InputError):
        run(config(tmp_path, "dry_run=true", "bits.weight=17"), CHOICES)


def test_widths_of_inputs_in_dry_run_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(tmp_path, "dry_run=true", "bits=w4a4_ends8"), {**CHOICES, "bits": "w4a4_ends8"})
    said = capsys.readouterr().out
    record = run(config(tmp_path, "bits=w4a4_ends8"), {**CHOICES, "bits": "w4a4_ends8"})
    widths = [layer["activation"]["bits"] for layer in record["layers"]]
    assert widths == [8, *[4] * (len(widths) - 2), 8]
    for layer in record["layers"]:
        (line,) = [one.split() for one in said.splitlines() if one.startswith(f"{layer['name']} ")]
        assert line[-3:-1] == [f"{layer['bits']:g}", str(layer["activation"]["bits"])]
    assert "float" not in said.split("quantized:")[0]
    wrong = config(tmp_path, "dry_run=true", "bits=w4a4")
    wrong.calibration = {"_target_": "ptq.calibration.NoCalibration"}
    with pytest.raises(InputError, match="takes its ranges from data"):
        run(wrong, CHOICES)


def test_config_hash_ignores_what_cannot_change_the_result() -> None:
    base = {"seed": 0, "method": {"sweeps": 3}, "output_dir": "a", "progress": True}
    assert config_hash(base) == config_hash({**base, "output_dir": "b", "progress": False})
    assert config_hash(base) != config_hash({**base, "seed": 1})
    old = {**base, "calibration": {"num_samples": 5}}
    grown = {**old, "calibration": {"num_samples": 5, "balance": False, "image_augmentation": []}}
    assert config_hash(grown) == config_hash(old)  # jobs from before these keys are not run again
    assert config_hash({**old, "calibration": {"num_samples": 5, "balance": True}}) != config_hash(old)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"value": 1})

    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}


def test_sweep_with_a_failing_job_finishes_reports_and_exits_with_one(tmp_path: Path) -> None:
    said = command(
        "-m", "bits=w4,w2", "method=rtn", "bits.group_size=null,0", f"output_dir={tmp_path}", *FAST, expect=1
    )
    statuses = [json.loads(p.read_text())["status"] for p in (tmp_path / "runs").rglob("record.json")]
    assert sorted(statuses) == ["done", "done", "failed", "failed"]
    assert "group_size must be at least 1" in said
    assert (tmp_path / "runs" / "table.md").is_file()


def test_parallel_sweep_with_joblib(tmp_path: Path) -> None:
    arguments = ["-m", "bits=w4,w3", "method=rtn,gptq", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    said = command(*arguments, f"output_dir={tmp_path}", *FAST)
    records = list((tmp_path / "runs").rglob("record.json"))
    assert [json.loads(p.read_text())["status"] for p in records] == ["done"] * 4
    assert "| gptq" in said


def test_killed_sweep_resumes(tmp_path: Path) -> None:
    arguments = ["-m", "bits=w4,w3,w2", "method=rtn,comq", f"output_dir={tmp_path}", *FAST]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments],
        cwd=CONF_DIR.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (done := list((tmp_path / "runs").rglob("record.json"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list((tmp_path / "runs").rglob("record.json"))
    stamps = {path: path.stat().st_mtime_ns for path in done}
    assert 0 < len(stamps) < 6
    said = command(*arguments)
    records = list((tmp_path / "runs").rglob("record.json"))
    assert len(records) == 6
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert said.count("already done") == len(stamps)
    assert said.count("| comq") + said.count("| rtn") >= 2


def test_a_killed_job_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    arguments = [
        "method=rtn", "bits=w3", "tuning=block", "tuning.epochs=8", "calibration.batch_size=20", *FAST,
        "save_every_s=0",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments, f"output_dir={tmp_path / 'killed'}"],
        cwd=CONF_DIR.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not list((tmp_path / "killed").rglob("resume/*.done.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = command(*arguments, f"output_dir={tmp_path / 'killed'}")
    assert "going on with a job that was interrupted" in said
    command(*arguments, f"output_dir={tmp_path / 'whole'}")
    [killed], [whole] = (list((tmp_path / name).rglob("record.json")) for name in ("killed", "whole"))
    assert list(killed.parent.iterdir()) == [killed]
    one, two = json.loads(killed.read_text()), json.loads(whole.read_text())
    assert (one["interruptions"], two["interruptions"]) == (1, 0)
    for record in (one, two):
        for part in (*record["layers"], *record["tuning"]):
            part.pop("seconds")
    for key in ("quantized", "layers", "tuning", "bits_per_coefficient", "config_hash"):
        assert one[key] == two[key], key
    assert all(len(unit["losses"]) == unit["steps"] for unit in one["tuning"])
    assert one["seconds"]["total"] > one["seconds"]["calibrate_and_quantize"] > one["seconds"]["tune"]


def test_products_are_exact_unless_asked_for_and_always_in_solvers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {"capture": set(), "solve": set()}
    outputs, solve = walk.unit_outputs, walk.quantize_to_rate

    def spy(place: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any) -> Any:
            seen[place].add(torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32)
            return inner(*args)

        return look

    monkeypatch.setattr(walk, "unit_outputs", spy("capture", outputs))
    monkeypatch.setattr(walk, "quantize_to_rate", spy("solve", solve))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    hashes = []
    for tf32 in (True, False):
        record = run(config(tmp_path, f"tf32={tf32}", "tuning=block", "tuning.epochs=1"), CHOICES)
        hashes.append(record["config_hash"])
        assert seen == {"capture": {tf32}, "solve": {False}}
        seen["capture"].clear()
    assert hashes[0] != hashes[1]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["method=brecq_fast", "method.iterations=60"], id="codes"),
        pytest.param(["method=rtn", "tuning=block", "tuning.epochs=2"], id="block"),
        pytest.param(["method=rtn", "tuning=network", "tuning.epochs=2"], id="network"),
        pytest.param(["method=qft", "method.epochs=6"], id="qft"),
    ],
)
def test_only_what_learns_multiplies_in_bfloat16_and_only_where_asked(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, set[torch.dtype]] = {}
    inner = layers._product

    def spy(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.setdefault(torch.is_grad_enabled(), set()).add(x.dtype)
        return inner(x, *args)

    monkeypatch.setattr(layers, "_product", spy)
    lost, hashes = {}, []
    for asked in (False, True):
        seen.clear()
        job = config(tmp_path, f"bfloat16={asked}", "bits=w3", *overrides)
        record = run(job, {**CHOICES, "method": overrides[0].removeprefix("method=")})
        assert record["status"] == "done", record["error"]
        learned = torch.bfloat16 if asked else torch.float32
        assert seen == {True: {learned}, False: {torch.float32}}
        lost[asked] = [unit["loss_after"] / unit["loss_before"] for unit in record["tuning"]]
        hashes.append(record["config_hash"])
    assert hashes[0] != hashes[1]
    assert lost[True] != lost[False]
    assert sum(lost[True]) == pytest.approx(sum(lost[False]), rel=0.05)
    assert sum(lost[True]) < 0.95 * len(lost[True])


def test_help_lists_the_choices_of_each_group() -> None:
    said = command("--help")
    for group in (
        "model",
        "data",
        "calibration",
        "grid",
        "bits",
        "method",
        "tuning",
        "eval",
        "tracker",
        "experiment",
    ):
        for name in choices(group):
            assert name in said, f"{group}={name}"


def test_a_single_failing_job_ends_in_one_plain_message(tmp_path: Path) -> None:
    said = command("bits.weight=17", f"output_dir={tmp_path}", *FAST, expect=1)
    assert "integer from 1 to 16" in said
    assert "Traceback" not in said
    said = command("method=comk", expect=1)
    assert "did you mean 'comq'" in said
    assert "Traceback" not in said


def test_wandb_offline_keeps_the_run_and_an_unreachable_server_loses_nothing(tmp_path: Path) -> None:
    for mode in ("offline", "online"):
        said = command(
            "tracker=wandb", f"tracker.mode={mode}", "tracker.timeout_seconds=5",
            "method=rtn", f"output_dir={tmp_path / mode}", *FAST,
            WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40,
        )  # fmt: skip
        [record] = (tmp_path / mode / "runs").rglob("record.json")
        assert json.loads(record.read_text())["status"] == "done", said
        assert list((record.parent / "wandb").glob("offline-run-*")), said
