"""QFT: weights, biases, and the scales of weights and activations, trained together, end to end, at once.

Paper: Finkelstein et al., "QFT: Post-training quantization via fast joint finetuning of all degrees of
freedom", ECCV Workshops 2022, arXiv:2212.02634. Its abstracts fix the idea: the network re-parameterised as
the hardware runs it, all degrees of freedom trained jointly in one step, 4-bit weights. Body and tables could
not be obtained. What the accelerator's arithmetic forces is derived here: the steps of a kernel form a
rank-one matrix, S_mn = F_n · Sy_n / Sx_m: per-channel activation scales are cross-layer factorization.
The schedules `qft_vendor_*` follow the documented behaviour of the vendor's tool chain; all other choices
(losses summed, rates, initialisation of the units) are ours.
Here an activation's scale Sy is a step of the tensor times a unit of the channel. Units move between layers;
where a channel meets something that is not positively homogeneous its unit is 1. F is measured in units, so
that F and one step per tensor are all that is stored: exporting measures the network in its units.
Activations are quantized where a layer reads them: shortcuts carry what the additions give.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq.activations import ActivationQuantizer
from ptq.config import build, load_choice
from ptq.distillation import Distance, Distillation, Target, distill, frozen_copy
from ptq.errors import InputError
from ptq.grids import affine
from ptq.grids.affine import Affine, AffineGrid
from ptq.layers import apply_weight, names_of, replace_module, shaped, weight_matrix
from ptq.methods.method import GridSpec, LayerMethod
from ptq.models.graph import REAL, ScaleGraph
from ptq.observers import InputObserver
from ptq.plan import hooks
from ptq.preparation import equalizing_factors, magnitudes, rescale, spread_inputs
from ptq.rescaled_layers import RescaledLayer, SharedScales, reads_one_channel, taps_of
from ptq.solvers.rank_one import Kernel, alternating_projection, fit_right, largest_right, usable
from ptq.whole_network import NetworkProblem, NetworkSolution

EQUALIZATION_ROUNDS = 20
PROJECTION_ROUNDS = 15
MEASURED_SAMPLES = 64  # images that each layer's error is measured on


class Regime(Enum):
    """What the steps of a kernel may be."""

    scalar = "scalar"  # one number a layer
    layer_wise = "layer_wise"  # one F a layer; units of channels, shared with the neighbours
    channel_wise = "channel_wise"  # one F an output channel
    doubly_channel_wise = "doubly_channel_wise"  # one F an output channel, and units of channels

    @property
    def one_factor(self) -> bool:
        return self in (Regime.scalar, Regime.layer_wise)

    @property
    def has_units(self) -> bool:
        return self in (Regime.layer_wise, Regime.doubly_channel_wise)


class Units(Enum):
    """Where the units of channels begin."""

    ones = "ones"
    equalize = "equalize"  # cross-layer equalization: largest weights of rows and columns meet
    equalize_mmse = "equalize_mmse"  # the same after clipping each row to its range of least squared error
    alternating = "alternating"  # least squared error by alternating projections, F being a vector


class Ranges(Enum):
    """Where F begins."""

    min_max = "min_max"  # nothing is clipped
    mmse = "mmse"  # least squared error
    mmse_low_bits = "mmse_low_bits"  # least squared error up to 4 bits, nothing clipped above


class Rate(Enum):
    """What the learning rate of weights and biases is counted in."""

    absolute = "absolute"
    step = "step"  # a weight's mean step; for biases, their root mean square


@dataclass(kw_only=True, slots=True)
class QFT:
    """What is trained, from where, and how."""

    regime: Regime
    units: Units
    ranges: Ranges  # not read with a start, which brings F
    full_range: bool  # codes from −2^(b−1), F of either sign; false = symmetric codes
    start: (
        str | None
    )  # a layer-wise method (conf/method) whose weights and scales are trained on; null = none
    train_weights: bool
    train_biases: bool
    train_scales: bool  # F and, where the regime has them, units
    train_steps: bool  # of activations
    target: Target
    distance: Distance
    epochs: int
    batch_size: int
    learning_rate: float  # of weights and biases, with Adam
    rate: Rate
    scale_learning_rate: float  # of the base-2 logarithms of F, units and steps
    cycles: int
    validation_fraction: float
    flip: bool
    shift: int

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or self.cycles < 1 or self.shift < 0:
            raise InputError(
                "qft needs epochs and shift of at least 0, batch_size and cycles of at least 1; got "
                f"{self.epochs}, {self.shift}, {self.batch_size} and {self.cycles}"
            )
        if self.learning_rate <= 0 or self.scale_learning_rate <= 0:
            raise InputError(
                f"rates must be positive; got learning_rate={self.learning_rate} and "
                f"scale_learning_rate={self.scale_learning_rate}; to freeze something use train_…=false"
            )
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction must be in [0, 1); got {self.validation_fraction}")
        if self.distance is Distance.kl and self.target is not Target.logits:
            raise InputError("distance=kl compares class probabilities; use target=logits with it")
        if not self.regime.has_units and self.units is not Units.ones:
            raise InputError(
                f"regime={self.regime.value} has no units of channels; use units=ones "
                "(and preparation=equalize for equalization beforehand)"
            )
        if self.regime.one_factor and self.units is Units.alternating:
            raise InputError(
                "units=alternating solves for one F an output channel; with one F a layer use equalize_mmse"
            )
        if self.start is not None and (self.units is not Units.ones or not self.full_range):
            raise InputError(
                f"start={self.start} brings codes and scales of the library's symmetric grid; "
                "it needs units=ones and full_range=true"
            )

    def check_grid(self, grid: GridSpec) -> None:
        """Refuse grids that are not the one that the hardware runs: symmetric, F a layer or a channel."""
        per_tensor = self.regime.one_factor
        name = "symmetric_tensor" if per_tensor else "symmetric"
        if not isinstance(grid, Affine) or grid.zero is not affine.Zero.none:
            raise InputError(f"qft trains the scales of symmetric integer codes only; use grid={name}")
        if (grid.granularity is affine.Granularity.tensor) != per_tensor:
            raise InputError(
                f"regime={self.regime.value} stores one scale per {'layer' if per_tensor else 'channel'}; "
                f"use grid={name}"
            )

    def start_method(self) -> LayerMethod | None:
        """The layer-wise method of `start`."""
        if self.start is None:
            return None
        method = build(load_choice("method", self.start), "method.start")
        if not isinstance(method, LayerMethod):
            raise InputError(f"method.start={self.start} is no layer-wise method; use gptq, adaround or comq")
        return method

    def passes(self) -> float:
        """Forward passes over the calibration set that training costs about as much as: a step is four."""
        return 4.0 * self.epochs + 3

    def quantize_network(self, problem: NetworkProblem) -> NetworkSolution:
        """Train, then put the integers in the place of the float layers."""
        module, graph = problem.adapter.module, problem.graph
        grid = problem.grid
        assert isinstance(grid, Affine)
        teacher = frozen_copy(module)
        module.requires_grad_(False)
        units = self._units(problem)
        layers = self._layers(problem, units)
        for name, layer in layers.items():
            _put(module, name, layer)
        settings = Distillation(
            target=self.target,
            distance=self.distance,
            epochs=self.epochs,
            batch_size=self.batch_size,
            cycles=self.cycles,
            validation_fraction=self.validation_fraction,
            flip=self.flip,
            shift=self.shift,
            seed=problem.seed,
            progress=problem.progress,
        )
        groups = self._parameters(list(layers.values()))
        report = distill(problem.adapter, teacher, graph, problem.images, groups, settings, problem.resume)
        errors = _relative_errors(problem, teacher, layers)
        clipped = {name: layer.clipped_fraction() for name, layer in layers.items()}
        scales = next(iter(layers.values())).shared[0]
        rescale(module, graph, scales.units().detach(), done=frozenset(layers))
        for name, layer in layers.items():
            _put(module, name, layer.frozen(grid.parameter_bits))
        return NetworkSolution(relative_errors=errors, clipped_fractions=clipped, tuning=report)

    def _code_range(self, bits: int) -> tuple[int, int]:
        most: int = 2 ** (bits - 1) - 1
        return (-most - 1 if self.full_range else -most), most

    def _units(self, problem: NetworkProblem) -> Tensor:
        """Units of channels to begin with, [units] float32."""
        graph, module = problem.graph, problem.adapter.module
        device = problem.images.device
        if self.units is Units.ones:
            return torch.ones(graph.units, device=device)
        layers = {name: module.get_submodule(name) for name in graph.layers}
        if self.units is Units.alternating:
            kernels = []
            left = torch.ones(graph.units, device=device)
            free = torch.zeros(graph.units, dtype=torch.bool, device=device)
            for name, bits in problem.bits.items():
                W, columns = weight_matrix(layers[name]).float(), _columns(layers[name], graph, name)
                if reads_one_channel(W, graph.layers[name].inputs):
                    continue
                low, high = self._code_range(bits)
                right = fit_right(W, torch.ones_like(W[:, :1]), low, high, shared=False)
                kernels.append(Kernel(W=W, units=columns, right=right, code_min=low, code_max=high))
                free[columns] = True
            free[REAL] = False
            left, _ = alternating_projection(kernels, left, free, PROJECTION_ROUNDS)
            return 1 / left
        sizes = {}
        for name, layer in layers.items():
            size = magnitudes(layer)
            if self.units is Units.equalize_mmse and name in problem.bits:
                W = weight_matrix(layer).float()
                low, high = self._code_range(problem.bits[name])
                right = fit_right(W, torch.ones_like(W[:, :1]), low, high, shared=False)
                size = size.minimum(high * right.abs().reshape(-1, 1))
            sizes[name] = size.cpu()
        readers = {name: spread_inputs(layers[name], graph.layers[name].inputs) for name in layers}
        return equalizing_factors(graph, sizes, readers, EQUALIZATION_ROUNDS).float().to(device)

    def _layers(self, problem: NetworkProblem, units: Tensor) -> dict[str, RescaledLayer]:
        """Trainable stand-ins of all layers to quantize, initialised."""
        graph, module = problem.graph, problem.adapter.module
        quantizers, numbers = _quantizers(problem, units)
        steps = [1.0 if q.scale is None else float(q.scale) for q in quantizers]
        fixed = {numbers[name] for name in graph.from_input if name in numbers}
        scales = SharedScales(units, torch.tensor(steps or [1.0], device=units.device), fixed)
        layers = {}
        for name, bits in problem.bits.items():
            layer, channels = module.get_submodule(name), graph.layers[name]
            W = weight_matrix(layer).float()
            low, high = self._code_range(bits)
            left = torch.ones_like(W[:, :1])
            if self.regime.one_factor or not reads_one_channel(W, channels.inputs):
                outputs = units[channels.outputs].reshape(*W.shape[:2], 1)
                left = outputs / units[_columns(layer, graph, name)]
            shared = self.regime.one_factor
            if name in problem.start:
                begun, codes = problem.start[name].grid_and_codes()
                assert isinstance(begun, AffineGrid)
                W = begun.values(codes).float()
                live = (W != 0).any() if shared else (W != 0).any(-1, keepdim=True)
                right = usable(begun.scale.float() * live)
            elif self.ranges is Ranges.mmse or (self.ranges is Ranges.mmse_low_bits and bits <= 4):
                right = fit_right(W, left, low, high, shared=shared)
            else:
                right = largest_right(W, left, high, shared=shared)
            tensor = numbers.get(name)
            layers[name] = RescaledLayer(
                layer,
                channels,
                scales,
                weight=W,
                right=right,
                bits=bits,
                code_min=low,
                code_max=high,
                quantizer=None if tensor is None else quantizers[tensor],
                tensor=0 if tensor is None else tensor,
            ).to(W.device)
        return layers

    def _parameters(self, layers: list[RescaledLayer]) -> list[dict[str, Any]]:
        """Groups for the optimizer; what they hold is asked for gradients."""
        groups: list[dict[str, Any]] = []

        def add(parameter: nn.Parameter, rate: float) -> None:
            parameter.requires_grad_(True)
            groups.append({"params": [parameter], "lr": rate})

        in_steps = self.rate is Rate.step
        for layer in layers:
            size = float(layer.scale().abs().mean()) if in_steps else 1.0
            if self.train_weights:
                add(layer.weight, self.learning_rate * size)
            if self.train_biases and layer.bias is not None:
                own = float(layer.bias.square().mean().sqrt()) if in_steps else 1.0
                add(layer.bias, self.learning_rate * (own or size))
            if self.train_scales:
                add(layer.log_right, self.scale_learning_rate)
        scales = layers[0].shared[0]
        if self.train_scales and self.regime.has_units:
            add(scales.log_units, self.scale_learning_rate)
        if self.train_steps and any(layer.activation_bits is not None for layer in layers):
            add(scales.log_steps, self.scale_learning_rate)
        return groups


def _columns(layer: nn.Module, graph: ScaleGraph, name: str) -> Tensor:
    """Unit of each column of W, [groups, 1, in]."""
    inputs = graph.layers[name].inputs
    W = weight_matrix(layer)
    spread = inputs.reshape(len(W), 1, -1).repeat_interleave(taps_of(W, inputs), -1)
    return spread.to(weight_matrix(layer).device)


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    for alias in names_of(module, module.get_submodule(name)):
        replace_module(module, alias, layer)


@torch.no_grad()
def _quantizers(problem: NetworkProblem, units: Tensor) -> tuple[list[ActivationQuantizer], dict[str, int]]:
    """A quantizer for each tensor that quantized layers read at one width, and its number for each layer.

    Ranges are those of the float network's tensors, measured in their units.
    """
    settings, graph, module = problem.activations, problem.graph, problem.adapter.module
    keys = {n: (graph.tensors[n], width) for n, width in problem.activation_bits.items() if width is not None}
    if settings is None or not keys:
        return [], {}
    numbers = {key: k for k, key in enumerate(dict.fromkeys(keys.values()))}
    leaders = {numbers[key]: name for name, key in reversed(keys.items())}
    observers = {}
    handles = []
    for number, name in leaders.items():
        layer, width = module.get_submodule(name), keys[name][1]
        observer = observers[number] = InputObserver(layer, settings, width)
        own = units[graph.layers[name].inputs]
        own = own[:, None, None] if isinstance(layer, nn.Conv2d) else own

        def observe(_: nn.Module, args: Any, observer: InputObserver = observer, own: Tensor = own) -> None:
            observer.add(args[0] / own)

        handles.append(layer.register_forward_pre_hook(observe))
    with hooks(handles):
        for batch in problem.batches():
            problem.adapter.forward(module, batch)
    quantizers = [observers[number].quantizer() for number in range(len(observers))]
    return quantizers, {name: numbers[key] for name, key in keys.items()}


@torch.no_grad()
def _relative_errors(
    problem: NetworkProblem, teacher: nn.Module, layers: dict[str, RescaledLayer]
) -> dict[str, float]:
    """‖(W − Ŵ) X‖ / ‖W X‖ of each layer on the float network's inputs, biases left out."""
    sums = {name: [0.0, 0.0] for name in layers}
    handles = []
    for name, trained in layers.items():
        layer = teacher.get_submodule(name)
        W = shaped(weight_matrix(layer).float(), trained.geometry)
        W_hat = shaped(trained.quantized_weight(), trained.geometry)

        def measure(
            _: nn.Module, args: Any, own: list[float] = sums[name], W: Tensor = W, W_hat: Tensor = W_hat,
            trained: RescaledLayer = trained,
        ) -> None:  # fmt: skip
            for k, weight in enumerate((W - W_hat, W)):
                y = apply_weight(args[0].float(), weight, None, trained.geometry)
                own[k] += float(y.square().sum(dtype=torch.float64))

        handles.append(layer.register_forward_pre_hook(measure))
    with hooks(handles):
        problem.adapter.forward(teacher, problem.batches()[0][:MEASURED_SAMPLES])
    return {name: (error / own) ** 0.5 if own > 0 else 0.0 for name, (error, own) in sums.items()}
