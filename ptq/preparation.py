"""Preparation: the float network rewritten, its function unchanged, before anything is quantized.

BatchNorm folding puts a BatchNorm into the layer that it alone follows. Cross-layer equalization (Nagel et
al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv:1906.04721, section 4.1;
Meller et al., arXiv:1902.01917) measures channels between layers in units in which the rows that write them
and the columns that read them have equal ranges. Where residual sums, pools or concatenations tie channels of
several layers together, the ranges are the largest of all writers and all readers; channels that a norm
writes are left alone, since their unit would move between the weights and the activations only. Bias
absorption is not done.
Shapes: factors [units], one positive number per unit of the scale graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ptq.errors import InputError
from ptq.layers import names_of, replace_module
from ptq.models.adapter import ModelAdapter
from ptq.models.graph import REAL, ScaleGraph, scale_graph
from ptq.plan import trace

FARTHEST = 1e4  # of one equalization step from 1: a channel that is all but dead stays finite


@dataclass(kw_only=True)
class NoPreparation:
    """The float network stays as it is."""


@dataclass(kw_only=True)
class Preparation:
    """BatchNorm folding, and cross-layer equalization after it."""

    equalization_rounds: int  # passes over all channels; 0 = folding only

    def __post_init__(self) -> None:
        if self.equalization_rounds < 0:
            raise InputError(
                f"preparation.equalization_rounds must not be negative; got {self.equalization_rounds}"
            )

    def check(self, adapter: ModelAdapter) -> None:
        """Raise InputError where the model cannot be prepared."""
        if adapter.task == "language_modeling":
            raise InputError(
                f"preparation rewrites image networks, and {adapter.name!r} is a language model; "
                "say preparation=none"
            )

    def apply(self, adapter: ModelAdapter, batch: Tensor) -> None:
        """Rewrite `adapter.module` in place; `batch` is one that it is traced with."""
        graph = folded_graph(adapter, batch)
        if self.equalization_rounds:
            equalize(adapter.module, graph, self.equalization_rounds)


class FoldedNorm(nn.Module):
    """What is left of a BatchNorm that was folded into the layer before it."""

    def __init__(self, layer: str, after: nn.Module) -> None:
        super().__init__()
        self.layer = layer  # that took it up
        self.after = after  # what the norm did besides: an activation, or nothing

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x)


@torch.no_grad()
def fold(module: nn.Module, layer_name: str, norm_name: str) -> bool:
    """Fold a BatchNorm into the layer before it; False where its kind is not known and nothing was done."""
    layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
    after = _after(norm)
    if after is None:
        return False
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    bias = -norm.running_mean.double()
    if layer.bias is not None:
        assert isinstance(layer.bias, nn.Parameter)
        bias = bias + layer.bias.double()
    bias = bias * factor
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    rows = factor.reshape(-1, *[1] * (weight.dim() - 1))
    weight.copy_((weight.double() * rows).to(weight.dtype))
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
    folded = FoldedNorm(layer_name, after).train(norm.training)
    for alias in names_of(module, norm):
        replace_module(module, alias, folded)
    return True


def _after(norm: nn.Module) -> nn.Module | None:
    """What a norm computes after normalising; None for a kind that is not known."""
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.Identity()
    return nn.Sequential(norm.drop, norm.act) if type(norm) is BatchNormAct2d else None


def folded_graph(adapter: ModelAdapter, batch: Tensor) -> ScaleGraph:
    """Fold every BatchNorm of `adapter.module` that can be, in place; the scale graph of what results."""
    reached = trace(adapter, batch).layers()
    graph = scale_graph(adapter, batch, reached)
    if sum([fold(adapter.module, layer, norm) for layer, norm in graph.foldable]):
        graph = scale_graph(adapter, batch, reached)
    return graph


def spread_inputs(layer: nn.Module, per_channel: Tensor) -> Tensor:
    """What belongs to each input channel of a layer, at every weight that reads it: [out, in of a group]."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return per_channel.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)


@torch.no_grad()
def rescale(
    module: nn.Module, graph: ScaleGraph, factors: Tensor, done: frozenset[str] = frozenset()
) -> None:
    """Measure every channel in a unit `factors` times as large: its values are divided by that.

    Weights, biases and affine parameters of norms take the change up in place; the network's function stays.
    Layers in `done` have taken it up already. factors[REAL] must be 1.
    """
    if float(factors[REAL]) != 1:
        raise ValueError(f"the unit REAL cannot be changed; got a factor of {float(factors[REAL])}")
    for name, channels in graph.layers.items():
        if name in done:
            continue
        layer = module.get_submodule(name)
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, nn.Parameter)
        there = factors.to(weight)
        outputs = there[channels.outputs]
        change = spread_inputs(layer, there[channels.inputs]) / outputs[:, None]
        weight.mul_(change.reshape(*change.shape, *[1] * (weight.dim() - 2)))
        if bias is not None:
            assert isinstance(bias, nn.Parameter)
            bias.div_(outputs)
    for name, ids in graph.norms.items():
        norm = module.get_submodule(name)
        for parameter in (norm.weight, norm.bias):
            if parameter is not None:
                assert isinstance(parameter, nn.Parameter)
                parameter.div_(factors.to(parameter)[ids])


def magnitudes(layer: nn.Module) -> Tensor:
    """Largest |w| between two channels: [out, in of a group] float64."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    matrix = weight.detach().double().abs()
    return matrix if matrix.dim() == 2 else matrix.amax((2, 3))


def movable(graph: ScaleGraph) -> Tensor:
    """Units that layers write and read and no norm writes, [units] bool: their choice costs nothing."""
    written, read = (torch.zeros(graph.units, dtype=torch.bool) for _ in range(2))
    for channels in graph.layers.values():
        written[channels.outputs] = True
        read[channels.inputs] = True
    for ids in graph.norms.values():
        written[ids] = False
    own = written & read
    own[REAL] = False
    return own


@torch.no_grad()
def equalizing_factors(
    graph: ScaleGraph, sizes: dict[str, Tensor], columns: dict[str, Tensor], rounds: int
) -> Tensor:
    """Factors [units] by which the ranges of rows and columns meet: √(rows / columns) of each unit, float64.

    `sizes` holds the magnitudes [out, in of a group] of each layer and `columns` the units of their inputs.
    Channels that the same layers write and read are balanced together, one such set after the other, since
    each changes the ranges that its neighbours see; `rounds` passes over all sets.
    """
    members: dict[int, list[str]] = {}
    for name, channels in graph.layers.items():
        for unit in {*channels.inputs.tolist(), *channels.outputs.tolist()}:
            members.setdefault(unit, []).append(name)
    sets: dict[tuple[str, ...], list[int]] = {}
    for unit in movable(graph).nonzero().flatten().tolist():
        sets.setdefault(tuple(members[unit]), []).append(unit)
    total = torch.ones(graph.units, dtype=torch.float64)
    for _ in range(rounds):
        for layers, units in sets.items():
            wrote, reads = (torch.zeros(graph.units, dtype=torch.float64) for _ in range(2))
            for name in layers:
                outputs = graph.layers[name].outputs
                now = sizes[name] * total[columns[name]] / total[outputs, None]
                wrote.scatter_reduce_(0, outputs, now.amax(1), "amax")
                reads.scatter_reduce_(0, columns[name].flatten(), now.flatten(), "amax")
            chosen = torch.tensor(units)
            wrote, reads = wrote[chosen], reads[chosen]
            step = (wrote / reads).sqrt().clamp(1 / FARTHEST, FARTHEST)
            total[chosen] *= torch.where((wrote > 0) & (reads > 0), step, 1.0)
    return total


def equalize(module: nn.Module, graph: ScaleGraph, rounds: int) -> None:
    """Cross-layer equalization of the layers' largest weights, in place."""
    layers = {name: module.get_submodule(name) for name in graph.layers}
    sizes = {name: magnitudes(layer).cpu() for name, layer in layers.items()}
    columns = {name: spread_inputs(layer, graph.layers[name].inputs) for name, layer in layers.items()}
    rescale(module, graph, equalizing_factors(graph, sizes, columns, rounds))
