"""Methods that quantize the network as one: what they are given, and how the pipeline calls them.

The counterpart of the walk in ptq/walk.py. BatchNorms are folded and the network is traced first, so a
model that cannot be traced is refused before anything is computed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ptq.activations import Granularity as InputGranularity
from ptq.allocation import Bits
from ptq.calibration import Calibration, NoCalibration
from ptq.errors import InputError
from ptq.layers import QuantizedLayer
from ptq.methods.method import GridSpec, LayerMethod, check_pair
from ptq.mixed_precision import Granularity, MixedBits, Rounding, choose
from ptq.models.adapter import ModelAdapter, is_embedding
from ptq.models.graph import ScaleGraph
from ptq.observers import Activations, check_activations
from ptq.plan import allocate, allocate_activations, skipped_parameters, trace
from ptq.preparation import folded_graph
from ptq.report import LayerReport, Report, TuningReport
from ptq.resume import Resume
from ptq.tuning import NoTuning, Tuning


@dataclass(kw_only=True)
class NetworkProblem:
    """A float network to quantize as one; everything lies on one device."""

    adapter: ModelAdapter  # its module is float with BatchNorms folded, and is changed in place
    graph: ScaleGraph
    images: Tensor  # calibration images [n, channels, h, w]
    batch_size: int
    bits: dict[str, int]  # of the weights, by layer to quantize
    activation_bits: dict[str, int | None]  # of these layers' inputs
    activations: Activations | None  # how ranges of inputs are found; None where all stay float
    grid: GridSpec
    start: dict[str, QuantizedLayer]  # what the method's `start` made of the layers; empty without
    seed: int
    progress: bool
    resume: Resume

    def batches(self) -> tuple[Tensor, ...]:
        """The images batch by batch, as views."""
        return self.images.split(self.batch_size)


@dataclass(kw_only=True)
class NetworkSolution:
    """Facts about a network that was quantized as one."""

    relative_errors: dict[str, float]  # of each layer's output on the float network's inputs
    clipped_fractions: dict[str, float]  # of each layer's weights
    tuning: TuningReport


@runtime_checkable
class WholeNetworkMethod(Protocol):
    """A method that quantizes all layers at once."""

    needs_gram: ClassVar[bool]
    batch_size: int  # images of a training step

    def start_method(self) -> LayerMethod | None:
        """The layer-wise method whose result it begins with, or None."""

    def passes(self) -> float:
        """Forward passes over the calibration set that its work costs about as much as."""

    def quantize_network(self, problem: NetworkProblem) -> NetworkSolution:
        """Put a QuantizedLayer in the place of each layer to quantize, in place."""


def check_whole(
    adapter: ModelAdapter,
    bits: Bits,
    calibration: Calibration | NoCalibration,
    activations: Activations | None,
    tuning: Any,
) -> None:
    """Raise InputError where no method can quantize the network as one."""
    if adapter.task == "language_modeling":
        raise InputError(
            f"{adapter.name!r} is a language model, which cannot be traced into a graph of channels; "
            "use a layer-wise method (comq, gptq, decoupleq)"
        )
    tables = [name for name, layer in adapter.quantizable().items() if is_embedding(layer)]
    if tables:
        raise InputError(
            f"{tables[0]!r} is an embedding, which has no place in a graph of channels; leave out "
            "embeddings=True, or use a layer-wise method (comq, gptq, decoupleq)"
        )
    if isinstance(calibration, NoCalibration):
        raise InputError("a method that trains the network needs calibration data, not calibration=none")
    for key in ("bias_correction", "reestimate_batchnorm"):
        if getattr(calibration, key):
            raise InputError(
                f"calibration.{key}=true mends a network that was quantized layer by layer; a method that "
                "trains the network folds its BatchNorms and learns the biases itself: leave it false"
            )
    if (
        activations is not None
        and bits.activation_widths()
        and activations.granularity is not InputGranularity.tensor
    ):
        raise InputError(
            "a method that trains the network has scales of channels of its own: activations must be of "
            f"granularity tensor; got {activations.granularity.value}"
        )
    if isinstance(bits, MixedBits) and bits.rounding is Rounding.method:
        raise InputError(
            "bits.rounding=method asks a layer-wise method what a width costs, and a method that trains the "
            "network has no answer for one layer; use bits.rounding=nearest"
        )
    if isinstance(bits, MixedBits) and bits.granularity is Granularity.channel:
        raise InputError(
            "a scale matrix of rank one has rows of one width; use bits.granularity=layer with this method"
        )
    if bits.group_size is not None:
        raise InputError(
            f"a scale matrix of rank one has no groups of inputs; got bits.group_size={bits.group_size}, "
            "use null"
        )
    fractional = [width for width in bits.widths() if width != int(width) or not 2 <= width <= 16]
    if fractional:
        raise InputError(f"bits must be integers from 2 to 16 here; got {fractional[0]:g}")
    if isinstance(tuning, Tuning):
        raise InputError("a method that trains the network itself takes no tuning; say tuning=none")


@torch.no_grad()
def quantize_whole(
    adapter: ModelAdapter,
    batches: list[Tensor],
    solve: Callable[[ModelAdapter, LayerMethod, Bits], Report],
    *,
    method: WholeNetworkMethod,
    grid: GridSpec,
    bits: Bits,
    calibration: Calibration | NoCalibration,
    activations: Activations | None,
    tuning: Tuning | NoTuning | None,
    device: torch.device,
    seed: int,
    progress: bool,
    resume: Resume,
) -> Report:
    """Quantize `adapter.module` in place by `method`. `solve` runs a layer-wise method on another adapter,
    weights only, with the widths it is given. Mixed widths are chosen on the folded network.
    """
    if not batches:
        raise InputError(
            "quantization needs one batch of model inputs at least; the calibration iterable is empty"
        )
    check_whole(adapter, bits, calibration, activations, tuning)
    check_activations(activations, bits.activation_widths(), calibration)
    check_pair(method, grid)
    other = next(
        (b for b in batches if not isinstance(b, Tensor) or b.shape[1:] != batches[0].shape[1:]), None
    )
    if other is not None:
        found = f"shape {list(other.shape)}" if isinstance(other, Tensor) else type(other).__name__
        raise InputError(
            f"a method that trains the network takes tensors of images, all of one size; got also {found}"
        )
    adapter.module.to(device)
    images = torch.cat([batch.to(device) for batch in batches])
    batch_size = max(len(batch) for batch in batches)
    pieces = list(images.split(batch_size))
    plan = trace(adapter, pieces[0])
    allocation = allocate(adapter, plan, bits)
    started = time.perf_counter()
    report = Report(skipped=skipped_parameters(adapter, plan, allocation))
    graph = folded_graph(adapter, pieces[0])
    lost = [name for name, width in allocation.items() if width is not None and name not in graph.layers]
    if lost:
        raise InputError(
            f"the traced graph of {adapter.name!r} does not show layers {', '.join(lost[:5])}; "
            "name them in bits.skip"
        )
    report.seconds["capture"] = time.perf_counter() - started
    if isinstance(bits, MixedBits):
        chosen = choose(
            bits, adapter, plan, pieces, method=method, grid=grid, calibration=calibration, seed=seed
        )
        allocation = chosen.layers
        report.mixed_precision, report.seconds["allocate"] = chosen.facts, chosen.facts["seconds"]
    activation_bits = allocate_activations(adapter, plan, bits, allocation)
    start: dict[str, QuantizedLayer] = {}
    starting = method.start_method()
    if starting is not None:
        copied = replace(adapter, module=copy.deepcopy(adapter.module))
        widths = {name: width for name, width in allocation.items() if width is not None}
        plain = Bits(
            weight=bits.weight,
            group_size=None,
            first_last=None,
            layers=widths,
            skip=[name for name in allocation if name not in widths],
            activation=None,
            activation_first_last=None,
            activation_skip=[],
        )
        begun = solve(copied, starting, plain)
        start = {n: m for n, m in copied.module.named_modules() if isinstance(m, QuantizedLayer)}
        report.seconds["start"] = sum(begun.seconds.values())
    started = time.perf_counter()
    problem = NetworkProblem(
        adapter=adapter,
        graph=graph,
        images=images,
        batch_size=batch_size,
        bits={name: int(width) for name, width in allocation.items() if width is not None},
        activation_bits={n: activation_bits[n] for n, width in allocation.items() if width is not None},
        activations=activations,
        grid=grid,
        start=start,
        seed=seed,
        progress=progress,
        resume=resume.within("network"),
    )
    solution = method.quantize_network(problem)
    report.seconds["solve"] = time.perf_counter() - started - solution.tuning.seconds
    report.seconds["tune"] = solution.tuning.seconds
    report.tuning.append(solution.tuning)
    report.layers = [_layer_report(adapter.module, problem, solution, n) for n in problem.bits]
    return report


def _layer_report(
    module: nn.Module, problem: NetworkProblem, solution: NetworkSolution, name: str
) -> LayerReport:
    layer = module.get_submodule(name)
    assert isinstance(layer, QuantizedLayer)
    grid, codes = layer.grid_and_codes()
    quantizer = layer.input_quantizer
    return LayerReport(
        name=name,
        shape=list(codes.shape),
        bits=problem.bits[name],
        relative_error=solution.relative_errors[name],
        limit_bits=None,
        storage_bits=grid.storage_bits(codes),
        seconds=solution.tuning.seconds / len(problem.bits),
        activation=None if quantizer is None else quantizer.summary(),
        clipped_fraction=solution.clipped_fractions[name],
    )
