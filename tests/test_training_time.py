"""What a dry run says of training: every unit's steps count."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptq import dry_run, training_time
from ptq.config import build, load_choice
from ptq.runner import run
from ptq.training import TrainingRun
from tests.test_runner import CHOICES, config

UNITS = 12  # of the digits ResNet


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every training step takes a second, nothing else any time."""
    steps: list[int] = []
    record = TrainingRun.record
    monkeypatch.setattr(TrainingRun, "record", lambda self, loss: steps.append(1) or record(self, loss))
    monkeypatch.setattr(training_time, "time", SimpleNamespace(perf_counter=lambda: float(len(steps))))
    return steps


def training(tmp_path: Path, capsys: pytest.CaptureFixture[str], *job: str) -> int:
    """Seconds of training that the dry run of a job announces."""
    run(config(tmp_path, "dry_run=true", *job), CHOICES)
    (said,) = re.findall(r"training ([\d,]+)\)", capsys.readouterr().out)
    return int(said.replace(",", ""))


@pytest.mark.parametrize("bits", ["w2", "w4a4"])
def test_steps_of_all_blocks_count(tmp_path: Path, capsys, clock: list[int], bits: str) -> None:
    for iterations in (2000, 20000):
        job = ["method=brecq", f"method.iterations={iterations}", "method.start=rtn", f"bits={bits}"]
        assert training(tmp_path, capsys, *job) == UNITS * iterations
    # two jobs, of each kind of units one, two runs of each length
    assert len(clock) < 2 * UNITS * 2 * (training_time.SHORT + training_time.LONG)


@pytest.mark.parametrize("loss", ["l2", "fisher_diagonal"])
def test_the_time_measured_grows_with_the_steps(tmp_path: Path, capsys, loss: str) -> None:
    job = ["method=qdrop", "method.start=rtn", f"method.loss={loss}", "bits=w2"]
    few, many = (training(tmp_path, capsys, *job, f"method.iterations={n}") for n in (20000, 200000))
    assert few > 20
    assert 2 * few < many < 50 * few  # on a machine that others use too


def test_epochs_of_tuned_blocks_count(tmp_path: Path, capsys, clock: list[int]) -> None:
    """40 images in steps of 8; layers outside blocks are not tuned."""
    job = ["tuning=block", "tuning.batch_size=8", "calibration.batch_size=20"]
    one, ten = (training(tmp_path, capsys, *job, f"tuning.epochs={n}") for n in (1, 10))
    blocks, left = divmod(one, 2 * 3)
    assert left == 0
    assert 0 < blocks < UNITS
    assert ten == 10 * one
    assert training(tmp_path, capsys) == 0


@pytest.mark.parametrize(
    ("job", "key"),
    [
        (["method=brecq", "method.unit=network", "method.start=rtn"], "method.iterations"),
        (["tuning=network"], "tuning.epochs"),
    ],
    ids=["method", "tuning"],
)
def test_training_of_the_network_counts(tmp_path: Path, capsys, job: list[str], key: str) -> None:
    few, many = (training(tmp_path, capsys, *job, f"{key}={n}") for n in (20000, 400000))
    assert few > 10
    assert 4 * few < many < 100 * few


def test_the_network_as_one(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a start there are no Grams and nothing to solve; memory is that of the training."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))

    def said(*job: str) -> list[int]:
        run(config(tmp_path, "dry_run=true", "bits=w4a8", "calibration.batch_size=20", *job), CHOICES)
        pattern = r"about ([\d,]+) MiB.*calibration ([\d,]+), solving ([\d,]+), training ([\d,]+)\)"
        (found,) = re.findall(pattern, capsys.readouterr().out, re.DOTALL)
        return [int(number.replace(",", "")) for number in found]

    memory, calibration, solving, training = said("method=qft", "method.epochs=6")
    passes = build(load_choice("method", "qft", epochs=6)).passes()
    assert (calibration, solving, training) == (0, 0, 2 * passes)  # two batches, a second each
    assert memory > said("method=rtn")[0]
    assert said("method=qft", "method.epochs=6", "method.batch_size=4")[0] < memory
    started = said("method=qft_gptq_start", "method.epochs=6")
    assert started[3] == training
    assert min(started[1:3]) > 0
