"""Interrupted jobs: the same bits as without the interruption, wherever it came."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq import pipeline, reconstruction, resume, walk
from ptq.errors import InputError
from ptq.layers import QuantizedLayer
from ptq.models.adapter import ModelAdapter
from ptq.report import Report
from ptq.resume import Resume, Store
from ptq.seeding import isolated_seed
from ptq.training import TrainingRun


class Block(nn.Module):
    """Two layers, a BatchNorm and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.norm(self.a(x))))


class Net(nn.Module):
    """A stem, three blocks of which the last two are chained, a layer under two names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.tied = nn.Linear(6, 6)
        self.alias = self.tied
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x)) * 2
        x = self.blocks[2](self.blocks[1](x))
        return self.head(self.dropout(self.alias(torch.tanh(self.tied(x)))))


class StagedNet(nn.Module):
    """A stem, a stage of two blocks, a block alone, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.stages = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block()))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


class Gated(nn.Module):
    """Two layers that read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class SharingNet(nn.Module):
    """Two blocks whose layers share inputs, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Gated(), Gated()])
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](x)))


class PowerCutError(Exception):
    """What ends a run in these tests."""


def net(kind: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


X = list(torch.randn(48, 5, generator=torch.Generator().manual_seed(1)).split(16))


@pytest.fixture(autouse=True)
def _write_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SHARE", 1e9)


def store(folder: Path, identity: str = "job", every: float = 0.0) -> Store:
    return Store(folder, {"config_hash": identity}, every, lambda: 7)


def quantize(
    choice,
    place: Store | None,
    tuning: str,
    *,
    method: Any = None,
    bits: str = "w3",
    kind: type[nn.Module] = Net,
    **overrides: Any,
) -> tuple[nn.Module, Report]:
    module = net(kind)
    with isolated_seed(0):
        report = pipeline.quantize(
            ModelAdapter(name="net", module=module, task="any", forward=lambda m, x: m(x)),
            X,
            method=method or choice("method", "comq"),
            grid=choice("grid", "affine"),
            bits=choice("bits", bits),
            calibration=choice("calibration", "default", target="float_path"),
            activations=choice("activations", "default"),
            tuning=choice("tuning", tuning, epochs=4, batch_size=8, **overrides)
            if tuning != "none"
            else None,
            resume=Resume(place),
        )
    return module, report


def facts(report: Report) -> list[Any]:
    """All of a report but the clock's readings."""
    return [
        *(
            (each.name, each.relative_error, each.limit_bits, each.storage_bits, each.activation)
            for each in report.layers
        ),
        *((t.unit, t.loss_before, t.loss_after, t.kept, t.steps, t.losses) for t in report.tuning),
    ]


def assert_same(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def interrupt(monkeypatch: pytest.MonkeyPatch, writes: int, run: Callable[[], object]) -> None:
    """Cut the power right after so many writes of `run`."""
    write, count = Store._write, [0]

    def counted(self: Store) -> None:
        write(self)
        count[0] += 1
        if count[0] == writes:
            raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write", counted)
        with pytest.raises(PowerCutError):
            run()


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each training step."""
    steps: list[int] = []
    record = TrainingRun.record
    monkeypatch.setattr(TrainingRun, "record", lambda self, loss: steps.append(1) or record(self, loss))
    return steps


@pytest.mark.parametrize(("writes", "bits"), [(1, "w3"), (2, "w3"), (5, "w3a8")])
def test_a_walk_cut_after_any_unit_ends_the_same(
    choice, tmp_path: Path, monkeypatch, writes: int, bits: str
) -> None:
    expected, report = quantize(choice, None, "none", bits=bits)
    interrupt(monkeypatch, writes, lambda: quantize(choice, store(tmp_path), "none", bits=bits))
    kept = store(tmp_path)
    assert (kept.spent.runs, kept.spent.peak_memory_bytes) == (1, 7)
    assert kept.spent.seconds > 0
    solved: list[str] = []
    solve = walk.quantize_to_rate
    monkeypatch.setattr(
        walk,
        "quantize_to_rate",
        lambda m, problem, *a: solved.append(problem.name) or solve(m, problem, *a),
    )
    module, again = quantize(choice, kept, "none", bits=bits)
    units = ("stem", "blocks.0", "blocks.1", "blocks.2", "tied", "head")
    assert solved == [layer.name for layer in report.layers if not layer.name.startswith(units[:writes])]
    assert_same(module, expected)
    assert facts(again) == facts(report)
    assert module.alias is module.tied
    assert isinstance(module.tied, QuantizedLayer)


@pytest.mark.parametrize(
    ("writes", "file"),
    [(3, "unit0001.tuning.training.pt"), (5, "unit0001.tuning.training.pt"), (8, "unit0002.solved.pt")],
    ids=["after one epoch", "after three epochs", "between solving and tuning"],
)
def test_block_tuning_cut_between_epochs_ends_the_same(
    choice, tmp_path: Path, monkeypatch, writes: int, file: str
) -> None:
    expected, report = quantize(choice, None, "block")
    interrupt(monkeypatch, writes, lambda: quantize(choice, store(tmp_path), "block"))
    assert (tmp_path / file).is_file()
    steps = count_steps(monkeypatch)
    module, again = quantize(choice, store(tmp_path), "block")
    assert len(steps) < sum(t.steps for t in report.tuning)
    assert_same(module, expected)
    assert facts(again) == facts(report)


@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "train"])
def test_network_tuning_cut_between_epochs_ends_the_same(
    choice, tmp_path: Path, monkeypatch, train_mode: bool
) -> None:
    """In training mode dropout draws from the global generator and BatchNorm's statistics move."""
    settings = {"train_mode": train_mode, "keep_best": False}
    expected, report = quantize(choice, None, "network", **settings)
    # six units, two epochs
    interrupt(monkeypatch, 6 + 2, lambda: quantize(choice, store(tmp_path), "network", **settings))
    steps = count_steps(monkeypatch)
    module, again = quantize(choice, store(tmp_path), "network", **settings)
    assert len(steps) == report.tuning[0].steps / 2
    assert_same(module, expected)
    assert facts(again) == facts(report)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qdrop", {}),
        ("tesseraq", {"soft_fractions": [0.6, 0.3], "selection": "gradient", "selected": 0.7}),
        ("gradient_ptq", {"unit": "network", "loss": "kl", "augmentation": "none", "float_target": False}),
        ("brecq", {"unit": "stage"}),
    ],
    ids=["qdrop", "tesseraq", "network", "stage"],
)
@pytest.mark.parametrize("writes", [3, 9, 11])
def test_learned_rounding_cut_between_rounds_ends_the_same(
    choice, tmp_path: Path, monkeypatch, name: str, settings: dict[str, Any], writes: int
) -> None:
    """A round is five steps, each unit has five of them. Units are written when solved, after each round and
    at their end; without training of their own, once, and then the network after each round.
    """
    monkeypatch.setattr(reconstruction, "ROUND", 5)
    method = choice("method", name, iterations=24, batch_size=8, rounding_rate=0.05, **settings)
    kind = StagedNet if settings.get("unit") == "stage" else Net
    run = partial(quantize, choice, tuning="none", method=method, bits="w3a8", kind=kind)
    expected, report = run(None)
    interrupt(monkeypatch, writes, lambda: run(store(tmp_path)))
    if settings.get("unit") == "network":
        units, rounds = 0, max(0, writes - 6)
    else:
        units, rounds = writes // 7, writes % 7 - 1
    assert bool(list(tmp_path.glob("*.training.pt"))) == (rounds > 0)
    steps = count_steps(monkeypatch)
    module, again = run(store(tmp_path))
    assert len(steps) == sum(t.steps for t in report.tuning) - 24 * units - min(24, 5 * rounds)
    assert_same(module, expected)
    assert facts(again) == facts(report)


@pytest.mark.parametrize("learned", [False, True], ids=["tuning", "qdrop"])
@pytest.mark.parametrize("writes", [2, 3, 4, 7, 8])
def test_layers_that_share_an_input_share_its_step_again(
    choice, tmp_path: Path, monkeypatch, learned: bool, writes: int
) -> None:
    """Cut after a unit's layers are solved, within its training, and after it."""
    monkeypatch.setattr(reconstruction, "ROUND", 5)
    method = choice("method", "qdrop", iterations=24, batch_size=8, activation_rate=0.01) if learned else None
    tuning = "none" if learned else "block"
    run = partial(quantize, choice, tuning=tuning, method=method, bits="w3a8", kind=SharingNet)
    expected, report = run(None)
    interrupt(monkeypatch, writes, lambda: run(store(tmp_path)))
    module, again = run(store(tmp_path))
    assert_same(module, expected)
    assert facts(again) == facts(report)
    for block in module.blocks:
        assert block.gate.input_quantizer is block.up.input_quantizer
    assert again.model_bits_per_coefficient(module) == report.model_bits_per_coefficient(expected)


@pytest.mark.parametrize("writes", [1, 2, 5])
def test_rounding_learned_by_layers_cut_after_any_unit_ends_the_same(
    choice, tmp_path: Path, monkeypatch, writes: int
) -> None:
    """With all the losses of the layers that were done."""
    method = choice("method", "adaround", iterations=24, rounding_rate=0.05)
    run = partial(quantize, choice, tuning="none", method=method)
    expected, report = run(None)
    assert len(report.tuning) == len(report.layers)
    interrupt(monkeypatch, writes, lambda: run(store(tmp_path)))
    steps = count_steps(monkeypatch)
    module, again = run(store(tmp_path))
    assert 0 < len(steps) < 24 * len(report.layers)
    assert_same(module, expected)
    assert facts(again) == facts(report)


def test_nothing_is_written_in_short_jobs(choice, tmp_path: Path) -> None:
    quantize(choice, store(tmp_path / "resume", every=60), "block")
    assert not (tmp_path / "resume").exists()


def test_work_of_another_job_is_thrown_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Resume(store(tmp_path)).keep("a", lambda: 1)
    assert Resume(store(tmp_path)).load("a") == 1
    with caplog.at_level(logging.INFO):
        assert Resume(store(tmp_path, "other")).load("a") is None
    assert "thrown away" in caplog.text
    assert Resume(store(tmp_path)).load("a") is None


def test_states_come_back_with_the_generators(tmp_path: Path) -> None:
    place = Resume(store(tmp_path)).within("part")
    state = {"nested": [torch.arange(3), (1.5, None, "x")], 3: {"t": torch.ones(2, dtype=torch.float16)}}
    with isolated_seed(3):
        place.keep("k", lambda: state)
        drawn = (random.random(), np.random.rand(), torch.rand(1))
        back = place.load("k")
        assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert torch.equal(back["nested"][0], state["nested"][0])
    assert back["nested"][1] == (1.5, None, "x")
    assert back[3]["t"].dtype == torch.float16


def test_finishing_a_part_removes_its_other_states_once_it_is_written(tmp_path: Path) -> None:
    kept = store(tmp_path)
    place = Resume(kept).within("unit0001")
    place.within("tuning").keep("training", lambda: 1)
    Resume(kept).within("unit0002").keep("solved", lambda: 1)
    kept.every = 60.0
    place.finish("done", lambda: 2)
    assert not place.holds("done")
    assert place.within("tuning").holds("training")
    kept.every = 0.0
    Resume(kept).keep("x", lambda: 3)
    assert {p.name for p in tmp_path.glob("*.pt")} == {"unit0001.done.pt", "unit0002.solved.pt", "x.pt"}


def test_a_damaged_file_is_told_with_the_way_out(tmp_path: Path) -> None:
    place = Resume(store(tmp_path))
    place.keep("a", lambda: 1)
    (tmp_path / "a.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"a\.pt cannot be read.*rerun=true"):
        place.load("a")


def test_a_full_disk_does_not_stop_the_job(
    tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(resume, "write_bytes", full)
    kept = store(tmp_path)
    Resume(kept).keep("a", lambda: 1)
    Resume(kept).keep("b", lambda: 1)
    assert caplog.text.count("no space left") == 1


def test_a_kill_right_after_the_first_state_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    write = resume.write_bytes

    def killed(path: Path, content: bytes) -> None:
        write(path, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            Resume(store(tmp_path)).keep("a", lambda: 1)
    assert Resume(store(tmp_path)).load("a") == 1


def test_slow_writes_are_rare(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resume, "SHARE", 0.05)
    clock = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    kept = store(tmp_path, every=1.0)
    monkeypatch.setattr(resume, "write_bytes", lambda *_: clock.__setitem__(0, clock[0] + 3.0))
    clock[0] = 2.0
    Resume(kept).keep("a", lambda: 1)
    assert kept.every == pytest.approx(60.0)
