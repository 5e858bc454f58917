"""How long the training of units, or of the network, will take, from a few steps of it.

Units of the same layers on inputs of the same size count as one kind. Of each kind one is quantized by
nearest rounding and trained for a few steps on the first batch. Where the whole network is trained, a step is
counted as four forward passes of its samples: the float network's, its own, and a backward pass.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ptq.block_problem import BlockProblem
from ptq.calibration import Calibration
from ptq.capture import layer_inputs, output_gradients, unit_calls, unit_outputs
from ptq.layers import names_of, quantized_layer, replace_module, weight_matrix
from ptq.methods.method import BlockMethod, units_of, wants
from ptq.observers import InputObserver
from ptq.plan import Plan, Unit
from ptq.resume import Resume
from ptq.tuning import Scope, Tuning
from ptq.whole_network import WholeNetworkMethod

if TYPE_CHECKING:
    from ptq.runner import Parts

SHORT, LONG = 1, 5  # steps, or epochs of one batch, of the two runs whose difference counts
PASSES = 4


@runtime_checkable
class SteppedMethod(Protocol):
    """A method whose training takes so many steps for each unit."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    iterations: int
    batch_size: int


def training_seconds(
    parts: Parts,
    plan: Plan,
    allocation: dict[str, float | None],
    inputs: dict[str, int | None],
    elements: dict[str, int],
    forward_seconds: float,
) -> float:
    """Seconds of all training. `inputs` are the bits of the layers' inputs, `elements` their sizes, and
    `forward_seconds` are those of the network on one batch.
    """
    if isinstance(parts.method, WholeNetworkMethod):
        return parts.method.passes() * forward_seconds * len(parts.batches)
    if not isinstance(parts.calibration, Calibration):
        return 0.0
    method, tuning, wanted = parts.method, parts.tuning, wants(parts.method)
    batches, samples = len(parts.batches), sum(len(batch) for batch in parts.batches)
    total = 0.0
    if wanted.network and isinstance(method, SteppedMethod):
        share = min(1.0, method.batch_size / len(parts.batches[0]))
        total += PASSES * forward_seconds * share * method.iterations
    if isinstance(tuning, Tuning) and tuning.scope is Scope.network:
        share = (tuning.num_samples or samples) / samples
        total += PASSES * forward_seconds * batches * share * tuning.epochs
    known: dict[Any, float] = {}
    for unit in plan.units:
        names = [name for stage in unit.stages for name in stage if allocation[name] is not None]
        if not names or not unit.replayable:
            continue
        kind = tuple((_shape(parts, name), elements[name], allocation[name], inputs[name]) for name in names)
        if kind not in known:
            known[kind] = _unit_seconds(parts, unit, names, allocation, inputs)
        total += known[kind]
    return total


def _unit_seconds(
    parts: Parts,
    unit: Unit,
    names: list[str],
    allocation: dict[str, float | None],
    inputs: dict[str, int | None],
) -> float:
    """Seconds of what trains one unit."""
    method, tuning, wanted = parts.method, parts.tuning, wants(parts.method)
    learned = method if wanted.blocks and isinstance(method, BlockMethod) else None
    tuned = tuning if isinstance(tuning, Tuning) and tuning.scope is Scope.block else None
    if unit.name not in units_of(method, parts.adapter):
        tuned = None
    if learned is None and tuned is None:
        return 0.0
    problem = _problem(parts, unit, names, allocation, inputs)

    def seconds(train: Callable[[BlockProblem], Any]) -> float:
        own = replace(problem, block=copy.deepcopy(problem.block))
        started = time.perf_counter()
        train(own)
        if parts.device.type == "cuda":
            torch.cuda.synchronize(parts.device)
        return time.perf_counter() - started

    def each(of_length: Callable[[int], BlockMethod]) -> float:
        """Seconds of one step, or of one epoch of the batch; the faster of two runs, as others may use the
        machine too.
        """
        short, long = (min(seconds(of_length(n).tune_block) for _ in range(2)) for n in (SHORT, LONG))
        return max(0.0, long - short) / (LONG - SHORT)

    total = 0.0
    if isinstance(learned, SteppedMethod):
        total += learned.iterations * each(lambda n: replace(learned, iterations=n))
    if tuned is not None:
        total += tuned.epochs * len(parts.batches) * each(lambda n: replace(tuned, epochs=n))
    return total


def _problem(
    parts: Parts,
    unit: Unit,
    names: list[str],
    allocation: dict[str, float | None],
    inputs: dict[str, int | None],
) -> BlockProblem:
    """The unit with its layers rounded to the nearest codes, on the first batch."""
    adapter, device = parts.adapter, parts.device
    module, batch = adapter.module, parts.batches[0].to(device)
    original = module.get_submodule(unit.name)
    rounded = {name for name in names if inputs[name] is not None}
    received: dict[str, list[Tensor]] = {}
    if rounded:
        received = layer_inputs(adapter, module, unit, rounded, batch, None, device)
    holder = nn.Sequential(copy.deepcopy(original))
    for name in names:
        layer = holder.get_submodule(f"0{name.removeprefix(unit.name)}")
        width, quantizer, W = allocation[name], None, weight_matrix(layer).float()
        assert width is not None
        bits = inputs[name]
        if bits is not None:
            observer = InputObserver(layer, parts.activations, bits)
            for x in received[name]:
                observer.add(x)
            quantizer = observer.quantizer().to(device)
        grid = parts.grid.fit(W, width, parts.bits.group_size)
        made = quantized_layer(layer, grid, grid.round(W), quantizer).to(device)
        for alias in names_of(holder, layer):
            replace_module(holder, alias, made)
    alone = names == [unit.name]
    calls = unit_calls(adapter, module, unit.name, [batch])
    gradients = None
    if wants(parts.method).output_gradients:
        gradients = output_gradients(adapter, module, unit.name, [batch], 0)
    return BlockProblem(
        name=unit.name,
        block=holder if alone else holder[0],
        original=nn.Sequential(original) if alone else original,
        calls=calls,
        float_calls=calls,
        targets=unit_outputs(original, calls, device),
        output_gradients=gradients,
        seed=0,
        progress=False,
        resume=Resume(),
    )


def _shape(parts: Parts, name: str) -> tuple[int, ...]:
    return tuple(weight_matrix(parts.adapter.module.get_submodule(name)).shape)
