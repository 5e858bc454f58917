from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.limit import GaussianLimit, limit_bits, limit_error


def layer(
    groups: int = 2, rows: int = 5, inputs: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(H, W), H full rank with unequal eigenvalues, rows of unequal size."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(groups, inputs, 40, generator=generator, dtype=torch.float64)
    X = X * torch.logspace(0, -2, inputs, dtype=torch.float64)[:, None]
    W = torch.randn(groups, rows, inputs, generator=generator, dtype=torch.float64)
    W = W * torch.linspace(0.2, 3, rows, dtype=torch.float64)[:, None]
    return (X @ X.mT / 40).to(dtype), W.to(dtype)


@pytest.mark.parametrize("bits", [0.0, 0.5, 2.0, 3.7])
def test_white_inputs_and_equal_rows_give_two_to_the_minus_bits(bits: float) -> None:
    W = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    assert limit_error(2.5 * torch.eye(3), W, bits) == pytest.approx(2**-bits, rel=1e-12)
    assert limit_bits(2.5 * torch.eye(3), W, 2**-bits) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize(
    ("bits", "mean_square"),
    [
        # Source variances 4 and 1, mean energy 2.5. Level τ = 2: rate ½ · ½ log₂ (4 / 2), error ½ (2 + 1).
        pytest.param(0.25, 1.5, id="one source drowned"),
        # Level τ = ¼: rate ½ · ½ (log₂ 16 + log₂ 4), error ¼.
        pytest.param(1.5, 0.25, id="both coded"),
    ],
)
def test_two_eigenvalues_by_hand(bits: float, mean_square: float) -> None:
    H, W = torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    relative = math.sqrt(mean_square / 2.5)
    assert limit_error(H, W, bits) == pytest.approx(relative, rel=1e-12)
    assert limit_bits(H, W, relative) == pytest.approx(bits, rel=1e-12)


def test_two_row_variances_by_hand() -> None:
    # Source variances 16 and 1 on white inputs. τ = ½: rate ½ · ½ (log₂ 32 + log₂ 2) = 1.5, error ½ of 8.5.
    W = torch.tensor([[4.0, 4.0], [1.0, -1.0]])
    assert limit_error(torch.eye(2), W, 1.5) == pytest.approx(math.sqrt(0.5 / 8.5), rel=1e-12)
    equal_rows = GaussianLimit(torch.eye(2), W, variance=8.5).error(torch.tensor(1.5))
    assert float(equal_rows) == pytest.approx(2**-1.5, rel=1e-12)


def test_agrees_with_the_sum_over_all_sources() -> None:
    H, W = layer()
    variance = W.square().mean(-1)  # [groups, out]
    sources = (variance[..., None] * torch.linalg.eigvalsh(H)[:, None]).flatten()
    energy = (W @ H * W).sum()
    limit = GaussianLimit(H, W)
    for level in (sources.max() / 2, sources.median(), sources.min() / 10):
        rate = (sources / level).log2().clamp_min(0).mean() / 2
        error = (torch.minimum(sources, level).sum() / energy).sqrt()
        torch.testing.assert_close(limit.error(rate), error, rtol=1e-9, atol=0)
        torch.testing.assert_close(limit.bits(error), rate, rtol=1e-9, atol=0)


def test_error_and_bits_are_inverse_and_monotone() -> None:
    limit = GaussianLimit(*layer())
    bits = torch.linspace(0.05, 12, 40, dtype=torch.float64)
    errors = limit.error(bits)
    assert (errors.diff() < 0).all()
    torch.testing.assert_close(limit.bits(errors), bits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(errors[-3:] / errors[-2:-1], 2 ** (bits[-2] - bits[-3:]))  # 6 dB a bit


def test_unequal_eigenvalues_need_fewer_bits_than_white_inputs() -> None:
    H, W = layer(groups=1)
    white = torch.eye(7, dtype=torch.float64)[None] * H.diagonal(dim1=-2, dim2=-1).mean()
    assert limit_bits(H, W, 0.1) < limit_bits(white, W, 0.1) - 0.5


def test_scale_of_weights_and_inputs_and_order_of_rows_change_nothing() -> None:
    H, W = layer()
    expected = limit_bits(H, W, 0.05)
    assert limit_bits(1e-9 * H, 1e6 * W, 0.05) == pytest.approx(expected, rel=1e-9)
    assert limit_bits(H, W.flip(1), 0.05) == pytest.approx(expected, rel=1e-12)


def test_dead_inputs_cost_nothing_but_count() -> None:
    H, W = layer(groups=1)
    wide_H, wide_W = torch.zeros(1, 14, 14, dtype=H.dtype), torch.full((1, 5, 14), 100.0, dtype=W.dtype)
    wide_H[:, ::2, ::2], wide_W[:, :, ::2] = H, W
    assert limit_bits(wide_H, wide_W, 0.05) == pytest.approx(limit_bits(H, W, 0.05) / 2, rel=1e-9)
    assert limit_error(wide_H, wide_W, 1.0) == pytest.approx(limit_error(H, W, 2.0), rel=1e-9)


@pytest.mark.parametrize("nothing", ["inputs", "weights"])
def test_a_layer_without_output_needs_nothing(nothing: str) -> None:
    H, W = layer()
    H, W = (H * 0, W) if nothing == "inputs" else (H, W * 0)
    assert limit_error(H, W, 2.0) == 0
    assert limit_bits(H, W, 0.0) == limit_bits(H, W, 0.1) == 0


def test_ends() -> None:
    H, W = layer()
    assert limit_bits(H, W, 0.0) == math.inf
    assert limit_bits(H, W, 100.0) == 0
    limit = GaussianLimit(H, W)
    assert limit_error(H, W, 0) == pytest.approx(math.sqrt(limit.model_energy / limit.energy), rel=1e-12)


def test_singular_statistics_and_a_zero_row() -> None:
    H, W = layer(groups=1, rows=3, inputs=6)
    H = H * 0 + torch.ones(6, 6, dtype=H.dtype)  # rank one
    W[:, 1] = 0
    # Two sources above zero of 18 coefficients; far below their variances they cost (2 / 18) bit a halving.
    assert limit_bits(H, W, 1e-5) - limit_bits(H, W, 2e-5) == pytest.approx(2 / 18, rel=1e-3)


def test_float32_without_groups() -> None:
    H, W = layer(groups=1)
    got = limit_bits(H[0].float(), W[0].float(), 0.1)
    assert got == pytest.approx(limit_bits(H, W, 0.1), rel=1e-4)


def test_a_gaussian_layer_rounded_to_nearest_is_above_its_limit() -> None:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(1, 400, 30, generator=generator, dtype=torch.float64)
    H = torch.eye(30, dtype=torch.float64)[None]
    codes = (W / 0.6).round()
    shares = codes.unique(return_counts=True)[1] / codes.numel()
    entropy = float(-(shares * shares.log2()).sum())
    error = float((W - 0.6 * codes).square().sum().sqrt() / W.square().sum().sqrt())
    gap = entropy - limit_bits(H, W, error)
    assert 0.2 < gap < 0.35  # ½ log₂ (2πe / 12) = 0.2546 at high rate


@pytest.mark.parametrize(
    ("H", "W", "message"),
    [
        pytest.param(torch.eye(3), torch.ones(2, 4), "got W", id="shapes"),
        pytest.param(torch.eye(2) * math.nan, torch.ones(2, 2), "NaN", id="nan"),
    ],
)
def test_bad_inputs_are_refused(H: Tensor, W: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GaussianLimit(H, W)


def test_bad_rates_and_errors_are_refused() -> None:
    H, W = layer()
    with pytest.raises(InputError, match="bits must be finite"):
        limit_error(H, W, -1.0)
    with pytest.raises(InputError, match="not negative"):
        limit_bits(H, W, math.nan)
