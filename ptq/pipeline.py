"""Walk the model unit by unit: capture inputs → accumulate Grams → solve layers → replace them → next unit.

A unit is a block (see models/adapter) or a quantizable layer outside all blocks. One traced forward pass
finds the order in which units and layers run, which layers share an input, and whether a unit's input is
exactly the previous unit's output. Where it is, units are chained: the stored outputs of one are the inputs
of the next. Elsewhere (a pooling in between, a changed mask) the inputs are captured by a forward pass of the
whole model that stops at the unit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptq.allocation import Bits
from ptq.batchnorm import reestimate
from ptq.calibration import Calibration, GramAccumulator, Inputs, NoCalibration, Target
from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.layers import names_of, quantized_layer, replace_module, weight_matrix
from ptq.methods.method import GridSpec, LayerMethod
from ptq.models.adapter import QUANTIZABLE, ModelAdapter
from ptq.problem import LayerProblem


@dataclass(kw_only=True)
class Unit:
    """A part of the model that is calibrated and quantized as one."""

    name: str
    stages: list[list[str]]  # layers in order of execution; those of one stage receive the same tensor
    chained: bool  # its input is the previous unit's output, other arguments unchanged
    replayable: bool  # called once per forward pass, so that it can be run by itself
    repeated: bool  # some layer of it is called more than once in one pass


@dataclass(kw_only=True)
class Plan:
    """What a traced forward pass says about a model."""

    units: list[Unit]
    first: list[str]  # layers that run first, on the model's input
    last: list[str]  # layers that run last
    unreached: list[str]  # quantizable layers whose forward is never called

    def layers(self) -> list[str]:
        """All reached layers in order of execution."""
        return [name for unit in self.units for stage in unit.stages for name in stage]


@dataclass(kw_only=True)
class LayerReport:
    """One quantized layer: facts for the record."""

    name: str
    shape: list[int]  # W [groups, out, in]
    bits: float
    relative_error: float
    storage_bits: dict[str, int]
    seconds: float


@dataclass(kw_only=True)
class Report:
    """What quantizing a model did."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)  # name, shape, reason, parameters
    seconds: dict[str, float] = field(default_factory=lambda: {"capture": 0.0, "solve": 0.0})

    def bits_per_coefficient(self) -> dict[str, float]:
        """Stored bits of the quantized layers per weight of theirs: codes, parameters, total."""
        count = sum(_count(layer.shape) for layer in self.layers)
        if count == 0:
            return {"codes": 0.0, "parameters": 0.0, "total": 0.0}
        codes = sum(layer.storage_bits["codes"] for layer in self.layers) / count
        parameters = sum(layer.storage_bits["parameters"] for layer in self.layers) / count
        return {"codes": codes, "parameters": parameters, "total": codes + parameters}

    def model_bits_per_coefficient(self, module: nn.Module) -> float:
        """Stored bits of the whole model per parameter: quantized layers as stored, all else at its float
        width.
        """
        quantized = sum(sum(layer.storage_bits.values()) for layer in self.layers)
        weights = sum(_count(layer.shape) for layer in self.layers)
        rest = list(module.parameters())
        bits = quantized + sum(p.numel() * p.element_size() * 8 for p in rest)
        return bits / max(1, weights + sum(p.numel() for p in rest))


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def quantize(
    adapter: ModelAdapter,
    batches: list[Any],
    *,
    method: LayerMethod,
    grid: GridSpec,
    bits: Bits,
    calibration: Calibration | NoCalibration,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Quantize `adapter.module` in place and say what was done.

    `batches` are model inputs of the calibration set (for NoCalibration, one batch to trace with). Raises
    InputError, with the layer's name, on NaN or infinity in weights or inputs.
    """
    with torch.no_grad():
        walk = _Walk(adapter, batches, method, grid, bits, calibration, torch.device(device), seed)
        return walk.run(progress)


def plan(adapter: ModelAdapter, batch: Any) -> Plan:
    """Trace one forward pass of `adapter.module` on `batch` and find its units."""
    with torch.no_grad():
        return _trace(adapter, batch)


def skipped_parameters(
    adapter: ModelAdapter, plan: Plan, allocation: dict[str, float | None]
) -> list[dict[str, Any]]:
    """Every weight of two or more dimensions that stays float, with the reason."""
    skipped = []
    layers = adapter.quantizable()
    for name, parameter in adapter.module.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        if parameter.dim() < 2 or (leaf == "weight" and allocation.get(owner_name) is not None):
            continue
        owner = adapter.module.get_submodule(owner_name)
        if owner_name in adapter.skip:
            reason = adapter.skip[owner_name]
        elif owner_name in plan.unreached:
            reason = "its forward is never called, so no input of it is known"
        elif owner_name in layers:
            reason = "left out by bits.skip"
        elif isinstance(owner, QUANTIZABLE):
            reason = f"{type(owner).__name__} computes more than the layer it derives from"
        else:
            reason = f"{leaf} of a {type(owner).__name__}: not a Linear, Conv2d or Conv1D weight"
        skipped.append({"name": name, "shape": list(parameter.shape), "reason": reason})
    return skipped


def allocate(adapter: ModelAdapter, plan: Plan, bits: Bits) -> dict[str, float | None]:
    """Bits per reached layer in order of execution, None where it stays float."""
    for pattern in bits.layers:
        for name in adapter.skip:
            if fnmatchcase(name, pattern):
                raise InputError(f"bits.layers names {name!r}, which stays float: {adapter.skip[name]}")
    allocation = bits.allocate([*plan.layers(), *adapter.skip], [*plan.first, *plan.last])
    return {name: None if name in adapter.skip else allocation[name] for name in plan.layers()}


class _StopError(Exception):
    """Ends a forward pass whose remainder is not needed."""


@dataclass
class _Call:
    """Arguments of one call of a unit."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_first(self, x: Tensor) -> _Call:
        return _Call((x, *self.args[1:]), self.kwargs)

    def to(self, device: torch.device) -> _Call:
        return _Call(_map(self.args, lambda t: t.to(device)), _map(self.kwargs, lambda t: t.to(device)))

    def cloned(self) -> _Call:
        """Arguments that a unit may overwrite."""
        return _Call(_map(self.args, Tensor.clone), _map(self.kwargs, Tensor.clone))


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` on every tensor of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a namedtuple takes its items one by one
        return type(value)(*(_map(v, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, function) for v in value)
    if isinstance(value, Mapping):
        return {k: _map(v, function) for k, v in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two nested arguments are equal, tensors by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    return value[0] if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor) else None


@contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace(adapter: ModelAdapter, batch: Any) -> Plan:
    module, layers, blocks = adapter.module, adapter.quantizable(), adapter.blocks()
    if "" in layers:
        raise InputError(f"the model is a bare {type(module).__name__}: wrap it in torch.nn.Sequential")
    batch = (
        batch[:2] if isinstance(batch, Tensor) else batch
    )  # everything the pass produces is kept while it runs
    unit_of = {name: next((b for b in blocks if name.startswith(f"{b}.")), name) for name in layers}
    calls: dict[str, list[_Call]] = {}
    outputs: dict[str, tuple[Tensor, int] | None] = {}
    arrived: dict[str, int] = {}  # version of the first argument at the call
    inputs: dict[str, tuple[Tensor, int]] = {}  # layer → its input tensor and version
    order: list[str] = []  # layers by first call
    repeated: set[str] = set()

    def unit_called(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, []).append(_Call(args, kwargs))
            first = _first_tensor(args)
            arrived.setdefault(name, -1 if first is None else first._version)

        return hook

    def unit_returned(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = _first_tensor(output)
            outputs[name] = None if first is None else (first, first._version)

        return hook

    def layer_called(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name in inputs:
                repeated.add(name)
            else:
                order.append(name)
                inputs[name] = (args[0], args[0]._version)

        return hook

    units = list(dict.fromkeys(unit_of.values()))
    handles = [
        module.get_submodule(u).register_forward_pre_hook(unit_called(u), with_kwargs=True) for u in units
    ]
    handles += [module.get_submodule(u).register_forward_hook(unit_returned(u)) for u in units]
    handles += [layer.register_forward_pre_hook(layer_called(name)) for name, layer in layers.items()]
    with _hooks(handles):
        adapter.forward(module, batch)
    reached = {
        unit: [n for n in order if unit_of[n] == unit]
        for unit in calls
        if any(unit_of[n] == unit for n in order)
    }
    result: list[Unit] = []
    previous = None
    for unit, names in reached.items():
        stages: list[list[str]] = []
        for name in names:
            mate = stages[-1][0] if stages else None
            shares = (
                mate is not None and inputs[mate][0] is inputs[name][0] and inputs[mate][1] == inputs[name][1]
            )
            same_kind = (
                mate is not None
                and not isinstance(layers[mate], nn.Conv2d)
                and not isinstance(layers[name], nn.Conv2d)
            )
            if shares and same_kind:
                stages[-1].append(name)
            else:
                stages.append([name])
        once = len(calls[unit]) == 1 and _first_tensor(calls[unit][0].args) is not None
        chained = False
        if previous is not None and once and result[-1].replayable and outputs[previous] is not None:
            before, now, sent = calls[previous][0], calls[unit][0], outputs[previous]
            assert sent is not None
            chained = (
                now.args[0] is sent[0]
                and arrived[unit] == sent[1]
                and _same(now.args[1:], before.args[1:])
                and _same(now.kwargs, before.kwargs)
            )
        again = bool(repeated & set(names))
        result.append(Unit(name=unit, stages=stages, chained=chained, replayable=once, repeated=again))
        previous = unit
    if not order:
        raise InputError(
            f"model {adapter.name!r} has no Linear, Conv2d or Conv1D layer that its forward pass reaches"
        )
    first = (
        [n for n in order if inputs[n][0] is inputs[order[0]][0]]
        if adapter.task != "language_modeling"
        else []
    )
    heads = [adapter.head] if adapter.head in inputs else [order[-1]]
    return Plan(units=result, first=first, last=heads, unreached=[n for n in layers if n not in inputs])


class _Walk:
    """State of one pass over the model. `student` is quantized in place; `teacher` stays float."""

    def __init__(
        self,
        adapter: ModelAdapter,
        batches: list[Any],
        method: LayerMethod,
        grid: GridSpec,
        bits: Bits,
        calibration: Calibration | NoCalibration,
        device: torch.device,
        seed: int,
    ) -> None:
        if not batches:
            raise InputError(
                "quantization needs one batch of model inputs at least; the calibration iterable is empty"
            )
        if isinstance(calibration, NoCalibration) and method.needs_gram:
            raise InputError(
                f"method {type(method).__name__} needs calibration data; "
                "calibration=none serves rtn-like methods only"
            )
        for width in bits.widths():
            grid.check(width, bits.group_size)
        self.adapter, self.method, self.grid, self.bits, self.device = adapter, method, grid, bits, device
        self.calibration, self.seed = calibration, seed
        self.batches = [_map(b, lambda t: t.to(device)) for b in batches]
        self.student = adapter.module.to(device)
        _check_finite(self.student)
        self.plan = _trace(adapter, self.batches[0])
        self.allocation = allocate(adapter, self.plan, bits)
        self.report = Report(skipped=skipped_parameters(adapter, self.plan, self.allocation))
        self.needs_teacher = self.needs_student = False
        if isinstance(calibration, Calibration):
            self.needs_student = calibration.inputs is Inputs.quantized
            self.needs_teacher = calibration.inputs is Inputs.float or calibration.target is Target.float_path
        self.teacher = copy.deepcopy(self.student) if self.needs_teacher else None

    def run(self, progress: bool) -> Report:
        total = sum(width is not None for width in self.allocation.values())
        bar = tqdm(total=total, desc="quantize", unit="layer", disable=not progress, delay=1)
        inputs: dict[str, list[_Call]] = {}
        for k, unit in enumerate(self.plan.units):
            following = self.plan.units[k + 1] if k + 1 < len(self.plan.units) else None
            wanted = [[n for n in stage if self.allocation[n] is not None] for stage in unit.stages]
            sequential = (
                isinstance(self.calibration, Calibration)
                and self.calibration.sequential
                and self.needs_student
            )
            stages = [s for s in wanted if s] if sequential else [[n for s in wanted for n in s]]
            if isinstance(self.calibration, Calibration):
                started = time.perf_counter()
                for role, module in self._roles():
                    if unit.replayable and not (unit.chained and role in inputs):
                        inputs[role] = (
                            self._capture(module, unit.name)
                            if any(stages) or (following and following.chained)
                            else []
                        )
                self.report.seconds["capture"] += time.perf_counter() - started
            for stage in stages:
                self._quantize_stage(unit, stage, inputs, bar)
            if following is not None and following.chained and isinstance(self.calibration, Calibration):
                started = time.perf_counter()
                for role, module in self._roles():
                    inputs[role] = self._advance(module, unit.name, inputs[role])
                self.report.seconds["capture"] += time.perf_counter() - started
            else:
                inputs.clear()
        bar.close()
        if isinstance(self.calibration, Calibration) and self.calibration.reestimate_batchnorm:
            started = time.perf_counter()
            reestimate(self.adapter, self.batches)
            self.report.seconds["reestimate_batchnorm"] = time.perf_counter() - started
        return self.report

    def _roles(self) -> list[tuple[str, nn.Module]]:
        roles: list[tuple[str, nn.Module]] = []
        if self.teacher is not None:
            roles.append(("teacher", self.teacher))
        if self.needs_student:
            roles.append(("student", self.student))
        return roles

    def _capture(self, module: nn.Module, name: str) -> list[_Call]:
        """Arguments of the unit for each batch, by forward passes that stop there. Kept on the host."""
        calls: list[_Call] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(_Call(args, kwargs).cloned().to(torch.device("cpu")))
            raise _StopError

        with _hooks([module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)]):
            for batch in self.batches:
                try:
                    self.adapter.forward(module, batch)
                except _StopError:
                    continue
        return calls

    def _advance(self, module: nn.Module, name: str, calls: list[_Call]) -> list[_Call]:
        """The next unit's arguments: this one's outputs in place of its inputs."""
        unit = module.get_submodule(name)
        advanced = []
        for call in calls:
            there = call.to(self.device).cloned()
            output = _first_tensor(unit(*there.args, **there.kwargs))
            assert output is not None
            advanced.append(call.with_first(output.to("cpu")))
        return advanced

    def _quantize_stage(
        self, unit: Unit, stage: list[str], inputs: dict[str, list[_Call]], bar: tqdm[Any]
    ) -> None:
        if not stage:
            return
        started = time.perf_counter()
        if isinstance(self.calibration, Calibration):
            statistics = self._statistics(unit, stage, inputs, self.calibration)
        else:
            statistics = {}
        self.report.seconds["capture"] += time.perf_counter() - started
        for name in stage:
            started = time.perf_counter()
            layer = self.student.get_submodule(name)
            width = self.allocation[name]
            assert width is not None
            W = weight_matrix(layer).float()
            if isinstance(self.calibration, Calibration):
                H, C = statistics[name]
                problem = LayerProblem(name, W, H, C, self.calibration.target_damping)
            else:
                eye = torch.eye(W.shape[-1], dtype=torch.float64, device=W.device)
                problem = LayerProblem(name, W, eye.expand(W.shape[0], -1, -1))
            try:
                codes, fitted = self.method.quantize_layer(problem, self.grid, width, self.bits.group_size)
            except InputError as error:
                raise InputError(f"layer {name!r} {list(W.shape)}: {error}") from error
            self._replace(name, layer, problem, codes, fitted, width, time.perf_counter() - started)
            self.report.seconds["solve"] += time.perf_counter() - started
            bar.update()

    def _replace(
        self,
        name: str,
        layer: nn.Module,
        problem: LayerProblem,
        codes: Tensor,
        grid: Grid,
        width: float,
        seconds: float,
    ) -> None:
        W_hat = grid.values(codes)
        if not torch.isfinite(W_hat).all():
            raise InputError(f"layer {name!r}: quantized weights hold NaN or infinity")
        quantized = quantized_layer(layer, grid, codes).to(self.device)
        for alias in names_of(self.student, layer):
            replace_module(self.student, alias, quantized)
        self.report.layers.append(
            LayerReport(
                name=name,
                shape=list(problem.W.shape),
                bits=width,
                relative_error=problem.relative_error(W_hat),
                storage_bits=grid.storage_bits(codes),
                seconds=seconds,
            )
        )

    def _statistics(
        self, unit: Unit, stage: list[str], inputs: dict[str, list[_Call]], calibration: Calibration
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """H and, for target=float_path, C of each layer of a stage. Linear layers that share an input share
        them too.
        """
        leaders = {name: self._leader(unit, name, stage) for name in stage}
        measured = set(leaders.values())
        accumulators = {
            name: GramAccumulator(
                self.student.get_submodule(name), calibration.positions_per_image, self.seed
            )
            for name in measured
        }
        seen_by_student = calibration.inputs is Inputs.quantized
        for index in range(len(self.batches)):
            float_inputs: dict[str, list[Tensor]] = {}
            if self.teacher is not None:
                float_inputs = self._layer_inputs(self.teacher, unit, measured, inputs.get("teacher"), index)
            if not seen_by_student:
                for name, tensors in float_inputs.items():
                    for x in tensors:
                        accumulators[name].add(x)
                continue
            for name, tensors in self._layer_inputs(
                self.student, unit, measured, inputs.get("student"), index
            ).items():
                pairs = float_inputs.get(name, [None] * len(tensors))
                for x, x_float in zip(tensors, pairs, strict=True):
                    accumulators[name].add(x, x_float)
        result = {name: (a.gram(), a.cross()) for name, a in accumulators.items()}
        return {name: result[leader] for name, leader in leaders.items()}

    def _leader(self, unit: Unit, name: str, stage: list[str]) -> str:
        """The layer whose statistics serve `name`: the first of the stage that receives the same tensor."""
        mates = next(s for s in unit.stages if name in s)
        return next(n for n in mates if n in stage)

    def _layer_inputs(
        self, module: nn.Module, unit: Unit, names: set[str], calls: list[_Call] | None, index: int
    ) -> dict[str, list[Tensor]]:
        """Inputs that the named layers receive for batch `index`; the forward pass stops once all have been
        called.
        """
        received: dict[str, list[Tensor]] = {name: [] for name in names}

        def hook(name: str) -> Callable[..., None]:
            def receive(_: nn.Module, args: tuple[Any, ...]) -> None:
                received[name].append(args[0].detach().clone())
                if not unit.repeated and all(received.values()):
                    raise _StopError

            return receive

        with _hooks(module.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names):
            try:
                if unit.replayable and calls is not None:
                    call = calls[index].to(self.device).cloned()
                    module.get_submodule(unit.name)(*call.args, **call.kwargs)
                else:
                    self.adapter.forward(module, self.batches[index])
            except _StopError:
                pass
        return received


def _check_finite(module: nn.Module) -> None:
    bad = [
        n
        for n, p in [*module.named_parameters(), *module.named_buffers()]
        if p.is_floating_point() and not torch.isfinite(p).all()
    ]
    if bad:
        raise InputError(f"NaN or infinity in the model's tensors: {', '.join(bad)}; use a sound checkpoint")
