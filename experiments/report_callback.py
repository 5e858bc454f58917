"""At the end of a sweep: the table, the curves, the failures, and an exit status that tells."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class ReportCallback(Callback):
    """Write and print the report of the records under output_dir/name when a multirun ends."""

    def __init__(self) -> None:
        self.started = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember when the sweep began: failures of earlier sweeps in the same folder are not its own."""
        self.started = time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report; exit with status 1 if any job failed."""
        if config.dry_run:
            return
        from analysis.report import write_report  # here, so that no job pays for pandas and matplotlib

        report = write_report([Path(config.output_dir) / config.name], None, None)
        print(report.text())
        records = (Path(config.output_dir) / config.name).rglob("record.json")
        fresh = [path for path in records if path.stat().st_mtime >= self.started]
        if any(json.loads(path.read_text())["status"] == "failed" for path in fresh):
            sys.exit(1)
