"""Observers: ranges of known distributions, agreement of the histogram with the data, signs, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ptq.activations import Granularity, fake_quantize, range_parameters
from ptq.config import choices
from ptq.errors import InputError
from ptq.observers import Histogram, InputObserver, Observer

LINEAR, CONVOLUTION = nn.Linear(6, 2), nn.Conv2d(6, 2, 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(choice, name: str, batches, layer: nn.Module = LINEAR, bits: int = 4, **overrides: object):
    observer = InputObserver(layer, choice("activations", name, **overrides), bits)
    for batch in batches:
        observer.add(batch)
    return observer.quantizer()


def ends(quantizer) -> tuple[Tensor, Tensor]:
    """The least and the largest value that an unsigned quantizer gives."""
    zero = 0 if quantizer.zero_point is None else quantizer.zero_point
    return -zero * quantizer.scale.detach(), (quantizer.code_max - zero) * quantizer.scale.detach()


def test_min_max_and_moving_average_are_exact(choice) -> None:
    batches = [normal(50, 6, seed=k) * (k + 1) for k in range(3)]
    low, high = ends(observed(choice, "minmax", batches, bits=16))
    assert_close(high - low, torch.cat(batches).max() - torch.cat(batches).min()[None], rtol=1e-6, atol=0)
    low = high = None
    for batch in batches:
        now = (batch.min(), batch.max())
        low, high = now if low is None else (0.9 * low + 0.1 * now[0], 0.9 * high + 0.1 * now[1])
    found = ends(observed(choice, "ema", batches, bits=16))
    assert_close(found[1] - found[0], (high - low)[None], rtol=1e-5, atol=0)


def test_percentiles_are_those_of_the_data(choice) -> None:
    x = normal(40_000, 6)
    low, high = ends(observed(choice, "percentile", x.split(5000), bits=16, percentile=99.0))
    assert_close(high, x.quantile(0.99)[None], rtol=0.01, atol=0)
    assert_close(low, torch.tensor([-2.3263]), rtol=0.02, atol=0)  # of the normal distribution


@pytest.mark.parametrize(("bits", "clip"), [(2, 1.4936), (3, 2.0511), (4, 2.514)])
def test_least_error_range_of_a_normal_distribution(choice, bits: int, clip: float) -> None:
    """The optimal uniform quantizer of 2^bits levels reaches step · (2^bits − 1) / 2: Max, 1960, Table II."""
    x = normal(100_000, 6)
    quantizer = observed(choice, "mse", [x], bits=bits)
    assert quantizer.zero_point is not None
    # a level lies at zero, so the range is not quite Max's, which is symmetric
    low, high = ends(quantizer)
    assert float(high - low) / 2 == pytest.approx(clip, rel=0.12)
    x_hat = quantizer(x)
    best = min(
        float(
            (
                fake_quantize(
                    x, *range_parameters(a * torch.ones(1), b * torch.ones(1), bits, False), 0, 2**bits - 1
                )
                - x
            )
            .square()
            .mean()
        )
        for a in torch.linspace(-4, -0.5, 12)
        for b in torch.linspace(0.5, 4, 12)
    )
    assert float((x_hat - x).square().mean()) <= 1.01 * best


def test_histogram_counts_what_batches_hold_and_grows() -> None:
    batches = [normal(3, 500, seed=k) * 10.0**k for k in range(4)]
    batches[0][2] = 0
    histogram = Histogram(3, 64, torch.device("cpu"))
    for batch in batches:
        histogram.add(batch)
    x, edges = torch.cat(batches, 1), histogram.edges()
    for unit in range(3):
        inner = edges[unit].clone()
        inner[0], inner[-1] = -float("inf"), float("inf")
        expected = torch.histogram(x[unit].double(), inner.double()).hist
        # an edge moves by a rounding error at most
        assert float((histogram.counts[unit] - expected).abs().sum()) <= 4
    assert float(histogram.counts.sum()) == x.numel()


@pytest.mark.parametrize("name", [n for n in choices("activations") if n != "per_position"])
@pytest.mark.parametrize("layer", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def test_signs_follow_what_was_seen(choice, name: str, layer: nn.Module) -> None:
    x = normal(4, 6, 5, 5) if layer is CONVOLUTION else normal(4, 7, 6)
    dynamic = choice("activations", name).granularity is Granularity.token
    unsigned = observed(choice, name, [x.relu()], layer)
    assert not unsigned.signed
    assert unsigned.zero_point is None
    both = observed(choice, name, [x], layer)
    assert both.signed == (name == "symmetric")
    assert (both.zero_point is None) == (dynamic or both.signed)
    for quantizer, seen in ((unsigned, x.relu()), (both, x)):
        assert quantizer(seen).shape == seen.shape
        assert float((quantizer(seen) - seen).square().mean()) < 0.1 * float(seen.square().mean())


def test_shapes_of_scales(choice) -> None:
    image, tokens = normal(4, 6, 5, 5), normal(4, 7, 6)
    assert list(observed(choice, "per_channel", [image], CONVOLUTION).scale.shape) == [6, 1, 1]
    assert list(observed(choice, "per_channel", [tokens]).scale.shape) == [6]
    assert list(observed(choice, "per_position", [tokens]).scale.shape) == [7, 1]
    assert list(observed(choice, "per_position", [tokens[:, 0]]).scale.shape) == [1]
    assert list(observed(choice, "per_position", [normal(4, 3, 5, 6)]).scale.shape) == [3, 5, 1]


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse"])
def test_each_channel_has_its_own_range(choice, name: str) -> None:
    gains = torch.tensor([0.01, 0.1, 1, 10, 100, 0])
    quantizer = observed(choice, name, [normal(3000, 6) * gains])
    assert quantizer.scale.shape == (1,)
    quantizer = observed(choice, name, [normal(3000, 6) * gains], granularity="channel")
    alone = [observed(choice, name, [normal(3000, 6)[:, [k]] * gain]) for k, gain in enumerate(gains)]
    assert_close(
        quantizer.scale[:5].detach(), torch.cat([q.scale.detach() for q in alone[:5]]), rtol=0.01, atol=0
    )
    assert float(quantizer.scale[5]) == 1  # only zeros: any scale serves


def test_order_and_split_of_batches_do_not_matter_but_to_the_average(choice) -> None:
    x = normal(96, 6)
    for observer in Observer:
        one = observed(choice, "default", [x], observer=observer.value)
        many = observed(choice, "default", x.flip(0).split(7), observer=observer.value)
        same = bool(torch.isclose(one.scale, many.scale, rtol=0.02).all())
        assert same == (observer is not Observer.ema)


@pytest.mark.parametrize(
    ("name", "layer", "batches", "message"),
    [
        ("minmax", LINEAR, [torch.full((2, 6), float("nan"))], "NaN or infinity in its inputs"),
        ("mse", LINEAR, [], "no calibration input"),
        ("per_position", CONVOLUTION, [], "no token positions.*activation_skip"),
        (
            "per_position",
            LINEAR,
            [torch.ones(2, 3, 6), torch.ones(2, 4, 6)],
            r"one shape; got scales \[3, 1\]",
        ),
    ],
    ids=["nan", "no data", "convolution", "lengths"],
)
def test_what_cannot_be_observed_is_refused(
    choice, name: str, layer: nn.Module, batches, message: str
) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        observed(choice, name, batches, layer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\); got 1"),
        ({"percentile": 50.0}, "percentile must be in"),
        ({"min_shrink": 0.0}, "min_shrink in"),
        ({"bins": 18}, "multiple of 4"),
        ({"observer": "max"}, "ill-typed value for activations.observer"),
    ],
    ids=["decay", "percentile", "shrink", "bins", "enum"],
)
def test_wrong_settings(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("activations", "default", **overrides)
