"""Finished units of a model's walk, kept (see resume.py) and put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from ptq.checkpoint import contents, replace_layers
from ptq.layer_errors import LayerErrors
from ptq.plan import Unit
from ptq.report import LayerReport, Report, TuningReport
from ptq.resume import Resume

SOLVED = "solved"  # layers quantized, the training of the unit still to come
DONE = "done"


class SavedUnits:
    """What earlier runs of a job left of the walk over `units`.

    A unit is kept as its quantized layers, its other tensors, its part of the report, and what its layers'
    errors are still to be measured with. `done` units at the start are finished; `first` is the first one
    whose inputs the walk needs: where units are chained, the inputs of the first unfinished one come through
    the finished ones before it.
    """

    def __init__(
        self, resume: Resume, units: Sequence[Unit], module: nn.Module, report: Report, errors: LayerErrors
    ) -> None:
        self.resume, self.units, self.module, self.report = resume, units, module, report
        self.errors = errors
        self.done = 0
        while self.done < len(units) and self.place(self.done).holds(DONE):
            self.done += 1
        self.first = self.done
        while 0 < self.first < len(units) and units[self.first].chained:
            self.first -= 1
        self._layers = self._tuning = 0  # entries of the report before the unit in hand

    def place(self, k: int) -> Resume:
        """Where unit `k` and its training keep their states."""
        return self.resume.within(f"unit{k:04d}")

    def finished(self, layers: Sequence[str]) -> list[str]:
        """Those of `layers` that lie in finished units."""
        names = {name for unit in self.units[: self.done] for stage in unit.stages for name in stage}
        return [name for name in layers if name in names]

    def restore(self, k: int) -> list[LayerReport]:
        """Put back what is known of unit `k`; reports of its layers, none where it is yet to be quantized."""
        self._layers, self._tuning = len(self.report.layers), len(self.report.tuning)
        state = self.place(k).load(DONE if k < self.done else SOLVED)
        if state is None:
            return []
        name = self.units[k].name
        replace_layers(self.module, state["layers"], state["packed"], state["rest"])
        tensors = {**state["packed"], **state["rest"]}
        self.module.get_submodule(name).load_state_dict(
            {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
        )
        self.errors.restore(state["problems"])
        layers = [LayerReport(**each) for each in state["reports"]["layers"]]
        self.report.layers += layers
        self.report.tuning += [TuningReport(**each) for each in state["reports"]["tuning"]]
        self.report.seconds = dict(state["reports"]["seconds"])
        return layers

    def keep(self, k: int, *, done: bool) -> None:
        """Remember unit `k` as it is now: with its layers quantized, or `done`."""
        place = self.place(k)
        if done:
            place.finish(DONE, lambda: self._state(k))
        else:
            place.keep(SOLVED, lambda: self._state(k))

    def _state(self, k: int) -> dict[str, Any]:
        layers, packed, rest = contents(self.module, self.units[k].name)
        return {
            "layers": layers,
            "packed": {key: tensor.clone() for key, tensor in packed.items()},
            "rest": rest,
            "problems": self.errors.state(n for stage in self.units[k].stages for n in stage),
            "reports": {
                "layers": [asdict(each) for each in self.report.layers[self._layers :]],
                "tuning": [asdict(each) for each in self.report.tuning[self._tuning :]],
                "seconds": dict(self.report.seconds),
            },
        }
