"""What arrives at the layers of a stage: quantizers calibrated on it, then the statistics of what they give.

Two passes over the calibration batches, the first only where inputs are quantized. What a later pass would
compute again is kept where it fits in KEPT_BYTES: the inputs of a stage from its first pass to its second,
and those of all stages of a unit in the float network, which does not change between them.

With target=layer a layer shall reproduce W x̂ of its own rounded input x̂ (bias correction restores the mean of
W x); with target=float_path, W x of the float network's input x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.activations import ActivationQuantizer
from ptq.calibration import Calibration, GramAccumulator, Inputs, NoCalibration, Statistics, Target
from ptq.capture import layer_inputs
from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter
from ptq.observers import Activations, InputObserver
from ptq.plan import Call, Unit, hooks, map_tensors

KEPT_BYTES = 1 << 30


class KeptInputs:
    """Inputs of layers, by role, layer and batch, until they are asked for or their unit is done."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str, int], list[Tensor]] = {}
        self._bytes = 0
        self.full = False  # something did not fit

    def clear(self) -> None:
        self._held.clear()
        self._bytes, self.full = 0, False

    def keep(self, role: str, index: int, received: dict[str, list[Tensor]]) -> None:
        """Keep what layers received for batch `index`, all of it or nothing."""
        new = {(role, name, index): tensors for name, tensors in received.items()}
        new = {key: tensors for key, tensors in new.items() if key not in self._held}
        size = sum(t.nbytes for tensors in new.values() for t in tensors)
        if self._bytes + size > KEPT_BYTES:
            self.full = True
            return
        self._bytes += size
        self._held.update(new)

    def take(self, role: str, index: int, names: set[str]) -> dict[str, list[Tensor]] | None:
        """What the layers received for batch `index`, which is then forgotten; None unless all is there."""
        if any((role, name, index) not in self._held for name in names):
            return None
        found = {name: self._held.pop((role, name, index)) for name in names}
        self._bytes -= sum(t.nbytes for tensors in found.values() for t in tensors)
        return found


@dataclass(kw_only=True)
class StageInputs:
    """The inputs of a model's layers while it is quantized; `adapter.module` is the network that changes."""

    adapter: ModelAdapter
    teacher: nn.Module | None  # the float network, where inputs of it are asked for
    batches: list[Any]
    order: list[str]  # layers to quantize, as they run
    bits: dict[str, int | None]  # of the inputs
    activations: Activations | None
    calibration: Calibration | NoCalibration
    redraw: Callable[[int], list[Any]] | None
    device: torch.device
    seed: int
    kept: KeptInputs = field(default_factory=KeptInputs)
    following: list[list[str]] = field(default_factory=list)  # the unit's stages that are still to come

    def enter(self, stages: list[list[str]]) -> None:
        """Begin with a unit, whose stages will be asked for in this order."""
        self.kept.clear()
        self.following = list(stages)

    def quantizers(
        self, unit: Unit, stage: list[str], inputs: dict[str, list[Call]]
    ) -> dict[str, ActivationQuantizer]:
        """The quantizers of a stage's inputs, by layer; layers that share an input share one."""
        leaders = {n: self._leader(unit, n, stage) for n in stage if self.bits[n] is not None}
        observers: dict[str, InputObserver] = {}
        for name in dict.fromkeys(leaders.values()):
            width = self.bits[name]
            assert self.activations is not None
            assert width is not None
            with _naming(name):
                observers[name] = InputObserver(
                    self.adapter.module.get_submodule(name), self.activations, width
                )
        if observers and isinstance(self.calibration, Calibration):
            for name, x, _ in self._received(unit, list(observers), inputs, self.calibration, paired=False):
                with _naming(name):
                    observers[name].add(x)
        quantizers = {name: observer.quantizer().to(self.device) for name, observer in observers.items()}
        return {name: quantizers[leader] for name, leader in leaders.items()}

    def statistics(
        self,
        unit: Unit,
        stage: list[str],
        inputs: dict[str, list[Call]],
        quantizers: dict[str, ActivationQuantizer],
    ) -> dict[str, Statistics]:
        """Statistics of each layer of a stage, of its inputs as quantized. Linear layers that share an input
        share them too.
        """
        calibration = self.calibration
        assert isinstance(calibration, Calibration)
        self.following = self.following[1:]
        leaders = {name: self._leader(unit, name, stage) for name in stage}
        accumulators = {
            name: GramAccumulator(
                self.adapter.module.get_submodule(name),
                calibration.positions_per_image,
                self.seed,
                means=calibration.bias_correction,
            )
            for name in dict.fromkeys(leaders.values())
        }
        for name, x, x_float in self._received(unit, list(accumulators), inputs, calibration, paired=True):
            quantizer = quantizers.get(name)
            if quantizer is None:
                accumulators[name].add(x, x_float)
            else:
                accumulators[name].add(quantizer(x), x_float, wanted=x if x_float is None else x_float)
        result = {name: accumulator.statistics() for name, accumulator in accumulators.items()}
        return {name: result[leader] for name, leader in leaders.items()}

    def _received(
        self,
        unit: Unit,
        names: list[str],
        inputs: dict[str, list[Call]],
        calibration: Calibration,
        paired: bool,
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Name, what the layer receives, and, for target=float_path and `paired`, what it does in the float
        network; batch by batch.
        """
        if calibration.fresh_per_layer:
            for name in names:
                for x in self._fresh_inputs(name, self.order.index(name)):
                    yield name, x, None
            return
        wanted, role = set(names), "student" if calibration.inputs is Inputs.quantized else "teacher"
        for index in range(len(self.batches)):
            float_inputs: dict[str, list[Tensor]] = {}
            if paired and calibration.target is Target.float_path:
                float_inputs = self._layer_inputs("teacher", unit, wanted, inputs, index)
            received = self._layer_inputs(role, unit, wanted, inputs, index)
            if not paired and not self.kept.full:
                self.kept.keep(role, index, received)
            for name, tensors in received.items():
                pairs = float_inputs[name] if float_inputs else [None] * len(tensors)
                for x, x_float in zip(tensors, pairs, strict=True):
                    yield name, x, x_float

    def _fresh_inputs(self, name: str, index: int) -> Iterator[Tensor]:
        """Inputs of the layer at `index` from samples drawn for it alone, through the float network."""
        assert self.redraw is not None
        assert self.teacher is not None
        layer = self.teacher.get_submodule(name)
        received: list[Tensor] = []
        with hooks([layer.register_forward_pre_hook(lambda _, args: received.append(args[0]))]):
            for batch in self.redraw(index):
                self.adapter.forward(self.teacher, map_tensors(batch, lambda t: t.to(self.device)))
                yield from received
                received.clear()

    def _leader(self, unit: Unit, name: str, stage: list[str]) -> str:
        """The layer whose statistics serve `name`: the first of the stage that receives the same tensor and
        quantizes it alike.
        """
        if isinstance(self.calibration, Calibration) and self.calibration.fresh_per_layer:
            return name
        width = self.bits[name]
        mates = next(s for s in unit.stages if name in s)
        return next(n for n in mates if n in stage and self.bits[n] == width)

    def _layer_inputs(
        self, role: str, unit: Unit, names: set[str], inputs: dict[str, list[Call]], index: int
    ) -> dict[str, list[Tensor]]:
        """Inputs that the named layers receive for batch `index` in the float or the quantized network."""
        found = self.kept.take(role, index, names)
        if found is not None:
            return found
        module = self.teacher if role == "teacher" else self.adapter.module
        assert module is not None
        call = inputs[role][index] if unit.replayable and role in inputs else None
        later: set[str] = set()
        if role == "teacher" and not self.kept.full:
            later = {self._leader(unit, n, stage) for stage in self.following for n in stage} - names
        received = layer_inputs(
            self.adapter, module, unit, names | later, self.batches[index], call, self.device
        )
        if later:
            self.kept.keep(role, index, {name: received[name] for name in later})
        return {name: received[name] for name in names}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the layer's name before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from error
