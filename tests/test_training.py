"""The bookkeeping of training: the curve, the bar, silence."""

from __future__ import annotations

import pytest
import torch

from ptq.resume import Resume
from ptq.training import POINTS, TrainingRun


def loop(steps: int, progress: bool = False) -> TrainingRun:
    return TrainingRun("tune block 3", steps, resume=Resume(), progress=progress, tensors=[])


def test_the_curve_has_a_hundred_means_at_most() -> None:
    run = loop(1000)
    assert all(run.record(float(k)) for k in range(1000))
    assert len(run.losses) == POINTS
    assert (run.losses[0], run.losses[-1]) == (4.5, 994.5)


def test_a_loss_that_is_not_finite_is_not_entered(capsys: pytest.CaptureFixture[str]) -> None:
    run = loop(3)
    for _ in run.rounds(1):
        assert run.record(torch.tensor(2.0))
        assert not run.record(torch.tensor(float("nan")))
    assert (run.losses, run.step) == ([2.0], 1)
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_loss_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop(4, progress=True)
    for _ in run.rounds(2):
        run.record(0.25)
        run.record(0.125)
        assert run._bar is not None
        run._bar.delay = 0
        run._bar.refresh()
    said = capsys.readouterr().err
    assert "tune block 3" in said
    assert "2/4 [00:00<00:00" in said
    assert "loss=0.125" in said
