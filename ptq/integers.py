"""A quantized network that computes its layers on integers alone, as hardware would.

For each layer (Jacob et al., CVPR 2018, eq. 7; QFT's export): codes of the input and of the weights as
centred integers, their products summed exactly, a bias in whole units of the two steps' product, and one
factor m·2^−k a row, with an m of MANTISSA_BITS. What lies between layers (ReLU, residual sums, pooling,
softmax) stays in floating point. Sums are kept in float64, which holds integers below 2^53 exactly, and must
fit ACCUMULATOR_BITS.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ptq.activations import Granularity
from ptq.allocation import Bits
from ptq.errors import InputError
from ptq.grids.affine import Affine, AffineGrid, Zero
from ptq.layers import QuantizedLayer, apply_weight, names_of, replace_module, shaped
from ptq.methods.method import GridSpec
from ptq.observers import Activations

MANTISSA_BITS = 15  # and a sign
ACCUMULATOR_BITS = 32

NEEDS_INPUTS = (
    "integers need inputs quantized with one step for the tensor; choose bits with a width for inputs "
    "(bits=w4a8) and activations.granularity=tensor"
)
NEEDS_GRID = (
    "integers need an affine grid with steps of whole rows and whole zero points; choose grid=symmetric or "
    "affine, without groups"
)


def check_integers(bits: Bits, grid: GridSpec, activations: Activations) -> None:
    """Raise InputError where a job's layers will have no integer form; single layers may still have none."""
    if bits.activation is None or activations.granularity is not Granularity.tensor:
        raise InputError(f"eval.integers=true: {NEEDS_INPUTS}")
    if bits.activation_skip:
        raise InputError(
            f"eval.integers=true: {NEEDS_INPUTS}; inputs of {', '.join(bits.activation_skip)} stay float by "
            "bits.activation_skip: leave it empty, or name the layers in bits.skip"
        )
    if not isinstance(grid, Affine) or grid.zero is Zero.float or bits.group_size is not None:
        raise InputError(f"eval.integers=true: {NEEDS_GRID}")


class IntegerLayer(nn.Module):
    """A layer on a symmetric grid or one with zero points, whose inputs have one step.

    `weight` holds integers in the float layer's shape, `bias` [out] integers, `mantissa` and `shift` [out]
    the factor of each output. Raises InputError, with the layer's name, where the layer has no such form.
    """

    def __init__(self, layer: QuantizedLayer, name: str) -> None:
        super().__init__()
        grid, codes = layer.grid_and_codes()
        quantizer = layer.input_quantizer
        if quantizer is None or quantizer.granularity is not Granularity.tensor:
            raise InputError(f"layer {name!r}: {NEEDS_INPUTS}")
        if not isinstance(grid, AffineGrid) or grid.offset is not None or grid.scale.shape[-1] != 1:
            raise InputError(f"layer {name!r}: {NEEDS_GRID}")
        assert quantizer.scale is not None
        self.geometry = layer.facts["geometry"]
        self.low, self.high = quantizer.centred_range()
        zero_point = 0 if grid.zero_point is None else grid.zero_point
        weight = shaped((codes - zero_point).double(), self.geometry)
        step = quantizer.scale.double()
        factor = (step * grid.scale.double()).expand(*codes.shape[:2], 1).flatten()  # [out]
        mantissa, exponent = torch.frexp(factor)
        mantissa = (mantissa * 2**MANTISSA_BITS).round()
        full = mantissa.abs() == 2**MANTISSA_BITS  # rounded up to one bit more
        mantissa, exponent = torch.where(full, mantissa / 2, mantissa), exponent + full
        bias = torch.zeros_like(factor) if layer.bias is None else (layer.bias.double() / factor).round()
        for key, tensor in {
            "step": step,
            "weight": weight,
            "bias": bias,
            "mantissa": mantissa,
            "shift": MANTISSA_BITS - exponent,
        }.items():
            self.register_buffer(key, tensor)
        self.name, self.peak = name, 0.0

    def forward(self, x: Tensor) -> Tensor:
        codes = (x / self.get_buffer("step").to(x.dtype)).round().clamp(self.low, self.high).double()
        total = apply_weight(codes, self.get_buffer("weight"), self.get_buffer("bias"), self.geometry)
        self.peak = max(self.peak, float(total.abs().max()))
        if self.peak >= 2 ** (ACCUMULATOR_BITS - 1):
            raise InputError(
                f"layer {self.name!r}: a sum of {self.peak:.3g} does not fit {ACCUMULATOR_BITS} bits"
            )
        factor = torch.ldexp(self.get_buffer("mantissa"), -self.get_buffer("shift"))
        if self.geometry["kind"] == "conv2d":
            factor = factor[:, None, None]
        return (total * factor).to(x.dtype)


def on_integers(module: nn.Module) -> nn.Module:
    """A copy of a quantized network whose quantized layers compute on integers; `module` stays as it is.

    Raises InputError, naming the first such layer, where one has no integer form.
    """
    module = copy.deepcopy(module)
    for layer in [m for m in module.modules() if isinstance(m, QuantizedLayer)]:
        names = names_of(module, layer)
        made = IntegerLayer(layer, names[0])
        for name in names:
            replace_module(module, name, made)
    return module
