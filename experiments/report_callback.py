"""At the end of a sweep: the table, the curves, the failures, and an exit status that tells."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class ReportCallback(Callback):
    """Write and print the report of the records under output_dir/name when a multirun ends."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report; exit with status 1 if any job failed."""
        if config.dry_run:
            return
        from analysis.report import write_report  # here, so that no job pays for pandas and matplotlib

        report = write_report([Path(config.output_dir) / config.name], None, None)
        print(report.text())
        if report.problems:
            sys.exit(1)
