"""At the end of a sweep: the table, the curves, the failures, and an exit status that tells."""

from __future__ import annotations

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
        # here, so that no job pays for pandas and matplotlib
        from analysis.records import read_records
        from analysis.report import NoRecordsError, write_report

        folder = Path(config.output_dir) / config.name
        try:
            report = write_report([folder], None, None)
        except NoRecordsError as error:
            print(f"ptq-run: nothing to report: {error}", file=sys.stderr)
            sys.exit(1)
        print(report.text())
        records, _ = read_records([folder])
        if any(not record.done and record.written >= self.started for record in records):
            sys.exit(1)
