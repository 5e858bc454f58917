"""Alternating projections: never worse, exact in each half-step, per-channel MMSE where left is frozen."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from ptq.solvers.rank_one import Kernel, alternating_projection, fit_right, largest_right


def kernel(out: int, units: torch.Tensor, bits: int, seed: int, *, shared: bool = False) -> Kernel:
    generator = torch.Generator().manual_seed(seed)
    size = (1, out, units.shape[-1])
    W = torch.randn(size, generator=generator) * torch.rand(1, 1, size[-1], generator=generator).add(0.1)
    high = 2 ** (bits - 1) - 1
    right = fit_right(W, torch.ones_like(W[:, :1]), -high, high, shared=shared)
    return Kernel(W=W, units=units, right=right, code_min=-high, code_max=high)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["rows", "tensor"])
def test_the_error_never_rises_and_falls_in_all(bits: int, shared: bool) -> None:
    units = torch.arange(18).reshape(2, 9).repeat_interleave(2, -1)  # two taps a channel
    kernels = [kernel(7, units[:1][None], bits, 0, shared=shared), kernel(5, units[:1][None], bits, 1)]
    left, errors = alternating_projection(kernels, torch.ones(18), torch.arange(18) < 9, 12)
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]
    assert bool((left[:9] != 1).all())
    assert bool((left[9:] == 1).all())
    assert bool((left > 0).all())


def test_frozen_left_factors_give_per_channel_mmse() -> None:
    one = kernel(6, torch.arange(40)[None, None], 3, 2)
    W, start = one.W, one.right.clone()
    left, errors = alternating_projection([one], torch.ones(40), torch.zeros(40, dtype=torch.bool), 30)
    assert bool((left == 1).all())
    assert_close(one.right, start, rtol=1e-4, atol=0)  # fit_right had converged
    least = torch.full((6,), torch.inf)
    for factor in torch.linspace(0.2, 1.2, 4000):
        scale = factor * W[0].abs().amax(1, keepdim=True) / 3
        error = (W[0] - (W[0] / scale).round().clamp(-3, 3) * scale).square().sum(1)
        least = torch.minimum(least, error)
    assert errors[-1] == pytest.approx(float(least.sum()), rel=1e-3)


def test_a_weight_on_the_grid_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (1, 6, 20), generator=generator).float()
    codes[..., 0], codes[..., 1] = 7, -7
    right = torch.rand(1, 6, 1, generator=generator) + 0.5
    fitted = fit_right(codes * right, torch.ones(1, 1, 20), -7, 7, shared=False)
    assert_close(fitted, right)
    assert_close(largest_right(codes * right, torch.ones(1, 1, 20), 7, shared=False), right)


def test_full_codes_choose_their_sign_and_zero_rows_stay_finite() -> None:
    W = torch.tensor([[[2.0, -1.0, 1.0]], [[-2.0, 1.0, 1.0]]]).reshape(1, 2, 3)
    right = fit_right(W, torch.ones(1, 1, 3), -2, 1, shared=False)
    assert_close(right.flatten(), torch.tensor([-1.0, 1.0]))
    zero = torch.zeros(1, 2, 3)
    assert bool(torch.isfinite(fit_right(zero, torch.ones(1, 1, 3), -1, 1, shared=False)).all())
    assert bool((largest_right(zero, torch.ones(1, 1, 3), 1, shared=True) == 1).all())
