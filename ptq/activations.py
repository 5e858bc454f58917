"""Activation quantization: the input of a layer, rounded to a few levels on the fly.

    x̂ = scale · (clip(round(x / scale) + zero_point, code_min, code_max) − zero_point)

Gradients are straight-through: 1 inside the range and 0 outside for x; for the scale (the step of LSQ,
Esser et al., arXiv:1902.08153, Eq. 3 and 5) round(x / scale) − x / scale inside and the nearer limit outside,
times 1 / √(elements per scale · code_max), so that a step and a weight may share a rate.
Shapes: `scale` and `zero_point` broadcast against x from the right: [1] for a tensor; [in] or, for a
convolution, [channels, 1, 1] for channels; [positions, 1] for token positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import InputError

LEAST_SHARE = 1e-3  # of a step that is learned, of its start


class Granularity(Enum):
    """What shares one scale."""

    tensor = "tensor"
    channel = "channel"  # an integer product needs these scales folded into the weight's columns
    token = (
        "token"  # dynamic: from each token's own range, when it arrives; a convolution's token is an image
    )
    position = "position"  # one for each place in the sequence; inputs of another length are refused


class ActivationQuantizer(nn.Module):
    """Fake quantization of a layer's input.

    `signed` codes run from −2^(bits−1) to 2^(bits−1) − 1 and have no zero point; unsigned ones from 0 to
    2^bits − 1, with a zero point where x has negative values. `scale` is a parameter without gradient: ask
    for it to learn the step. It is None for granularity=token, where `token_dims` trailing dimensions (1; 3
    for a convolution) make up a token, and unsigned codes get the zero point that the token needs.
    """

    scale: nn.Parameter | None
    zero_point: Tensor | None

    def __init__(
        self,
        *,
        bits: int,
        granularity: Granularity = Granularity.tensor,
        signed: bool,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        token_dims: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 16:
            raise InputError(f"activation bits must be an integer from 1 to 16; got {bits}")
        if (scale is None) != (granularity is Granularity.token):
            given = None if scale is None else list(scale.shape)
            raise InputError(
                "granularity=token computes its scales from each input and takes none; every other one needs "
                f"them; got {granularity.value} with scale={given}"
            )
        if zero_point is not None and (signed or scale is None):
            raise InputError("a zero point goes with unsigned codes and a given scale; leave it out")
        if scale is not None and not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise InputError("activation scales must be positive and finite")
        self.bits, self.granularity, self.signed, self.token_dims = bits, granularity, signed, token_dims
        self.code_min, self.code_max = code_range(bits, signed)
        kept = None if scale is None else torch.atleast_1d(scale.detach()).float().clone()
        self.register_parameter("scale", None if kept is None else nn.Parameter(kept, requires_grad=False))
        whole = None if zero_point is None else torch.atleast_1d(zero_point.detach()).round().int()
        self.register_buffer("zero_point", whole)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x̂, of the shape and type of x; elements of the mask `kept` stay as they are."""
        if self.granularity is Granularity.token:
            dims = tuple(range(-min(self.token_dims, x.dim()), 0))
            values = x.detach().float()
            scale, zero_point = range_parameters(
                values.amin(dims, keepdim=True), values.amax(dims, keepdim=True), self.bits, self.signed
            )
            return fake_quantize(x, scale, zero_point, self.code_min, self.code_max, kept)
        assert self.scale is not None
        own, there = list(self.scale.shape), list(x.shape)
        pairs = zip(reversed(own), reversed(there), strict=False)
        if len(own) > len(there) or any(a not in (1, b) for a, b in pairs):
            raise InputError(
                f"activation scales {own} (granularity={self.granularity.value}) do not fit {there}; "
                "calibrate on inputs of this shape, or share one scale: granularity=tensor"
            )
        return fake_quantize(x, self.scale, self.zero_point, self.code_min, self.code_max, kept)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActivationQuantizer:
        """The scale follows the module to a device, not to another type: `.half()` spares it."""
        before = None if self.scale is None else self.scale.data
        super()._apply(fn, recurse)
        if self.scale is not None and before is not None:
            self.scale.data = before.to(self.scale.device)
        return self

    def centred_range(self) -> tuple[int, int]:
        """The least and the largest code less the zero point; of quantizers with one scale for the tensor."""
        zero = 0 if self.zero_point is None else int(self.zero_point)
        return self.code_min - zero, self.code_max - zero

    def facts(self) -> dict[str, Any]:
        """What a file says of the quantizer besides its tensors, as JSON."""
        return {
            "bits": self.bits,
            "granularity": self.granularity.value,
            "signed": self.signed,
            "token_dims": self.token_dims,
        }

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> ActivationQuantizer:
        """The quantizer that `facts` and the module's tensors describe."""
        return cls(
            **{**facts, "granularity": Granularity(facts["granularity"])},
            scale=tensors.get("scale"),
            zero_point=tensors.get("zero_point"),
        )

    def summary(self) -> dict[str, Any]:
        """What a record says of the quantizer."""
        return {
            "bits": self.bits,
            "granularity": self.granularity.value,
            "signed": self.signed,
            "zero_point": self.zero_point is not None,
            "scales": 0 if self.scale is None else self.scale.numel(),
            "storage_bits": self.storage_bits(),
        }

    def storage_bits(self) -> int:
        """Bits of scales and zero points, as stored."""
        kept = [t for t in (self.scale, self.zero_point) if t is not None]
        return sum(t.numel() * t.element_size() * 8 for t in kept)

    def extra_repr(self) -> str:
        scales = "from each token" if self.scale is None else list(self.scale.shape)
        return f"bits={self.bits}, {self.granularity.value}, signed={self.signed}, scale={scales}"


class LearnedSteps:
    """Scales of inputs in training, none of which may fall below a share of its start."""

    def __init__(self, scales: Iterable[Tensor]) -> None:
        self.limits = [(scale, LEAST_SHARE * scale.detach()) for scale in scales]

    @torch.no_grad()
    def keep_positive(self) -> None:
        """After a step of descent: back to the least share what went below it."""
        for scale, least in self.limits:
            scale.clamp_(min=least)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The least and the largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def range_parameters(low: Tensor, high: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None for signed codes) that cover [low, high] and 0; scale 1 where both are 0.

    Zero stays a value, so a convolution's padding is exact.
    """
    code_min, code_max = code_range(bits, signed)
    low, high = low.clamp_max(0), high.clamp_min(0)
    if signed:
        width = torch.maximum(high / max(code_max, 1), low / code_min)
        return torch.where(width > 0, width, torch.ones_like(width)), None
    width = (high - low) / code_max
    scale = torch.where(width > 0, width, torch.ones_like(width))
    return scale, (-low / scale).round().clamp(0, code_max)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    code_min: int,
    code_max: int,
    kept: Tensor | None = None,
) -> Tensor:
    """x̂ in x's type; computed in float32, with the gradients that the head of this file describes. Elements
    of the mask `kept` stay as they are.
    """
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(scale.dtype)
    if torch.is_grad_enabled() and scale.requires_grad:
        damped: Any = _DampedGradient.apply
        scale = damped(scale, (x.numel() / scale.numel() * max(code_max, 1)) ** -0.5)
    return straight_through(x, scale, code_min - zero, code_max - zero, kept=kept).to(x.dtype)


def straight_through(
    x: Tensor,
    scale: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    *,
    kept: Tensor | None = None,
    rounds: bool = True,
) -> Tensor:
    """scale · clip(round(x / scale)), where rounding has the derivative 1, so that clipping has 1 inside and
    0 outside, and the derivative in the scale is code − x / scale inside and the code outside.

    The limits are integers that broadcast against x. Elements of the mask `kept` stay as they are. Without
    `rounds` everything is smooth but for clipping.
    """
    function: Any = _StraightThrough.apply
    return function(x, scale, low, high, kept, rounds)


class _StraightThrough(torch.autograd.Function):
    """One node with one mask in the place of a division, a clip, a rounding and a product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        low: Any,
        high: Any,
        kept: Tensor | None,
        rounds: bool,
    ) -> Tensor:
        u = x / scale
        to_x, to_scale = ctx.needs_input_grad[:2]
        inside = (u >= low) & (u <= high) if to_x or to_scale else None
        change = None
        if to_scale:
            assert inside is not None
            codes = (u.round() if rounds else u).clamp(low, high)
            change = codes - u * inside
            if kept is not None:
                change = change.masked_fill_(kept, 0)
        else:
            codes = (u.round_() if rounds else u).clamp_(low, high)
        quantized = codes.mul_(scale)
        if kept is not None:
            quantized.lerp_(x.to(quantized.dtype), kept.to(quantized.dtype))  # either; faster than where
            inside = None if inside is None else inside.logical_or_(kept)
        ctx.save_for_backward(inside if to_x else None, change)
        ctx.shape, ctx.dtype = scale.shape, x.dtype
        return quantized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        inside, change = ctx.saved_tensors
        to_x = None if inside is None else (gradient * inside).to(ctx.dtype)
        to_scale = None if change is None else (gradient * change).sum_to_size(ctx.shape)
        return to_x, to_scale, None, None, None, None


class _DampedGradient(torch.autograd.Function):
    """The tensor itself; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
