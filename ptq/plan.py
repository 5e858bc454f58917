"""What one traced forward pass says about a model: its units, its layers in order, and who shares an input.

A unit is a block (see models/adapter), or what else is to be quantized as one, or a quantizable layer outside
all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ptq.allocation import Bits
from ptq.errors import InputError
from ptq.layers import weight_matrix
from ptq.models.adapter import QUANTIZABLE, ModelAdapter, is_embedding

EMBEDDINGS_WANTED = "model.skip_embeddings=false (embeddings=True in quantize_model)"


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


def skipped_parameters(
    adapter: ModelAdapter, plan: Plan, allocation: dict[str, float | None]
) -> list[dict[str, Any]]:
    """Every weight of two or more dimensions that stays float, with the reason."""
    skipped = []
    layers = adapter.quantizable()
    quantized = {id(layers[name]) for name, width in allocation.items() if width is not None}
    listed: set[int] = set()
    # with duplicates: of layers that share a weight, one may be quantized and the other not
    for name, parameter in adapter.module.named_parameters(remove_duplicate=False):
        owner_name, _, leaf = name.rpartition(".")
        owner = adapter.module.get_submodule(owner_name)
        if parameter.dim() < 2 or (leaf == "weight" and id(owner) in quantized) or id(parameter) in listed:
            continue
        listed.add(id(parameter))
        if owner_name in adapter.skip:
            reason = adapter.skip[owner_name]
        elif owner_name in plan.unreached:
            reason = "its forward is never called, so no input of it is known"
        elif owner_name in layers:
            reason = "left out by bits.skip"
        elif isinstance(owner, QUANTIZABLE) or (adapter.embeddings and isinstance(owner, nn.Embedding)):
            reason = f"{type(owner).__name__} computes more than the layer it derives from"
        else:
            reason = f"{leaf} of a {type(owner).__name__}: not a Linear, Conv2d or Conv1D weight"
            if is_embedding(owner):
                reason += f"; {EMBEDDINGS_WANTED} quantizes it"
        skipped.append({"name": name, "shape": list(parameter.shape), "reason": reason})
    return skipped


def doubled_weights(adapter: ModelAdapter, allocation: dict[str, float | None]) -> int:
    """Weights that the float model stores once and the quantized one twice: as codes, and as the float matrix
    of a module that shared them.
    """
    layers = adapter.quantizable()
    quantized = {id(layers[name]): layers[name] for name, width in allocation.items() if width is not None}
    kept: set[int] = set()
    for module in adapter.module.modules():
        if id(module) not in quantized:
            kept |= {id(p) for p in module.parameters(recurse=False)}
    shared = [weight_matrix(layer).numel() for layer in quantized.values() if id(layer.weight) in kept]
    return adapter.copied + sum(shared)


def check_layers(adapter: ModelAdapter, bits: Bits) -> None:
    """Raise InputError where `bits` names layers that the model lacks, or asks for what it cannot have; no
    forward pass is needed to see that.
    """
    layers = adapter.quantizable()
    _refuse_float_embeddings(adapter, bits)
    widths = bits.allocate(layers, [])
    bits.allocate_activations(layers, [])
    _refuse_shared(adapter, [n for n, width in widths.items() if width is not None and n not in adapter.skip])


def _refuse_float_embeddings(adapter: ModelAdapter, bits: Bits) -> None:
    """Raise InputError where an embedding that stays float is given a width."""
    for name, module in adapter.module.named_modules():
        if is_embedding(module) and not adapter.embeddings and name in bits.layers:
            raise InputError(
                f"bits.layers names {name!r}, an embedding, and those stay float; {EMBEDDINGS_WANTED} "
                "quantizes them"
            )


def _refuse_shared(adapter: ModelAdapter, names: Iterable[str]) -> None:
    """Raise InputError where an embedding and another of the layers to quantize are one weight."""
    layers = {name: adapter.module.get_submodule(name) for name in names}
    tables = {id(layer.weight): name for name, layer in layers.items() if is_embedding(layer)}
    for name, layer in layers.items():
        table = tables.get(id(layer.weight), name)
        if table != name:
            raise InputError(
                f"{table!r} and {name!r} share one weight, and the codes that suit one do not suit the "
                "other; leave one of them float: model.skip_embeddings=true, model.skip_output_head=true, or "
                "its name in bits.skip"
            )


def allocate(adapter: ModelAdapter, plan: Plan, bits: Bits) -> dict[str, float | None]:
    """Bits per reached layer in order of execution, None where it stays float."""
    _refuse_float_embeddings(adapter, bits)
    for pattern in bits.layers:
        for name in adapter.skip:
            if fnmatchcase(name, pattern):
                raise InputError(f"bits.layers names {name!r}, which stays float: {adapter.skip[name]}")
    found = bits.allocate([*plan.layers(), *adapter.skip], [*plan.first, *plan.last])
    allocation = {name: None if name in adapter.skip else found[name] for name in plan.layers()}
    _refuse_shared(adapter, [name for name, width in allocation.items() if width is not None])
    return allocation


def allocate_activations(
    adapter: ModelAdapter, plan: Plan, bits: Bits, allocation: dict[str, float | None]
) -> dict[str, int | None]:
    """Bits of the input per reached layer, None where it or the layer stays float and for an embedding's
    ids.
    """
    widths = bits.allocate_activations([*plan.layers(), *adapter.skip], [*plan.first, *plan.last])
    layers = adapter.quantizable()
    return {
        name: None if width is None or is_embedding(layers[name]) else widths[name]
        for name, width in allocation.items()
    }


@dataclass
class Call:
    """Arguments of one call of a unit."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_first(self, x: Tensor) -> Call:
        return Call((x, *self.args[1:]), self.kwargs)

    def samples(self) -> int:
        """Samples of the first argument."""
        first = first_tensor(self.args)
        return 0 if first is None else len(first)

    def rows(self, rows: slice) -> Call:
        """Some of the samples: every tensor with as many rows as there are samples is cut."""
        count = self.samples()

        def cut(t: Tensor) -> Tensor:
            return t[rows] if t.dim() > 0 and len(t) == count else t

        return Call(map_tensors(self.args, cut), map_tensors(self.kwargs, cut))

    def to(self, device: torch.device) -> Call:
        return Call(
            map_tensors(self.args, lambda t: t.to(device)), map_tensors(self.kwargs, lambda t: t.to(device))
        )

    def cloned(self) -> Call:
        """Arguments that a unit may overwrite."""
        return Call(map_tensors(self.args, Tensor.clone), map_tensors(self.kwargs, Tensor.clone))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` on every tensor of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a namedtuple takes its items one by one
        return type(value)(*(map_tensors(v, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, function) for v in value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value


def same_arguments(a: Any, b: Any) -> bool:
    """Whether two nested arguments are equal, tensors by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same_arguments(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_arguments(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    return value[0] if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor) else None


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace(adapter: ModelAdapter, batch: Any, units_of_several: list[str] | None = None) -> Plan:
    """The plan of `adapter.module`, from one forward pass on (a part of) `batch`.

    `units_of_several` are the parts of several layers that are one unit each, by default the blocks. Raises
    InputError when no layer that can be quantized is reached.
    """
    module, layers = adapter.module, adapter.quantizable()
    parts = adapter.blocks() if units_of_several is None else units_of_several
    if "" in layers:
        raise InputError(f"the model is a bare {type(module).__name__}: wrap it in torch.nn.Sequential")
    batch = (
        batch[:2] if isinstance(batch, Tensor) else batch
    )  # everything the pass produces is kept while it runs
    unit_of = {name: next((p for p in parts if name.startswith(f"{p}.")), name) for name in layers}
    calls: dict[str, list[Call]] = {}
    outputs: dict[str, tuple[Tensor, int] | None] = {}
    arrived: dict[str, int] = {}  # version of the first argument at the call
    inputs: dict[str, tuple[Tensor, int]] = {}  # layer → its input tensor and version
    order: list[str] = []  # layers by first call
    repeated: set[str] = set()

    def unit_called(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, []).append(Call(args, kwargs))
            first = first_tensor(args)
            arrived.setdefault(name, -1 if first is None else first._version)

        return hook

    def unit_returned(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = first_tensor(output)
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
    with hooks(handles):
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
        once = len(calls[unit]) == 1 and first_tensor(calls[unit][0].args) is not None
        chained = False
        if previous is not None and once and result[-1].replayable and outputs[previous] is not None:
            before, now, sent = calls[previous][0], calls[unit][0], outputs[previous]
            assert sent is not None
            chained = (
                now.args[0] is sent[0]
                and arrived[unit] == sent[1]
                and same_arguments(now.args[1:], before.args[1:])
                and same_arguments(now.kwargs, before.kwargs)
            )
        again = bool(repeated & set(names))
        result.append(Unit(name=unit, stages=stages, chained=chained, replayable=once, repeated=again))
        previous = unit
    if not order:
        raise InputError(
            f"model {adapter.name!r} has no Linear, Conv2d or Conv1D layer that its forward pass reaches"
        )
    first = [n for n in order if is_embedding(layers[n])]
    if not first and adapter.task != "language_modeling":
        first = [n for n in order if inputs[n][0] is inputs[order[0]][0]]
    heads = [adapter.head] if adapter.head in inputs else [order[-1]]
    return Plan(units=result, first=first, last=heads, unreached=[n for n in layers if n not in inputs])
