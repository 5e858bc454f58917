"""Gram matrices: against the layer's own output energy, at a million tokens, and the settings' rules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from ptq.calibration import GramAccumulator
from ptq.errors import InputError
from ptq.layers import weight_matrix

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5, bias=False), (4, 3, 7)),
    "linear on vectors": (lambda: nn.Linear(7, 5, bias=False), (11, 7)),
    "conv1d of gpt2": (lambda: Conv1D(5, 7), (4, 3, 7)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, bias=False), (3, 4, 9, 8)),
    "strided, padded": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 2), bias=False),
        (3, 4, 9, 8),
    ),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, bias=False), (3, 4, 9, 8)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", bias=False), (3, 4, 9, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (3, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (3, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 5, groups=4, stride=2, bias=False), (3, 4, 9, 8)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1, stride=2, bias=False), (3, 4, 9, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gram_gives_the_layers_output_energy(name: str) -> None:
    """Σ‖W x‖² over tokens, by the layer's forward and by tr(W H Wᵀ) · tokens, per output channel."""
    make, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    layer = make()
    nn.init.normal_(layer.weight, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    x = torch.randn(shape, generator=generator) + 0.4
    accumulator = GramAccumulator(layer)
    for part in x.split(2):
        accumulator.add(part)
    W, H = weight_matrix(layer).double(), accumulator.gram()
    by_gram = ((W @ H) * W).sum(-1).flatten() * accumulator.tokens
    y = layer.double()(x.double()).detach()
    y = y.transpose(0, 1) if y.dim() == 4 else y.reshape(-1, y.shape[-1]).T
    assert_close(by_gram, y.reshape(y.shape[0], -1).square().sum(-1), rtol=1e-5, atol=1e-6)


def test_cross_gram_is_float_inputs_times_seen_inputs() -> None:
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 2, 7, 7, generator=generator)
    x_float = x + 0.1 * torch.randn(5, 2, 7, 7, generator=generator)
    accumulator = GramAccumulator(layer)
    accumulator.add(x, x_float)
    cross = accumulator.cross()
    assert cross is not None
    W = weight_matrix(layer).double()
    by_cross = (W @ cross @ W.mT)[0] * accumulator.tokens
    y, y_float = (layer.double()(t.double()).detach().transpose(0, 1).reshape(3, -1) for t in (x, x_float))
    assert_close(by_cross, y_float @ y.T, rtol=1e-5, atol=1e-5)


def test_a_million_tokens_keep_six_digits() -> None:
    layer = nn.Linear(24, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    accumulator = GramAccumulator(layer)
    exact = torch.zeros(24, 24, dtype=torch.float64)
    for _ in range(16):
        x = torch.randn(65536, 24, generator=generator) + 3
        accumulator.add(x)
        exact += x.double().T @ x.double()
    assert accumulator.tokens == 2**20
    assert_close(accumulator.gram()[0], exact / 2**20, rtol=1e-6, atol=0)


def test_kept_positions_are_a_fair_sample() -> None:
    layer = nn.Conv2d(3, 2, 3, padding=1, bias=False)
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, part = GramAccumulator(layer), GramAccumulator(layer, positions_per_image=100)
    for piece in x.split(4):
        whole.add(piece)
        part.add(piece)
    assert part.tokens == 64 * 100
    assert float((part.gram() - whole.gram()).norm() / whole.gram().norm()) < 0.08


def test_no_input_at_all() -> None:
    with pytest.raises(InputError, match="no calibration input"):
        GramAccumulator(nn.Linear(2, 2)).gram()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"positions_per_image": 0}, "positions_per_image.*got 0"),
        ({"target": "float_path", "inputs": "float"}, "needs calibration.inputs=quantized"),
        ({"inputs": "both"}, "ill-typed value for calibration.inputs"),
        ({"image_augmentation": ["flop"]}, "ill-typed value for calibration.image_augmentation"),
        ({"image_augmentation": ["flip", "flip"]}, "name each only once; got .'flip', 'flip'"),
        ({"crop_scale": [0.0, 1.0]}, r"crop_scale must be two fractions.*got \[0.0, 1.0\]"),
        ({"crop_ratio": [2.0, 1.0]}, r"crop_ratio must be two positive.*got \[2.0, 1.0\]"),
        ({"jitter": 1.5}, r"jitter must be a fraction in \(0, 1\]; got 1.5"),
    ],
    ids=["samples", "batch", "positions", "target", "enum", "word", "twice", "scale", "ratio", "jitter"],
)
def test_wrong_settings(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("calibration", "default", **overrides)
