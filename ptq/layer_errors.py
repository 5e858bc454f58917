"""The errors of layers for the record: of the codes and the grid that a layer ends with.

A layer that is trained after it was solved is measured after that. Its problem, T and H, is kept on the host
until its unit is trained. Where the network is trained, the problems of all layers are kept, as far as they
take KEPT_BYTES together; beyond that a network whose training changed something is recorded without errors,
which those of the codes before would not be.
The inputs are those that the layer was solved on. Training changes what comes before the layer a little too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ptq.layers import QuantizedLayer, weight_matrix
from ptq.limit import limit_bits
from ptq.problem import LayerProblem
from ptq.report import LayerReport, Report

KEPT_BYTES = 1 << 31


def fits(layers: Iterable[nn.Module]) -> bool:
    """Whether the problems of these float layers can be kept together."""
    shapes = [weight_matrix(layer).shape for layer in layers]
    return sum(groups * i * (8 * i + 4 * o) for groups, o, i in shapes) <= KEPT_BYTES


@dataclass(kw_only=True)
class LayerErrors:
    """Enters errors, and the rates of the limit (ptq/limit.py) that has them, into a report."""

    report: Report
    limits: bool  # whether there are inputs, without which there is no limit
    _kept: dict[str, LayerProblem] = field(default_factory=dict)

    def enter(self, layer: LayerReport, problem: LayerProblem, W_hat: Tensor) -> None:
        """The error of Ŵ [groups, out, in], final as it is."""
        layer.relative_error, layer.limit_bits = problem.relative_error(W_hat), None
        if self.limits and layer.relative_error > 0:
            started = time.perf_counter()
            layer.limit_bits = limit_bits(problem.H, problem.T, layer.relative_error)
            spent = self.report.seconds
            spent["limit"] = spent.get("limit", 0.0) + time.perf_counter() - started

    def keep(self, problem: LayerProblem) -> None:
        """Hold the problem of a layer that is still to be trained."""
        self._kept[problem.name] = LayerProblem(problem.name, problem.T.cpu(), problem.H.cpu())

    def measure(self, module: nn.Module, names: Iterable[str]) -> None:
        """Enter the errors of those of the layers that were kept, as `module` now holds them, and let their
        problems go.
        """
        started, wanted = time.perf_counter(), set(names)
        for layer in self.report.layers:
            problem = self._kept.pop(layer.name, None) if layer.name in wanted else None
            if problem is not None:
                quantized = module.get_submodule(layer.name)
                assert isinstance(quantized, QuantizedLayer)
                grid, codes = quantized.grid_and_codes()
                T, H = problem.T.to(codes.device), problem.H.to(codes.device)
                self.enter(layer, LayerProblem(layer.name, T, H), grid.values(codes))
        self.report.seconds["solve"] += time.perf_counter() - started  # of which the limit is a part

    def forget(self) -> None:
        """No error is known any more."""
        for layer in self.report.layers:
            layer.relative_error = layer.limit_bits = None

    def state(self, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """What is kept of these layers, for `restore`."""
        return {name: (self._kept[name].T, self._kept[name].H) for name in names if name in self._kept}

    def restore(self, state: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Hold again what `state` gave."""
        for name, (T, H) in state.items():
            self._kept[name] = LayerProblem(name, T, H)
