"""Trials for methods that choose by the task: quantize a copy of the model, measure it on the validation
split, and remember the result.

Results are appended to a file under the output folder as they come, one JSON line each, so that an
interrupted job goes on where it stopped and jobs at several widths share the widths above theirs. Candidates
are told apart by everything that their fit depends on, not by name.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq import pipeline
from ptq.allocation import Bits
from ptq.calibration import NoCalibration
from ptq.data.held_out import HeldOut
from ptq.errors import InputError
from ptq.evaluation import Evaluation
from ptq.methods.method import GridSpec, LayerMethod
from ptq.methods.selecting import SelectingMethod, Selection
from ptq.models.adapter import ModelAdapter
from ptq.records import config_hash

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trials:
    """One model on one validation split under one method, with the results found so far."""

    adapter: ModelAdapter
    batch: Tensor  # a small model input, to trace with
    method: LayerMethod
    bits: Bits  # of the job; a trial replaces its weight width
    data: HeldOut
    evaluation: Evaluation  # of the validation split
    device: torch.device
    seed: int
    path: Path  # of the results; one file per model × data × everything else that a result depends on

    def __post_init__(self) -> None:
        self.known: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    self.known[entry["key"]] = entry["metrics"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line cut short by an interruption

    def reference(self) -> dict[str, Any]:
        """Metrics of the float model."""
        if "float" not in self.known:
            module = self.adapter.module.to(self.device)
            self._remember("float", "float", self._evaluate(self.adapter, module))
        return self.known["float"]

    def __call__(self, name: str, grid: GridSpec, bits: float) -> dict[str, Any]:
        """Metrics of a candidate at a width, with `weight_error`; or {"failed": reason}."""
        key = config_hash({"grid": asdict(grid), "bits": bits, "method": type(self.method).__name__})  # type: ignore[call-overload]  # specs are dataclasses
        if key not in self.known:
            started = time.perf_counter()
            metrics = self._try(grid, bits)
            log.debug("%s at %g bits: %s, %.1f s", name, bits, metrics, time.perf_counter() - started)
            self._remember(key, f"{name} at {bits:g}", metrics)
        return self.known[key]

    def _try(self, grid: GridSpec, bits: float) -> dict[str, Any]:
        copied = replace(self.adapter, module=copy.deepcopy(self.adapter.module))
        try:
            report = pipeline.quantize(
                copied,
                [self.batch],
                method=self.method,
                grid=grid,
                bits=replace(self.bits, weight=bits, activation=None, activation_first_last=None),
                calibration=NoCalibration(),
                device=self.device,
                seed=self.seed,
            )
            metrics = self._evaluate(copied, copied.module)
        except InputError as error:
            return {"failed": str(error)}
        errors = [e for layer in report.layers if (e := layer.relative_error) is not None]
        return {**metrics, "weight_error": sum(errors) / max(1, len(errors))}

    def _evaluate(self, adapter: ModelAdapter, module: torch.nn.Module) -> dict[str, Any]:
        return self.evaluation.run(adapter, module, self.data.validation(), self.device, False)

    def _remember(self, key: str, label: str, metrics: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "candidate": label, "metrics": metrics})
        with self.path.open("a") as file:
            file.write(line + "\n")
        self.known[key] = json.loads(line)["metrics"]


def validation_evaluation(method: SelectingMethod, evaluation: Evaluation) -> Evaluation:
    """The job's evaluation on as much of the validation split as the method asks for."""
    return replace(evaluation, num_samples=method.validation_samples, max_tokens=method.validation_tokens)


def select(method: SelectingMethod, grid: GridSpec, trials: Trials) -> Selection:
    """The method's choice, with the file that holds every result of it."""
    selection = method.select(grid, trials.bits.weight, trials.reference(), trials)
    selection.facts["trials"] = str(trials.path)
    return selection
