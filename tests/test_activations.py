"""The fake quantizer of layer inputs: formula, granularities, gradients, storage, refusals."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ptq import activations
from ptq.activations import (
    ActivationQuantizer,
    Granularity,
    fake_quantize,
    range_parameters,
    straight_through,
)
from ptq.errors import InputError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covering(x: Tensor, bits: int, signed: bool, dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for the range of x over `dims`."""
    return range_parameters(x.amin(dims), x.amax(dims), bits, signed)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_formula_is_that_of_torch(bits: int, signed: bool) -> None:
    x = 3 * normal(5, 7, 3, 3) + 0.5
    zero_point = None if signed else torch.tensor(2 ** (bits - 1) - 1)
    scale = torch.tensor(2.0**-bits * 8)  # a power of two: x / scale and x · (1 / scale) round alike
    quantizer = ActivationQuantizer(bits=bits, signed=signed, scale=scale, zero_point=zero_point)
    code_min, code_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    expected = torch.fake_quantize_per_tensor_affine(
        x, float(scale), 0 if zero_point is None else int(zero_point), code_min, code_max
    )
    assert_close(quantizer(x), expected, rtol=0, atol=0)
    assert_close(quantizer(x.requires_grad_()), expected, rtol=0, atol=0)
    assert len(quantizer(x).unique()) <= 2**bits


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_channels_of_convolutions_and_linear_layers(signed: bool) -> None:
    x = normal(4, 6, 5, 5) * torch.arange(1, 7).reshape(-1, 1, 1)
    scale, zero_point = covering(x, 5, signed, (0, 2, 3))
    expected = torch.fake_quantize_per_channel_affine(
        x,
        scale,
        torch.zeros(6) if zero_point is None else zero_point,
        1,
        -16 if signed else 0,
        15 if signed else 31,
    )
    shaped = {"scale": scale.reshape(6, 1, 1)}
    if zero_point is not None:
        shaped["zero_point"] = zero_point.reshape(6, 1, 1)
    quantizer = ActivationQuantizer(bits=5, granularity=Granularity.channel, signed=signed, **shaped)
    assert_close(quantizer(x), expected, rtol=1e-6, atol=1e-6)
    assert_close(quantizer(x[0]), expected[0], rtol=1e-6, atol=1e-6)
    flat = {name: t.flatten() for name, t in shaped.items()}
    linear = ActivationQuantizer(bits=5, granularity=Granularity.channel, signed=signed, **flat)
    assert_close(linear(x.movedim(1, -1)), expected.movedim(1, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("token_dims", [1, 3], ids=["vector", "image"])
def test_each_token_gets_its_own_range(signed: bool, token_dims: int) -> None:
    x = normal(6, 3, 4, 5) * 10.0 ** torch.arange(6).reshape(-1, 1, 1, 1)
    dynamic = ActivationQuantizer(bits=4, granularity=Granularity.token, signed=signed, token_dims=token_dims)
    tokens = x.flatten(-token_dims).flatten(0, -2)  # [tokens, elements]
    for token, found in zip(tokens, dynamic(x).flatten(-token_dims).flatten(0, -2), strict=True):
        scale, zero_point = covering(token, 4, signed, (0,))
        alone = ActivationQuantizer(bits=4, signed=signed, scale=scale, zero_point=zero_point)
        assert_close(found, alone(token), rtol=0, atol=0)
    assert dynamic.storage_bits() == 0


def test_positions_share_nothing() -> None:
    x = normal(3, 5, 4) * torch.arange(1, 6).reshape(-1, 1)
    scale, zero_point = covering(x, 3, False, (0, 2))
    assert zero_point is not None
    quantizer = ActivationQuantizer(
        bits=3,
        granularity=Granularity.position,
        signed=False,
        scale=scale.reshape(5, 1),
        zero_point=zero_point.reshape(5, 1),
    )
    for k in range(5):
        one = ActivationQuantizer(bits=3, signed=False, scale=scale[k], zero_point=zero_point[k])
        assert_close(quantizer(x)[:, k], one(x[:, k]), rtol=0, atol=0)
    with pytest.raises(InputError, match=r"scales \[5, 1\] \(granularity=position\) do not fit \[3, 6, 4\]"):
        quantizer(normal(3, 6, 4))
    with pytest.raises(InputError, match="do not fit"):
        quantizer(normal(4))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_error_is_half_a_step_and_falls_by_two_bits_power_a_bit(signed: bool) -> None:
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 3 - 1
    powers = []
    for bits in (3, 4, 5, 6, 7):
        scale, zero_point = covering(x, bits, signed, (0,))
        x_hat = ActivationQuantizer(bits=bits, signed=signed, scale=scale, zero_point=zero_point)(x)
        inside = x <= scale * (2 ** (bits - 1) - 1) if signed else x >= scale * -zero_point
        assert float((x - x_hat)[inside].abs().max()) <= float(scale) * 0.5 + 1e-6
        powers.append(float((x - x_hat).square().mean().log2()))
    steps = [a - b for a, b in pairwise(powers)]
    assert all(1.7 < step < 2.5 for step in steps)


def test_zero_and_what_is_on_the_grid_stay() -> None:
    scale, zero_point = range_parameters(torch.tensor([-0.3]), torch.tensor([1.7]), 4, False)
    quantizer = ActivationQuantizer(bits=4, signed=False, scale=scale, zero_point=zero_point)
    once = quantizer(normal(50))
    assert_close(quantizer(once), once, rtol=0, atol=0)
    assert float(quantizer(torch.zeros(3)).abs().max()) == 0
    silent = range_parameters(torch.zeros(2), torch.zeros(2), 4, False)
    assert float(silent[0].min()) == 1
    assert not torch.isfinite(quantizer(torch.tensor([float("nan"), 1.0])))[0]


@pytest.mark.parametrize("case", ["signed", "unsigned", "zero point"])
def test_gradients_without_rounding_by_finite_differences(monkeypatch, case: str) -> None:
    smooth = partial(activations.straight_through, rounds=False)
    monkeypatch.setattr(activations, "straight_through", smooth)
    x = normal(3, 40).double().requires_grad_()
    scale = torch.tensor([0.31, 0.11, 0.07]).double().reshape(3, 1).requires_grad_()
    zero_point = torch.tensor([1, 2, 3]).reshape(3, 1) if case == "zero point" else None
    limits = (-4, 3) if case == "signed" else (0, 7)

    def f(x: Tensor, scale: Tensor) -> Tensor:
        return (fake_quantize(x, scale, zero_point, *limits) * normal(3, 40, seed=1)).sum()

    gradient_x, gradient_scale = torch.autograd.grad(f(x, scale), (x, scale))
    h = 1e-6
    for value, gradient in ((x, gradient_x), (scale, gradient_scale * (40 * limits[1]) ** 0.5)):
        for index in range(value.numel()):
            step = torch.zeros_like(value).flatten()
            step[index] = h
            ends = [
                f(*(v + sign * step.reshape(v.shape) if v is value else v for v in (x, scale)))
                for sign in (1, -1)
            ]
            numeric = (ends[0] - ends[1]).detach() / (2 * h)
            assert_close(gradient.flatten()[index], numeric, rtol=1e-5, atol=1e-6)
    assert 0 < int((gradient_x == 0).sum()) < x.numel()


@pytest.mark.parametrize("zero_point", [None, torch.tensor([2])])
def test_one_node_does_what_its_parts_do(zero_point: Tensor | None) -> None:
    """Division, clip, rounding, product and choice as separate operations are the reference."""
    x, kept = normal(6, 50), normal(6, 50, seed=2) > 0.4
    scale = torch.tensor([0.3])
    low, high = (0, 7) if zero_point is None else (0 - zero_point, 7 - zero_point)

    def parts(x: Tensor, scale: Tensor) -> Tensor:
        u = torch.clamp(x / scale, *(torch.as_tensor(v).float() for v in (low, high)))
        return torch.where(kept, x, (u + (u.round() - u).detach()) * scale)

    found = []
    for function in (parts, lambda x, scale: straight_through(x, scale, low, high, kept=kept)):
        ends = (x.clone().requires_grad_(), scale.clone().requires_grad_())
        y = function(*ends)
        found.append((y, *torch.autograd.grad((y * normal(6, 50, seed=1)).sum(), ends)))
    for expected, got in zip(*found, strict=True):
        assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert_close(fake_quantize(x, scale, zero_point, 0, 7, kept), found[1][0].detach(), rtol=0, atol=0)


def test_gradient_of_the_step_is_lsqs() -> None:
    x = normal(6, 50)
    quantizer = ActivationQuantizer(bits=3, signed=True, scale=torch.tensor(0.3))
    assert not quantizer.scale.requires_grad
    quantizer.scale.requires_grad_()
    weights = normal(6, 50, seed=1)
    (quantizer(x) * weights).sum().backward()
    u = x / 0.3
    per_element = torch.where(u <= -4, -4.0, torch.where(u >= 3, 3.0, u.round() - u))
    assert_close(quantizer.scale.grad, (weights * per_element).sum()[None] / (300 * 3) ** 0.5)
    with torch.no_grad():
        plain = quantizer(x)
    assert_close(quantizer(x).detach(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_casts_spare_the_scale(dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(bits=8, signed=True, scale=torch.tensor(0.0123456))
    before = quantizer.scale.clone()
    x = normal(4, 8)
    cast = copy.deepcopy(quantizer).to(dtype)
    assert cast.scale.dtype is torch.float32
    assert torch.equal(cast.scale, before)
    assert cast(x.to(dtype)).dtype is dtype
    assert_close(cast(x.to(dtype)).float(), quantizer(x), rtol=0.01, atol=0.013)


@pytest.mark.parametrize("kind", ["static", "zero point", "dynamic"])
def test_storage_returns_the_same(kind: str) -> None:
    settings = {
        "static": {"signed": True, "scale": torch.rand(3, 1, 1) + 0.1, "granularity": Granularity.channel},
        "zero point": {"signed": False, "scale": torch.rand(1) + 0.1, "zero_point": torch.tensor([3])},
        "dynamic": {"signed": False, "granularity": Granularity.token, "token_dims": 3},
    }[kind]
    quantizer = ActivationQuantizer(bits=4, **settings)
    again = ActivationQuantizer.from_storage(dict(quantizer.state_dict()), quantizer.facts())
    x = normal(2, 3, 4, 4)
    assert torch.equal(again(x), quantizer(x))
    assert again.state_dict().keys() == quantizer.state_dict().keys()
    assert quantizer.storage_bits() == {"static": 96, "zero point": 64, "dynamic": 0}[kind]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0, "scale": torch.ones(1)}, "from 1 to 16; got 0"),
        ({"scale": None}, "every other one needs them; got tensor with scale=None"),
        ({"granularity": Granularity.token, "scale": torch.ones(1)}, r"takes none.*token with scale=\[1\]"),
        ({"scale": torch.ones(1), "zero_point": torch.ones(1)}, "unsigned codes"),
        ({"scale": torch.zeros(1)}, "positive and finite"),
    ],
    ids=["bits", "no scale", "dynamic scale", "signed zero point", "zero scale"],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        ActivationQuantizer(**{"bits": 4, "signed": True, **settings})
