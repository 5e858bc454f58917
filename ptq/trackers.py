"""Experiment trackers: where a finished record goes besides its file. A tracker that fails never fails the
job.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class NoTracker:
    """Records stay in their files."""

    def log(self, record: dict[str, Any], directory: Path) -> None:
        """Do nothing."""


class WandbMode(Enum):
    """Where Weights & Biases keeps a run."""

    online = "online"
    offline = "offline"


@dataclass(kw_only=True)
class WandbTracker:
    """Weights & Biases: config, metrics and a table of per-layer errors, one run a job.

    When the server cannot be reached the run is kept offline, in `<job>/wandb`, for `wandb sync`.
    """

    project: str
    entity: str | None
    mode: WandbMode
    timeout_seconds: int  # how long to wait for the server

    def log(self, record: dict[str, Any], directory: Path) -> None:
        """Send one record."""
        try:
            self._send(record, directory, "online" if self.mode is WandbMode.online else "offline")
        except Exception as error:
            log.warning("wandb: %s; the record is kept in %s", str(error).splitlines()[0], directory)
            if self.mode is WandbMode.online:
                try:
                    self._send(record, directory, "offline")
                except Exception as again:
                    log.warning("wandb offline: %s", again)

    def _send(self, record: dict[str, Any], directory: Path, mode: Literal["online", "offline"]) -> None:
        import wandb

        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,
            dir=str(directory),
            name=directory.name,
            config=record["config"],
            settings=wandb.Settings(init_timeout=self.timeout_seconds, silent=True),
        )
        for side in ("float", "quantized"):
            run.summary.update({f"{side}/{k}": v for k, v in (record.get(side) or {}).items()})
        run.summary.update(
            {f"bits_per_coefficient/{k}": v for k, v in (record.get("bits_per_coefficient") or {}).items()}
        )
        run.summary.update({f"seconds/{k}": v for k, v in (record.get("seconds") or {}).items()})
        run.summary["status"] = record["status"]
        columns: list[str | int] = ["name", "bits", "bits_per_coefficient", "relative_error"]
        rows: list[Iterable[Any]] = [[layer[c] for c in columns] for layer in record.get("layers") or []]
        run.log({"layers": wandb.Table(columns=columns, data=rows)})
        for index, layer in enumerate(record.get("layers") or []):
            if layer["relative_error"] is not None:
                run.log({"layer/index": index, "layer/relative_error": layer["relative_error"]})
        run.finish(exit_code=0 if record["status"] == "done" else 1)
