"""Scales of rank one, W ≈ codes · left · right, of least squared error.

Each half-step of the alternating projections rounds anew and then solves one factor exactly, so the error
never rises. Several kernels may read the same channels: they share the left factors.
Shapes: W, codes [groups, out, in]; left [units], spread over a kernel's columns by `units` [groups, 1, in];
right [groups, out, 1], or [1, 1, 1] where the kernel has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTORS = 33  # shrink factors of the largest weight that the first range is chosen from
LEAST_FACTOR = 0.2
LEAST_STEP = 1e-30  # what is finer underflows somewhere: rows that need such steps count as zeros


@dataclass(kw_only=True)
class Kernel:
    """One layer's weights, the unit that each column is measured in, and its right factors."""

    W: Tensor
    units: Tensor  # [groups, 1, in] position in `left`
    right: Tensor
    code_min: int
    code_max: int

    def codes(self, left: Tensor) -> Tensor:
        """Nearest codes, as real numbers."""
        u = self.W / (left[self.units] * self.right)
        return u.round().clamp(self.code_min, self.code_max)

    def error(self, left: Tensor) -> float:
        """‖W − codes · left · right‖²."""
        return float((self.W - self.codes(left) * left[self.units] * self.right).double().square().sum())


def largest_right(W: Tensor, left: Tensor, code_max: int, *, shared: bool) -> Tensor:
    """Right factors that just avoid clipping, any for rows of zeros. `left` is spread: [groups, 1, in]."""
    V = (W / left).abs()
    largest = V.amax().reshape(1, 1, 1) if shared else V.amax(-1, keepdim=True)
    return usable(largest / code_max)


def usable(steps: Tensor) -> Tensor:
    """Steps with the mean of the others, 1 without others, in the place of those too fine to divide by."""
    fine = steps.abs() <= LEAST_STEP
    others = steps[~fine].abs()
    return torch.where(fine, others.mean() if len(others) else 1.0, steps)


def fit_right(
    W: Tensor, left: Tensor, code_min: int, code_max: int, *, shared: bool, rounds: int = 10
) -> Tensor:
    """Right factors of least squared error for a `left` that is spread, [groups, 1, in].

    The best of FACTORS shrink factors of the largest weight, then alternations of rounding and least squares.
    Where codes are not symmetric, both signs are tried.
    """
    most = largest_right(W, left, code_max, shared=shared)
    best, least = most, torch.full_like(most, torch.inf)

    def per_unit(E: Tensor) -> Tensor:
        return E.sum().reshape(1, 1, 1) if shared else E.sum(-1, keepdim=True)

    def consider(right: Tensor) -> None:
        nonlocal best, least
        q = (W / (left * right)).round().clamp(code_min, code_max)
        E = per_unit((W - q * left * right).square())
        best, least = torch.where(least > E, right, best), torch.minimum(E, least)

    signs = (1.0,) if code_min == -code_max else (1.0, -1.0)
    for factor in torch.linspace(1.0, LEAST_FACTOR, FACTORS).tolist():
        for sign in signs:
            consider(sign * factor * most)
    for _ in range(rounds):
        q = (W / (left * best)).round().clamp(code_min, code_max) * left
        square = per_unit(q * q)
        solved = per_unit(W * q) / square
        consider(torch.where((square > 0) & (solved != 0), solved, best))
    return best


def refit_right(kernel: Kernel, left: Tensor) -> Tensor:
    """Right factors of least error for the nearest codes; the old ones where no code differs from 0."""
    q = kernel.codes(left) * left[kernel.units]
    dims = (0, 1, 2) if kernel.right.numel() == 1 else (2,)
    square, product = (q * q).sum(dims, keepdim=True), (kernel.W * q).sum(dims, keepdim=True)
    usable = (square > 0) & (product != 0)
    return torch.where(usable, product / torch.where(usable, square, 1.0), kernel.right)


def refit_left(kernels: list[Kernel], left: Tensor, free: Tensor) -> Tensor:
    """Left factors of least error, summed over all kernels, for the nearest codes; where `free` [units]."""
    square, product = torch.zeros_like(left), torch.zeros_like(left)
    for kernel in kernels:
        q = kernel.codes(left) * kernel.right
        index = kernel.units.expand_as(q).flatten()
        square.index_add_(0, index, (q * q).flatten())
        product.index_add_(0, index, (kernel.W * q).flatten())
    usable = free & (product > 0) & (square > 0)
    return torch.where(usable, product / torch.where(usable, square, 1.0), left)


def alternating_projection(
    kernels: list[Kernel], left: Tensor, free: Tensor, rounds: int
) -> tuple[Tensor, list[float]]:
    """Left factors after `rounds` of right and left half-steps, and the summed error after each half-step.

    The kernels' right factors change in place. `free` [units] says which left factors may.
    """
    errors = []
    for _ in range(rounds):
        for kernel in kernels:
            kernel.right = refit_right(kernel, left)
        errors.append(sum(kernel.error(left) for kernel in kernels))
        left = refit_left(kernels, left, free)
        errors.append(sum(kernel.error(left) for kernel in kernels))
    return left, errors
