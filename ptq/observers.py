"""Observers: the range of a layer's inputs, taken batch by batch, and the quantizer that follows from it.

Minima and maxima are exact. Percentiles and the scan for the least error work on a histogram whose range
doubles as needed (pairs of bins are merged), so no input outlives its batch.
Shapes: a batch is seen as [units, elements], a unit being what shares one scale; low, high [units].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from ptq.activations import ActivationQuantizer, Granularity, code_range, range_parameters
from ptq.calibration import Calibration, NoCalibration
from ptq.errors import InputError


class Observer(Enum):
    """How the range [low, high] of each unit is found; it always holds 0."""

    min_max = "min_max"  # least and largest value of all batches
    ema = "ema"  # moving average of each batch's least and largest value
    percentile = "percentile"  # `percentile` percent of the values lie below high, as many above low
    mse = "mse"  # the least Σ|x − x̂|^exponent: both ends shrunk together, then each alone


@dataclass(kw_only=True, slots=True)
class Activations:
    """How layer inputs are quantized where `bits.activation` gives them a width."""

    granularity: Granularity
    observer: Observer  # not for granularity=token, whose ranges are each token's own
    # where negative values were seen: true = signed codes without zero point, false = a zero point.
    # Inputs without any get unsigned codes without zero point.
    symmetric: bool
    decay: float  # of ema: the share of the old average
    percentile: float
    exponent: float  # of mse
    scan_steps: int  # of mse: shrink factors tried
    min_shrink: float  # of mse: the least of them
    bins: int  # of the histogram of each unit

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"activations.decay must be in [0, 1); got {self.decay}")
        if not 50 < self.percentile <= 100:
            raise InputError(f"activations.percentile must be in (50, 100]; got {self.percentile}")
        if self.exponent <= 0 or self.scan_steps < 1 or not 0 < self.min_shrink <= 1:
            raise InputError(
                "activations needs exponent > 0, scan_steps of at least 1 and min_shrink in (0, 1]; "
                f"got {self.exponent}, {self.scan_steps} and {self.min_shrink}"
            )
        if self.bins < 16 or self.bins % 4:
            raise InputError(f"activations.bins must be a multiple of 4, at least 16; got {self.bins}")


def check_activations(
    activations: Activations | None, widths: list[int], calibration: Calibration | NoCalibration
) -> None:
    """Raise InputError where inputs shall be quantized (`widths` not empty) and no range could be known."""
    if not widths:
        return
    if activations is None:
        raise InputError(
            f"bits.activation={widths[0]} needs `activations`, which say how; choose one of conf/activations"
        )
    if isinstance(calibration, NoCalibration) and activations.granularity is not Granularity.token:
        raise InputError(
            f"activations.granularity={activations.granularity.value} takes its ranges from data, and "
            "calibration=none has none; use activations=per_token, or bits.activation=null"
        )


class InputObserver:
    """What is known of one layer's inputs."""

    def __init__(self, layer: nn.Module, activations: Activations, bits: int) -> None:
        self.activations, self.bits = activations, bits
        self.convolution = isinstance(layer, nn.Conv2d)
        if self.convolution and activations.granularity is Granularity.position:
            raise InputError(
                "a convolution's inputs have no token positions; give the layer in bits.activation_skip, "
                "or use activations=default"
            )
        self.shape: list[int] | None = None  # of the scales
        self.negative = False
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.histogram: Histogram | None = None

    def add(self, x: Tensor) -> None:
        """Take in one batch as the layer received it. Raises InputError on NaN or infinity."""
        x = x.detach().float()
        low, high = x.amin(), x.amax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise InputError("NaN or infinity in its inputs; check the checkpoint and the calibration data")
        self.negative |= bool(low < 0)
        settings = self.activations
        if settings.granularity is Granularity.token:
            self.shape = []
            return
        units, shape = self._units(x)
        if self.shape is not None and shape != self.shape:
            raise InputError(
                f"activations.granularity={settings.granularity.value} needs inputs of one shape; got scales "
                f"{self.shape} and then {shape}; use activations=default"
            )
        self.shape = shape
        low, high = units.amin(1), units.amax(1)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif settings.observer is Observer.ema:
            self.low, self.high = (
                settings.decay * old + (1 - settings.decay) * new
                for old, new in ((self.low, low), (self.high, high))
            )
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if settings.observer in (Observer.percentile, Observer.mse):
            self.histogram = self.histogram or Histogram(len(units), settings.bins, units.device)
            self.histogram.add(units)

    def quantizer(self) -> ActivationQuantizer:
        """The quantizer for the inputs seen; dynamic ones may have seen none."""
        settings = self.activations
        if settings.granularity is Granularity.token:
            signed = settings.symmetric and (self.negative or self.shape is None)
            return ActivationQuantizer(
                bits=self.bits,
                granularity=settings.granularity,
                signed=signed,
                token_dims=3 if self.convolution else 1,
            )
        if self.low is None or self.high is None or self.shape is None:
            raise InputError("no calibration input reached the layer; check the calibration data")
        signed = settings.symmetric and self.negative
        low, high = self._range(self.low, self.high, signed)
        scale, zero_point = range_parameters(low, high, self.bits, signed)
        if not self.negative:
            zero_point = None
        return ActivationQuantizer(
            bits=self.bits,
            granularity=settings.granularity,
            signed=signed,
            scale=scale.reshape(self.shape),
            zero_point=None if zero_point is None else zero_point.reshape(self.shape),
        )

    def _units(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """x as [units, elements], and the shape that makes a vector over units broadcast against x."""
        if self.activations.granularity is Granularity.tensor:
            return x.reshape(1, -1), [1]
        if self.activations.granularity is Granularity.channel:
            channels = x.movedim(-3 if self.convolution else -1, 0).flatten(1)
            return channels, [len(channels), 1, 1] if self.convolution else [len(channels)]
        positions = list(x.shape[1:-1])  # none for [samples, in]
        return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(0, 1).flatten(1), [*positions, 1]

    def _range(self, low: Tensor, high: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        low, high = low.clamp_max(0), high.clamp_min(0)
        if self.histogram is None:
            return low, high
        if self.activations.observer is Observer.percentile:
            share = self.activations.percentile / 100
            return (
                torch.maximum(low, self.histogram.quantile(1 - share)).clamp_max(0),
                torch.minimum(high, self.histogram.quantile(share)).clamp_min(0),
            )
        return least_error_range(self.histogram, low, high, self.bits, signed, self.activations)


class Histogram:
    """Counts [units, bins] over [−reach, reach) of each unit; `reach` doubles when a value lies outside."""

    def __init__(self, units: int, bins: int, device: torch.device) -> None:
        self.counts = torch.zeros(units, bins, dtype=torch.float64, device=device)
        self.reach = torch.zeros(units, device=device)  # 0: only zeros were seen

    def add(self, x: Tensor) -> None:
        """Count x [units, elements]."""
        largest = x.abs().amax(1)
        # a little more, so that the largest value falls into the last bin
        self.reach = torch.where(self.reach > 0, self.reach, largest * (1 + 1e-6))
        units, bins = self.counts.shape
        while (outside := (self.reach > 0) & (largest >= self.reach)).any():
            halved = self.counts.reshape(units, bins // 2, 2).sum(-1)
            wider = nn.functional.pad(halved, (bins // 4, bins // 4))
            self.counts = torch.where(outside[:, None], wider, self.counts)
            self.reach = torch.where(outside, 2 * self.reach, self.reach)
        reach = torch.where(self.reach > 0, self.reach, torch.ones_like(self.reach))
        index = (x * (bins / 2 / reach)[:, None]).floor_().add_(bins // 2).long().clamp_(0, bins - 1)
        index += bins * torch.arange(units, device=x.device)[:, None]
        self.counts += torch.bincount(index.flatten(), minlength=units * bins).reshape(units, bins)

    def edges(self) -> Tensor:
        """Lower edge of each bin, and the upper one of the last, [units, bins + 1]."""
        bins = self.counts.shape[1]
        return torch.arange(-bins // 2, bins // 2 + 1, device=self.reach.device) * (
            2 / bins * self.reach[:, None]
        )

    def quantile(self, share: float) -> Tensor:
        """The value below which `share` of those counted lie, [units]; linear inside a bin."""
        below = self.counts.cumsum(1)
        wanted = share * below[:, -1:]
        bin_ = torch.searchsorted(below, wanted).clamp_max(self.counts.shape[1] - 1)
        count = self.counts.gather(1, bin_)
        before = below.gather(1, bin_) - count
        part = torch.where(count > 0, (wanted - before) / count.clamp_min(1), torch.zeros_like(wanted))
        edges = self.edges()
        start = edges.gather(1, bin_)
        return (start + part * (edges.gather(1, bin_ + 1) - start))[:, 0].float()


def least_error_range(
    histogram: Histogram, low: Tensor, high: Tensor, bits: int, signed: bool, settings: Activations
) -> tuple[Tensor, Tensor]:
    """The range inside [low, high] with the least Σ|x − x̂|^exponent over the histogram, [units] each."""
    edges = histogram.edges()
    seen = (histogram.counts > 0).any(0)
    counts = histogram.counts[:, seen]
    centres = ((edges[:, 1:] + edges[:, :-1]) / 2)[:, seen]
    code_min, code_max = code_range(bits, signed)

    def error(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = range_parameters(low, high, bits, signed)
        zero = 0.0 if zero_point is None else zero_point[:, None]
        codes = (centres / scale[:, None]).round_().add_(zero).clamp_(code_min, code_max)
        return (counts * ((codes - zero) * scale[:, None] - centres).abs().pow(settings.exponent)).sum(1)

    steps = range(settings.scan_steps)
    factors = [1 - k * (1 - settings.min_shrink) / settings.scan_steps for k in steps]
    best, least = (low, high), error(low, high)

    def scan(candidate: Callable[[float], tuple[Tensor, Tensor]]) -> None:
        nonlocal best, least
        for factor in factors:
            tried = candidate(factor)
            found = error(*tried)
            better = found < least
            least = torch.where(better, found, least)
            best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))

    scan(lambda factor: (factor * low, factor * high))
    if not signed and bool((low < 0).any()):
        scan(lambda factor: (best[0], factor * high))
        scan(lambda factor: (factor * low, best[1]))
    return best
