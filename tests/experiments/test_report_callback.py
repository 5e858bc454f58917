from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.report_callback import ReportCallback


def config(folder: Path) -> DictConfig:
    return OmegaConf.create({"output_dir": str(folder), "name": "sweep", "dry_run": False})


def ended(folder: Path, text: str | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was printed at the end of a sweep that wrote `text` as its one record."""
    callback = ReportCallback()
    callback.on_multirun_start(config(folder))
    callback.started -= 10  # file systems keep times more coarsely than clocks
    (folder / "sweep" / "job").mkdir(parents=True)
    if text is not None:
        (folder / "sweep" / "job" / "record.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        callback.on_multirun_end(config(folder))
    printed = capsys.readouterr()
    return int(str(stopped.value.code)), printed.out + printed.err


def test_a_failed_job_is_reported_and_ends_in_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = ended(tmp_path, '{"status": "failed", "error": "no memory"}', capsys)
    assert status == 1
    assert "failed: no memory" in printed


@pytest.mark.parametrize("text", [None, '{"status": "do'], ids=["no record", "half a record"])
def test_a_sweep_without_a_record_says_so(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = ended(tmp_path, text, capsys)
    assert status == 1
    assert "nothing to report: no record.json with a result or an error under" in printed
