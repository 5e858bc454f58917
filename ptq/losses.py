"""How far a unit's output is from the wanted one, as a number to lower.

Shapes: output, target [samples, channels, …] where there are four dimensions, else [samples, …, channels],
unless it is said that channels are last; gradients as output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(kw_only=True)
class Fisher:
    """The Fisher information of a unit's output, as far as a loss reads it."""

    diagonal: Tensor  # [samples, …], each sample's own
    directions: Tensor | None = None  # [rank, …], the same for all samples
    low_rank_fraction: float = 0.0  # weight of the term along the directions; the diagonal has the rest

    def to(self, device: torch.device) -> Fisher:
        """The same there."""
        directions = None if self.directions is None else self.directions.to(device)
        return replace(self, diagonal=self.diagonal.to(device), directions=directions)


class Loss(Enum):
    """Mean over samples and positions of a distance over the channels."""

    l2 = "l2"  # Σ |difference|²
    lp = "lp"  # Σ |difference|^p
    relative_l2 = "relative_l2"  # Σ |difference|² over Σ |target|², each sample's own
    cosine = "cosine"  # 1 − the cosine of each sample's output and target
    kl = "kl"  # Kullback–Leibler divergence of the softmax over channels: for logits, of the probabilities
    fisher_diagonal = "fisher_diagonal"  # Σ |difference|² · the output's squared gradient, of mean 1 (BRECQ)
    # a mix of that and Σ (u_k · difference)², u_k the directions of the largest gradients (after FIMA-Q)
    fisher_low_rank = "fisher_low_rank"

    @property
    def reads_gradients(self) -> bool:
        """Whether it weighs an output by the gradient of what the network makes of it."""
        return self in (Loss.fisher_diagonal, Loss.fisher_low_rank)

    def of(
        self,
        output: Tensor,
        target: Tensor,
        p: float = 2.0,
        fisher: Fisher | None = None,
        *,
        channels_last: bool = False,
    ) -> Tensor:
        """The loss, a scalar; those that read gradients need `fisher`."""
        channels = -1 if channels_last else channel_dim(target)
        if self is Loss.cosine:
            return 1 - F.cosine_similarity(output.flatten(1), target.flatten(1), dim=1).mean()
        if self is Loss.kl:
            wanted, given = target.log_softmax(channels), output.log_softmax(channels)
            return (wanted.exp() * (wanted - given)).sum(channels).mean()
        if self is Loss.l2:
            return F.mse_loss(output, target) * target.shape[channels]
        difference = output - target
        if self is Loss.lp:
            return (difference.abs() + 1e-12).pow(p).sum(channels).mean()
        square = difference.square()
        if self is Loss.relative_l2:
            energies = target.square().flatten(1).sum(1)
            least = (1e-6 * energies.mean()).clamp_min(1e-30)  # a sample of zeros weighs no more than that
            return (square.flatten(1).sum(1) / energies.clamp_min(least)).mean()
        assert fisher is not None
        diagonal = (square * fisher.diagonal).sum(channels).mean()
        if self is Loss.fisher_diagonal:
            return diagonal
        assert fisher.directions is not None
        along = difference.flatten(1) @ fisher.directions.flatten(1).mT  # [samples, rank]
        positions = difference[0].numel() // difference.shape[channels]
        low_rank = along.square().sum(1).mean() / positions
        return torch.lerp(diagonal, low_rank, fisher.low_rank_fraction)


def channel_dim(x: Tensor) -> int:
    """Where the channels are: second of four dimensions (images), else last."""
    return 1 if x.dim() == 4 else -1


def mean_square(targets: Iterable[Tensor]) -> float:
    """Mean of |target|² over everything; 1 where that is 0."""
    total, count = 0.0, 0
    for t in targets:
        total += float(t.double().square().sum())
        count += t.numel()
    return total / count if total > 0 else 1.0


def unit_mean(weights: list[Tensor]) -> list[Tensor]:
    """Weights divided by their mean over the whole set; 1 where all are 0."""
    mean = sum(float(w.double().sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
    return [w / mean if mean > 0 else torch.ones_like(w) for w in weights]


def largest_directions(gradients: list[Tensor], rank: int) -> Tensor:
    """u_k [rank, …] with Σ u_k u_kᵀ nearest to the mean of g gᵀ over samples; fewer where that has less rank.

    g is one sample's whole gradient. They come from the samples' Gram matrix A Aᵀ / samples = Q Λ Qᵀ, the
    rows of A being the gradients: u_k = Aᵀ q_k / √samples, whose square is λ_k. Batch by batch, so that
    nothing of the size of all gradients is made.
    """
    rows = [g.flatten(1) for g in gradients]
    samples = sum(len(a) for a in rows)
    gram = (
        torch.cat([torch.cat([(a.float() @ b.float().mT).double() for b in rows], dim=1) for a in rows])
        / samples
    )
    values, vectors = torch.linalg.eigh(gram)  # ascending
    kept = values > values[-1] * 1e-7  # what float32 products can tell from 0
    Q = vectors[:, kept][:, -rank:].flip(1) / samples**0.5  # [samples, rank], the largest first
    parts = Q.float().split([len(a) for a in rows])
    directions = torch.stack([q.mT @ a.float() for q, a in zip(parts, rows, strict=True)]).sum(0)
    return directions.unflatten(1, gradients[0].shape[1:])
