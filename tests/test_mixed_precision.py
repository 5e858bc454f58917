"""Widths under a budget: met to the bit, exceptions kept, what cannot be is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq import checkpoint
from ptq.config import build, load_choice
from ptq.errors import InputError
from ptq.importance import Score
from ptq.layers import QuantizedLayer
from ptq.mixed_precision import MixedBits
from ptq.report import Report

OF_THE_NETWORK = [Score.taylor, Score.integrated_gradient, Score.fisher, Score.hessian, Score.output_fisher]


class Network(nn.Module):
    """Two convolutions, one of them in groups, a wide layer whose output hardly counts, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.wide = nn.Linear(12, 40)
        self.narrow = nn.Linear(12, 10)
        self.head = nn.Linear(50, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x)))).mean((2, 3))
        return self.head(torch.cat([0.001 * torch.relu(self.wide(x)), torch.relu(self.narrow(x))], -1))


@pytest.fixture(scope="module")
def network() -> tuple[Network, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Network().eval()
        for parameter in model.parameters():
            parameter.data *= 2.5
        return model, list(torch.randn(48, 3, 8, 8).split(16))


def mixed(**changes: Any) -> MixedBits:
    bits = build(load_choice("bits", "mixed", **changes), "bits")
    assert isinstance(bits, MixedBits)
    return bits


def quantized(
    network: tuple[Network, list[Tensor]], bits: Any, method: str = "gptq", **more: Any
) -> tuple[nn.Module, Report]:
    return ptq.quantize_model(*network, method=method, bits=bits, **more)


def stored(report: Report) -> int:
    return sum(sum(layer.storage_bits.values()) for layer in report.layers)


def weights(network: tuple[Network, list[Tensor]]) -> int:
    return sum(p.numel() for n, p in network[0].named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("rtn", {}),
        ("gptq", {}),
        ("comq", {}),
        ("awq", {}),
        ("adaround", {"iterations": 20}),
        ("gradient_ptq", {"iterations": 20}),
        ("tesseraq", {"iterations": 20, "start": "awq"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_budget_is_met_to_the_bit(network, method: str, more: dict, granularity: str) -> None:
    bits = mixed(granularity=granularity, budget=7.7, candidates=[2, 3, 4, 6, 8])
    _, report = quantized(network, bits, method, **more)
    facts = report.mixed_precision
    assert facts is not None
    assert facts["exact"]
    assert stored(report) <= 7.7 * weights(network)
    assert stored(report) == round(facts["bits_per_coefficient"] * weights(network))
    left = 7.7 * weights(network) - stored(report)  # buys no step of any layer, or of the shortest row
    if granularity == "channel":
        assert left < 2 * (10 + 1)
    for layer in report.layers if granularity == "layer" else []:
        wider = [b for b in bits.candidates if b > layer.bits]
        count = torch.Size(layer.shape).numel() + torch.Size(layer.shape[:2]).numel()
        assert not wider or left < (wider[0] - layer.bits) * count


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("score", OF_THE_NETWORK, ids=lambda s: s.value)
def test_a_layer_that_hardly_counts_gets_the_fewest_bits(network, score: Score, granularity: str) -> None:
    bits = mixed(score=score.value, granularity=granularity)
    _, report = quantized(network, bits, "rtn")
    width = {layer.name: layer.bits for layer in report.layers}
    assert width.pop("wide") < 2.1
    assert sum(width.values()) / len(width) > 2.9


def test_the_probe_and_the_method_itself_as_rounding(network) -> None:
    bits = mixed(score="probe", rounding="method")
    _, report = quantized(network, bits)
    width = {layer.name: layer.bits for layer in report.layers}
    assert width["wide"] == min(width.values()) == 2
    costs = report.mixed_precision["costs"]["stem"]
    assert costs[0] > costs[-1] > 0


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_mixed_beats_uniform_at_the_same_size(network, granularity: str) -> None:
    """Divergence of the outputs, and no more bits."""
    model, batches = network
    target = model(torch.cat(batches)).detach().log_softmax(-1)
    plain, plain_report = quantized(network, "w3")
    other, report = quantized(network, mixed(granularity=granularity))
    losses = [
        float((target.exp() * (target - m(torch.cat(batches)).log_softmax(-1))).sum(-1).mean())
        for m in (other, plain)
    ]
    assert losses[0] < 0.8 * losses[1]
    assert stored(report) <= stored(plain_report)


def test_exceptions_keep_their_width_and_count(network) -> None:
    for budget, width in ((7.0, 6), (8.0, 8)):
        bits = mixed(budget=budget, first_last=6, layers={"narr*": 5}, skip=["wide"], score="fisher")
        _, report = quantized(network, bits, "rtn")
        found = {layer.name: layer.bits for layer in report.layers}
        assert found == {"stem": 6, "grouped": width, "narrow": 5, "head": 6}
        assert stored(report) <= budget * (weights(network) - 480)
    everything = mixed(layers={"*": 3})
    _, report = quantized(network, everything, "rtn")
    assert {layer.bits for layer in report.layers} == {3}
    assert stored(report) == round(report.mixed_precision["budget"] * weights(network))


def test_uniform_costs_give_uniform_widths() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(5)))
        batches = [torch.randn(64, 16)]
    for layer in model[1:]:
        layer.load_state_dict(model[0].state_dict())
    bits = mixed(score="weight_error")
    _, report = ptq.quantize_model(model, batches, method="rtn", bits=bits)
    assert [layer.bits for layer in report.layers] == [3] * 5


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_saved_and_loaded(network, granularity: str, tmp_path) -> None:
    model, report = quantized(network, mixed(granularity=granularity))
    checkpoint.save(model, tmp_path)
    loaded = checkpoint.load(tmp_path, Network())
    x = network[1][0]
    assert torch.equal(loaded(x), model(x))
    padding = 8 * sum(len(m.packed) for m in model.modules() if isinstance(m, QuantizedLayer))
    assert stored(report) <= 8 * checkpoint.quantized_bytes(tmp_path) < stored(report) + padding


def test_same_seed_same_widths(network) -> None:
    first, again = (
        [layer.bits for layer in quantized(network, mixed(score="fisher"))[1].layers] for _ in range(2)
    )
    assert first == again


def test_other_grids(network) -> None:
    for grid in ("symmetric", "normal_float", "codebook_quick"):
        bits = mixed(budget=12.0 if grid == "codebook_quick" else 4.0, score="fisher")
        _, report = quantized(network, bits, "rtn", grid=grid)
        assert stored(report) <= report.mixed_precision["budget"] * weights(network)
        assert len({layer.bits for layer in report.layers}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": -1.0}, "bits.budget must be positive, or null; got -1"),
        ({"candidates": []}, r"bits.candidates must name one width or more.*got \[\]"),
        ({"candidates": [3, 2]}, r"positive and rising; got \[3, 2\]"),
        ({"samples": 0}, "bits.samples must be at least 1; got 0"),
        ({"score": "probe", "granularity": "channel"}, "a layer at a time, not each channel"),
        ({"score": "magic"}, "ill-typed value for bits.score"),
        ({"weight": 0}, "bits.weight must be positive; got 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_settings(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mixed(**changes)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, {"method": "rtn", "grid": "entropy"}, "codes of Entropy have none: their rate is any number"),
        ({}, {"method": "ptnq_paper"}, "PTNQ chooses its grid by trials at one width"),
        ({"granularity": "channel"}, {"method": "hqq"}, "HQQ works on .*; use bits.granularity=layer"),
        ({}, {"method": "rtn", "settings": "none"}, "bits.score=.* is measured on calibration samples"),
        ({"budget": 2.5}, {"method": "rtn"}, r"budget leaves \d+ bits for layers that take \d+ at 2 bits"),
        ({"candidates": [3, 17]}, {"method": "rtn"}, "integer from 1 to 16.*got 17"),
        ({"layers": {"nowhere": 3}}, {"method": "rtn"}, "bits names layer 'nowhere'"),
    ],
    ids=["entropy", "trials", "hqq", "no data", "budget", "width", "name"],
)
def test_what_cannot_be_is_refused(network, changes: dict, more: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantized(network, mixed(**changes), **more)


def test_without_data_the_weight_error_serves(network) -> None:
    bits = mixed(score="weight_error", budget=6.0)
    _, report = quantized(network, bits, "rtn", settings="none")
    assert 5.5 * weights(network) < stored(report) <= 6.0 * weights(network)
