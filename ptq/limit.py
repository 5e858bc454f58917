"""The Gaussian rate–distortion function of a layer: what no code can beat on average, as a reference line.

Model: row r of W is drawn from N(0, σ_r² I), rows independent, H = X Xᵀ / tokens and σ_r known to the decoder
for free. The error of a layer is Σ_r (w_r − ŵ_r) H (w_r − ŵ_r)ᵀ, so in the eigenbasis of H (eigenvalues λ_i)
the sources are independent Gaussians of variance σ_r² λ_i, and reverse water-filling with one level τ for the
whole layer gives (Cover and Thomas, Theorem 10.3.3)

    D(τ) = Σ_{r,i} min(τ, σ_r² λ_i)        R(τ) = 1/N Σ_{r,i} ½ log₂ max(1, σ_r² λ_i / τ),  N coefficients.

The distortion is set against the energy Σ_r w_r H w_rᵀ of the weight that is there, as
`LayerProblem.relative_error` does. Real weights are one draw and seldom Gaussian: they may need less than
this, and zero bits need not give relative error 1 exactly.

Inputs whose H_ii is 0 count as coefficients, cost no bits and are left out of σ_r².
Shapes: W [groups, out, in], H [groups, in, in], either without `groups`. float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ptq.errors import InputError

BISECTIONS = 128  # of a bracket of log₂ τ; float64 is exhausted well before


class GaussianLimit:
    """The limit of one layer; the eigenvalues are found once, each curve point is then cheap.

    `W` is the weight that errors are relative to (the problem's T). `variance` replaces the mean square of
    each row over its live inputs, broadcast to [groups, out]; a single number gives the model of equal rows.
    """

    def __init__(self, H: Tensor, W: Tensor, variance: Tensor | float | None = None) -> None:
        if W.dim() == 2 and H.dim() == 2:
            W, H = W[None], H[None]
        if W.dim() != 3 or W.numel() == 0 or tuple(H.shape) != (W.shape[0], W.shape[2], W.shape[2]):
            raise InputError(
                "the limit needs W [out, in] with H [in, in], or both with leading groups, not empty; "
                f"got W {list(W.shape)} and H {list(H.shape)}"
            )
        W, H = W.double(), H.double()
        if not (torch.isfinite(W).all() and torch.isfinite(H).all()):
            raise InputError("the limit needs finite W and H; got NaN or infinity")
        self.energy = float(((W @ H) * W).sum().clamp_min(0))
        self.count = W.numel()
        live = H.diagonal(dim1=-2, dim2=-1) > 0  # [groups, in]
        if variance is None:
            squares = (W.square() * live[:, None]).sum(-1)  # [groups, out]
            row_variance = squares / live.sum(-1, keepdim=True).clamp_min(1)
        else:
            row_variance = torch.as_tensor(variance, dtype=W.dtype, device=W.device).expand(W.shape[:2])
            if not (torch.isfinite(row_variance).all() and (row_variance >= 0).all()):
                raise InputError("the variance of each row must be finite and not negative")
        eigenvalues = torch.linalg.eigvalsh(H)  # [groups, in], ascending
        noise = eigenvalues[:, -1:] * eigenvalues.shape[-1] * torch.finfo(eigenvalues.dtype).eps
        eigenvalues = torch.where(eigenvalues > noise, eigenvalues, 0.0)  # of a singular H, rounding errors
        self._variance = row_variance
        self._used = row_variance > 0
        self._log_variance = torch.where(self._used, row_variance, 1.0).log2()
        self._log_eigenvalues = eigenvalues.log2().contiguous()  # −inf where zero, and then never above τ
        finite = torch.where(eigenvalues > 0, self._log_eigenvalues, 0.0)
        nothing = torch.zeros_like(eigenvalues[:, :1])
        self._sum_below = torch.cat([nothing, eigenvalues.cumsum(-1)], -1)  # [groups, in + 1]
        self._log_sum_above = torch.cat([finite.flip(-1).cumsum(-1).flip(-1), nothing], -1)
        self.model_energy = float((row_variance * self._sum_below[:, -1:]).sum())

    def error(self, bits: Tensor) -> Tensor:
        """Relative error at each rate of `bits` (any shape), 0 where the layer's output is zero anyway."""
        rates = torch.as_tensor(bits, dtype=torch.float64, device=self._variance.device)
        if not (torch.isfinite(rates).all() and (rates >= 0).all()):
            raise InputError(f"bits must be finite and not negative; got {rates.tolist()}")
        if self.energy == 0 or self.model_energy == 0:
            return torch.zeros_like(rates)
        smallest, largest, positive = self._log_range()
        low = smallest - 2 * rates * self.count / positive  # all sources are above τ there, the rate ≥ bits
        high = torch.full_like(low, largest)
        level = _bisect(lambda log_level: self._at(log_level)[1] <= rates, low, high)
        return (self._at(level)[0] / self.energy).sqrt()

    def curve(self, points: int) -> tuple[Tensor, Tensor, Tensor]:
        """log₂ τ, distortion and bits per coefficient at so many water levels, from the rate 0 to 24 bits;
        all empty where nothing reaches the output.
        """
        if self.model_energy == 0:
            nothing = torch.zeros(0, dtype=torch.float64)
            return nothing, nothing, nothing
        smallest, largest, positive = self._log_range()
        lowest = smallest - 48 * self.count / positive
        levels = torch.linspace(largest, lowest, points, dtype=torch.float64, device=self._variance.device)
        return levels, *self._at(levels)

    def bits(self, relative_error: Tensor) -> Tensor:
        """Rate at which the limit has each relative error (any shape); infinite for 0, 0 for errors it has
        without a bit.
        """
        errors = torch.as_tensor(relative_error, dtype=torch.float64, device=self._variance.device)
        if torch.isnan(errors).any() or (errors < 0).any():
            raise InputError(f"a relative error is not negative and not NaN; got {errors.tolist()}")
        distortion = errors.square() * self.energy
        if self.energy == 0 or self.model_energy == 0:
            return torch.zeros_like(errors)
        _, largest, positive = self._log_range()
        inside = (distortion > 0) & (distortion < self.model_energy)
        low = torch.where(inside, distortion / positive, 1.0).log2()  # D(τ) ≤ τ · positive
        high = low.clamp_min(largest)
        level = _bisect(lambda log_level: self._at(log_level)[0] >= distortion, low, high)
        rates = torch.where(inside, self._at(level)[1], 0.0)
        return torch.where(distortion > 0, rates, torch.inf)

    def _log_range(self) -> tuple[float, float, int]:
        """Smallest and largest log₂ of a positive source variance, and the number of positive ones."""
        logs = self._log_eigenvalues
        alive = torch.isfinite(logs)
        group_min = torch.where(alive, logs, torch.inf).amin(-1, keepdim=True)
        variance = self._log_variance
        used = self._used & alive.any(-1, keepdim=True)
        low = float((group_min + variance)[used].min())
        high = float((logs.amax(-1, keepdim=True) + variance)[used].max())
        return low, high, int((used * alive.sum(-1, keepdim=True)).sum())

    def _at(self, log_level: Tensor) -> tuple[Tensor, Tensor]:
        """Distortion and rate at water levels log₂ τ [...]."""
        flat = log_level.reshape(-1)  # [levels]
        groups, rows = self._variance.shape
        threshold = flat - self._log_variance[..., None]  # [groups, out, levels], in units of λ
        threshold = torch.where(self._used[..., None], threshold, torch.inf)
        below = torch.searchsorted(self._log_eigenvalues, threshold.reshape(groups, -1), right=True)
        inputs = self._log_eigenvalues.shape[-1]
        above = (inputs - below).view(groups, rows, -1)
        drowned = self._sum_below.gather(-1, below).view(groups, rows, -1) * self._variance[..., None]
        logs = self._log_sum_above.gather(-1, below).view(groups, rows, -1)
        distortion = (above * flat.exp2() + drowned).sum((0, 1))
        rate = (logs + above * (self._log_variance[..., None] - flat)).sum((0, 1)) / (2 * self.count)
        return distortion.view(log_level.shape), rate.clamp_min(0).view(log_level.shape)


def limit_error(H: Tensor, W: Tensor, bits: float) -> float:
    """Relative error of the Gaussian limit of a layer at `bits` per coefficient."""
    return float(GaussianLimit(H, W).error(torch.tensor(bits, dtype=torch.float64)))


def limit_bits(H: Tensor, W: Tensor, relative_error: float) -> float:
    """Bits per coefficient at which the Gaussian limit of a layer has `relative_error`."""
    return float(GaussianLimit(H, W).bits(torch.tensor(relative_error, dtype=torch.float64)))


def _bisect(high_enough: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Elementwise the smallest level in [low, high] that is high enough."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = high_enough(middle)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high
