"""How far a unit's output is from the wanted one, as a number to lower.

Shapes: output, target [samples, channels, …] where there are four dimensions, else [samples, …, channels];
weight as output.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F


class Loss(Enum):
    """Mean over samples and positions of a distance over the channels."""

    l2 = "l2"  # Σ |difference|²
    lp = "lp"  # Σ |difference|^p
    relative_l2 = "relative_l2"  # Σ |difference|² over Σ |target|², each sample's own
    cosine = "cosine"  # 1 − the cosine of each sample's output and target
    kl = "kl"  # Kullback–Leibler divergence of the softmax over channels: for logits, of the probabilities
    fisher_diagonal = "fisher_diagonal"  # Σ |difference|² · the output's squared gradient, of mean 1 (BRECQ)

    def of(self, output: Tensor, target: Tensor, p: float = 2.0, weight: Tensor | None = None) -> Tensor:
        """The loss, a scalar."""
        channels = channel_dim(target)
        if self is Loss.cosine:
            return 1 - F.cosine_similarity(output.flatten(1), target.flatten(1), dim=1).mean()
        if self is Loss.kl:
            wanted, given = target.log_softmax(channels), output.log_softmax(channels)
            return (wanted.exp() * (wanted - given)).sum(channels).mean()
        difference = output - target
        if self is Loss.lp:
            return (difference.abs() + 1e-12).pow(p).sum(channels).mean()
        square = difference.square()
        if self is Loss.relative_l2:
            energies = target.square().flatten(1).sum(1)
            least = (1e-6 * energies.mean()).clamp_min(1e-30)  # a sample of zeros weighs no more than that
            return (square.flatten(1).sum(1) / energies.clamp_min(least)).mean()
        if self is Loss.fisher_diagonal:
            assert weight is not None
            square = square * weight
        return square.sum(channels).mean()


def channel_dim(x: Tensor) -> int:
    """Where the channels are: second of four dimensions (images), else last."""
    return 1 if x.dim() == 4 else -1


def energy(targets: Iterable[Tensor]) -> float:
    """Mean over samples and positions of Σ |target|² over channels; 1 where that is 0."""
    total, positions = 0.0, 0
    for t in targets:
        total += float(t.double().square().sum())
        positions += t.numel() // max(1, t.shape[channel_dim(t)])
    return total / positions if total > 0 else 1.0


def unit_mean(weights: list[Tensor]) -> list[Tensor]:
    """Weights divided by their mean over the whole set; 1 where all are 0."""
    mean = sum(float(w.double().sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
    return [w / mean if mean > 0 else torch.ones_like(w) for w in weights]
