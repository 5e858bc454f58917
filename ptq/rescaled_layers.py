"""Layers whose weights and scales are trained together: QFT's offline and online subgraph in one module.

A weight's step is right · unit of the output / unit of the input, an activation's step · unit: the units of
channels are shared by all layers that touch them (ptq/models/graph.py), the steps of tensors by all that read
them. Measured in its units, a network has weights codes · right and one step per tensor, so nothing but codes
and right factors has to be stored: `frozen` gives that layer.
Shapes: W [groups, out, in]; right [groups, out, 1] or [1, 1, 1]; units [units].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.activations import ActivationQuantizer, straight_through
from ptq.grids.affine import AffineGrid
from ptq.layers import QuantizedLayer, apply_weight, geometry, shaped
from ptq.models.graph import REAL, Channels


class SharedScales(nn.Module):
    """What several layers share, as base-2 logarithms: factors of two change them exactly."""

    def __init__(self, units: Tensor, steps: Tensor, fixed_steps: set[int]) -> None:
        super().__init__()
        self.log_units = nn.Parameter(units.float().log2(), requires_grad=False)
        self.log_steps = nn.Parameter(steps.float().log2(), requires_grad=False)  # [tensors]
        self.fixed_steps = fixed_steps  # of tensors whose step is not trained
        free = torch.ones_like(self.log_units)
        free[REAL] = 0
        self.register_buffer("free", free, persistent=False)

    def units(self) -> Tensor:
        """The unit of each class of channels; REAL's is 1."""
        return torch.exp2(self.log_units * self.get_buffer("free"))

    def step(self, tensor: int) -> Tensor:
        log_step = self.log_steps[tensor]
        return torch.exp2(log_step.detach() if tensor in self.fixed_steps else log_step)


def taps_of(W: Tensor, inputs: Tensor) -> int:
    """Columns of W [groups, out, in] for each of its input channels."""
    return W.shape[0] * W.shape[2] // len(inputs)


def reads_one_channel(W: Tensor, inputs: Tensor) -> bool:
    """Whether W has rows [groups, out] that read one input channel each, and more than one."""
    return W.shape[2] == taps_of(W, inputs) and W.shape[0] * W.shape[1] > 1


class RescaledLayer(nn.Module):
    """Stands in for a Linear or Conv2d while its weights, bias and scales are trained."""

    def __init__(
        self,
        layer: nn.Module,
        channels: Channels,
        scales: SharedScales,
        *,
        weight: Tensor,
        right: Tensor,
        bits: int,
        code_min: int,
        code_max: int,
        quantizer: ActivationQuantizer | None,
        tensor: int,
    ) -> None:
        super().__init__()
        self.geometry = geometry(layer)
        self.shared = (scales,)  # in a tuple: the parameters are not this layer's own
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)  # [groups, out, in]
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        self.log_right = nn.Parameter(right.abs().log2(), requires_grad=False)
        self.register_buffer("sign", right.sign(), persistent=False)
        groups, rows, _ = self.weight.shape
        taps = taps_of(weight, channels.inputs)
        columns = channels.inputs.reshape(groups, 1, -1).repeat_interleave(taps, -1)
        self.register_buffer("columns", columns, persistent=False)  # [groups, 1, in]
        self.register_buffer("inputs", channels.inputs, persistent=False)  # [in channels]
        self.register_buffer("outputs", channels.outputs.reshape(groups, rows, 1), persistent=False)
        # one input and one right factor a row: units would be a second name for the latter
        self.apart = reads_one_channel(weight, channels.inputs) and right.numel() > 1
        self.bits, self.code_min, self.code_max = bits, code_min, code_max
        self.signed = quantizer is not None and quantizer.signed
        self.activation_bits = None if quantizer is None else quantizer.bits
        self.zero_point = None if quantizer is None else quantizer.zero_point
        self.input_range = None if quantizer is None else quantizer.centred_range()
        self.tensor = tensor
        self.rounds = True  # False: codes are not rounded, and everything is smooth but for clipping
        self.train(layer.training)

    def right(self) -> Tensor:
        return self.get_buffer("sign") * torch.exp2(self.log_right)

    def scale(self) -> Tensor:
        """Step of each weight, [groups, out, in] or broadcastable to it."""
        if self.apart:
            return self.right()
        units = self.shared[0].units()
        return self.right() * units[self.get_buffer("outputs")] / units[self.get_buffer("columns")]

    def quantized_weight(self) -> Tensor:
        """The weights as they will be: [groups, out, in], differentiable in W and all scales."""
        return straight_through(self.weight, self.scale(), self.code_min, self.code_max, rounds=self.rounds)

    def clipped_fraction(self) -> float:
        """Weights that the range cuts, of all."""
        u = self.weight.detach() / self.scale().detach()
        return float(((u < self.code_min - 0.5) | (u > self.code_max + 0.5)).double().mean())

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits is not None:
            x = self._quantized_input(x)
        return apply_weight(x, shaped(self.quantized_weight(), self.geometry), self.bias, self.geometry)

    def _quantized_input(self, x: Tensor) -> Tensor:
        assert self.input_range is not None
        units = self.shared[0].units()[self.get_buffer("inputs")]
        scale = self.shared[0].step(self.tensor) * units
        if self.geometry["kind"] == "conv2d":
            scale = scale[:, None, None]
        return straight_through(x, scale, *self.input_range, rounds=self.rounds)

    @torch.no_grad()
    def frozen(self, parameter_bits: int) -> QuantizedLayer:
        """The layer measured in its units, in the form that is stored: codes, right factors, one step."""
        scales = self.shared[0]
        units = scales.units()
        right = self.right()
        outputs = units[self.get_buffer("outputs")]
        if self.apart:
            right = right * units[self.get_buffer("columns")[..., :1]] / outputs
        codes = (self.weight / self.scale()).round().clamp(self.code_min, self.code_max)
        grid = AffineGrid(
            scale=right,
            zero_point=None,
            offset=None,
            code_min=-(2 ** (self.bits - 1)),
            code_max=2 ** (self.bits - 1) - 1,
            bits=self.bits,
            in_features=self.weight.shape[-1],
            group_size=None,
            parameter_bits=parameter_bits,
            per_tensor=right.numel() == 1,
        ).as_stored()
        tensors, facts = grid.storage(codes.to(torch.int32))
        facts["geometry"] = self.geometry
        bias = None if self.bias is None else self.bias / outputs.flatten()
        quantizer = None
        if self.activation_bits is not None:
            quantizer = ActivationQuantizer(
                bits=self.activation_bits,
                signed=self.signed,
                scale=scales.step(self.tensor),
                zero_point=self.zero_point,
            )
        layer = QuantizedLayer(tensors, facts, bias, quantizer)
        return layer.to(self.weight.device).train(self.training)
