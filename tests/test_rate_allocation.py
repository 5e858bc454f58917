"""One budget for all layers: equal slopes, rates met by the file, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptq.allocation import Allocation
from ptq.calibration import NoCalibration
from ptq.errors import InputError
from ptq.limit import GaussianLimit
from ptq.models.adapter import ModelAdapter
from ptq.pipeline import quantize
from ptq.rate_allocation import LOWEST_RATE, MOST_SHIFT, SLACK, Budget, Source, equal_slopes, measure
from tests.conftest import random_problem


def source(weight: float, seed: int = 0, out: int = 30, width: int = 20) -> Source:
    problem = random_problem(out, width, seed=seed)
    return Source(limit=GaussianLimit(problem.H, problem.W), weight=weight)


def mean(rates: dict[str, float], counts: dict[str, int]) -> float:
    return sum(rates[n] * counts[n] for n in rates) / sum(counts.values())


def test_four_times_the_weight_is_one_bit_more() -> None:
    """½ log2 of the weight at high rates."""
    rates = equal_slopes({"a": source(1.0), "b": source(4.0)}, {"a": 600, "b": 600}, 8.0, 16)
    assert rates["b"] - rates["a"] == pytest.approx(1.0, abs=1e-6)
    assert mean(rates, {"a": 600, "b": 600}) == pytest.approx(8.0, abs=1e-6)


@pytest.mark.parametrize("target", [0.3, 1.0, 2.5])
def test_no_shift_between_layers_lowers_the_weighted_error(target: float) -> None:
    sources = {"a": source(1.0), "b": source(9.0, seed=1, out=40), "c": source(0.1, seed=2, width=33)}
    sources["c"] = Source(limit=sources["c"].limit, weight=0.1, removal=0.5 * sources["c"].limit.energy)
    counts = {n: s.limit.count for n, s in sources.items()}
    rates = equal_slopes(sources, counts, target, 16)
    assert mean(rates, counts) == pytest.approx(target, abs=1e-6)

    def loss(rates: dict[str, float]) -> float:
        total = 0.0
        for n, s in sources.items():
            distortion = s.limit.energy * float(s.limit.error(torch.tensor(rates[n]))) ** 2
            total += s.weight * distortion + s.removal * (distortion / s.limit.model_energy) ** 2
        return total

    best = loss(rates)
    for giver in rates:
        for taker in rates:
            if giver != taker and rates[giver] > LOWEST_RATE + 0.1:
                moved = dict(rates)
                moved[giver] -= 0.05
                moved[taker] += 0.05 * counts[giver] / counts[taker]
                assert loss(moved) > best


def test_layers_that_cost_nothing_get_the_least_and_none_gets_more_than_the_most() -> None:
    counts = {"a": 600, "b": 600}
    rates = equal_slopes({"a": source(0.0), "b": source(1.0)}, counts, 2.0, 16)
    assert rates["a"] == pytest.approx(LOWEST_RATE, abs=1e-6)
    rates = equal_slopes({"a": source(1.0), "b": source(1e9)}, counts, 6.0, 9)
    assert rates["b"] == pytest.approx(9)
    assert mean(rates, counts) == pytest.approx(6.0, abs=1e-6)


def test_a_layer_that_cannot_be_missed_keeps_some_rate() -> None:
    """Though its noise costs nothing."""
    counts = {"a": 600, "b": 600}
    limit = source(1.0).limit
    sources = {"a": Source(limit=limit, weight=0.0, removal=limit.energy), "b": source(1.0)}
    assert 0.2 < equal_slopes(sources, counts, 1.0, 16)["a"] < 1.0


@pytest.mark.parametrize("mean_rate", [2.0, 3.3])
def test_rates_of_layers_are_the_budget_to_the_bit(mean_rate: float) -> None:
    """Of 6 million weights, as planned and as it is passed on when layers miss their rates."""
    counts = {f"layer{k}": 10**6 + 1000 * k for k in range(6)}
    sources = {name: source(4.0**-k) for k, name in enumerate(counts)}
    rates = equal_slopes(sources, counts, mean_rate, 16)
    wanted = mean_rate * sum(counts.values())
    assert abs(sum(rates[name] * counts[name] for name in counts) - wanted) < 1
    assert len({round(rate, 3) for rate in rates.values()}) > 3
    budget, spent = Budget(rates=rates, counts=counts, most_bits=16), 0
    for k, name in enumerate(counts):
        asked = budget.ask(name, 7) * counts[name]
        spent += round(asked + (0 if k == 5 else (-1) ** k * 900))  # all but the last one miss
        budget.spend(name, round(asked + (0 if k == 5 else (-1) ** k * 900)))
    assert abs(spent - wanted) < 2


def test_what_a_layer_misses_goes_to_those_after_it() -> None:
    budget = Budget(rates={"a": 2.0, "b": 1.0, "c": 1.0}, counts={"a": 100, "b": 50, "c": 50}, most_bits=16)
    assert budget.ask("a", 7) == 2.0
    budget.spend("a", 190)
    assert budget.ask("outside", 7) == 7
    budget.spend("outside", 10**6)
    assert budget.ask("b", 7, trained=True) == pytest.approx(1.1 - SLACK * 200 / 100)
    budget.spend("b", 55)
    assert budget.ask("c", 7, trained=True) == pytest.approx(1.1 - SLACK * 200 / 50)


@pytest.mark.parametrize("missed", [-144, 0, 20, 250, 700])
def test_a_small_last_layer_does_not_pay_for_what_a_large_one_missed(missed: int) -> None:
    """Its rate moves by little unless the total would miss by more than 0.002 bit."""
    counts = {"large": 200_000, "last": 640}
    budget = Budget(rates=dict.fromkeys(counts, 1.5), counts=counts, most_bits=16)
    budget.spend("large", 300_000 + missed)
    asked = budget.ask("last", 7)
    total = (300_000 + missed + 640 * asked) / 200_640
    assert abs(total - 1.5) <= SLACK + 1e-9
    assert abs(asked - 1.5) <= MOST_SHIFT + 1e-9 or abs(total - 1.5) == pytest.approx(SLACK)
    assert (asked < 1.5) == (missed > 0)


def test_what_training_adds_is_paid_for_and_expected() -> None:
    counts = {"a": 100, "b": 50, "c": 50}
    budget = Budget(rates=dict.fromkeys(counts, 2.0), counts=counts, most_bits=16)
    budget.spend("a", 200)
    budget.grow("a", 10)
    # a's debt, and what b will grow by
    assert budget.ask("b", 7, trained=True) == pytest.approx(2.0 - (10 - SLACK * 200) / 100 - 0.1)
    budget.spend("b", 90)
    budget.grow("b", 5)
    after = 2.0 - (5 - SLACK * 200) / 50 - 0.1
    assert budget.ask("c", 7, trained=True) == pytest.approx(after)
    budget.grow("outside", 10**6)
    assert budget.ask("c", 7, trained=True) == pytest.approx(after)


def test_what_a_layer_is_to_grow_by_does_not_go_to_others_of_its_unit() -> None:
    counts = {"a": 1000, "b": 100, "c": 100}
    budget = Budget(rates=dict.fromkeys(counts, 2.0), counts=counts, most_bits=16)
    budget.spend("a", 1800)
    budget.grow("a", 200)
    for name in ("b", "c"):  # one unit: both are quantized, then both are trained
        assert budget.ask(name, 7, trained=True) == pytest.approx(1.8)
        budget.spend(name, 180)
    for name in ("b", "c"):
        budget.grow(name, 20)
    assert budget.carried == pytest.approx(0)


def test_a_layer_that_is_not_trained_is_not_expected_to_grow() -> None:
    budget = Budget(rates={"a": 2.0, "b": 2.0}, counts={"a": 100, "b": 100}, most_bits=16)
    budget.spend("a", 180)
    budget.grow("a", 20)
    assert budget.ask("b", 7) == pytest.approx(2)


class Scaled(nn.Module):
    """Two like layers side by side; the outputs of the second count `gain` times as much."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 32, bias=False), nn.Linear(24, 32, bias=False)
        self.b.weight = nn.Parameter(self.a.weight.detach().clone())
        self.head = nn.Linear(64, 5)
        with torch.no_grad():
            self.head.weight[:, 32:] = gain * self.head.weight[:, :32]
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], -1))


def scaled(gain: float) -> tuple[ModelAdapter, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, X = Scaled(gain).eval(), torch.randn(256, 24)
    return ModelAdapter(name="m", module=module, task="any", forward=lambda m, x: m(x)), X


def test_the_network_loss_sees_what_an_output_counts_and_the_layer_error_does_not() -> None:
    adapter, X = scaled(3.0)
    parameters = [p.clone() for p in adapter.module.parameters()]
    by_loss = measure(adapter, [X], ["a", "b"], Allocation.network_loss, 256, 0)
    assert by_loss["b"].weight == pytest.approx(9 * by_loss["a"].weight, rel=1e-4)
    by_error = measure(adapter, [X], ["a", "b"], Allocation.layer_error, 256, 0)
    assert by_error["b"].weight == pytest.approx(by_error["a"].weight)
    for before, after in zip(parameters, adapter.module.parameters(), strict=True):
        assert torch.equal(before, after)
        assert after.grad is None


def test_the_network_loss_is_half_the_weighted_error() -> None:
    """Against the divergence itself, for small errors of the weight with covariance H⁻¹."""
    adapter, X = scaled(1.0)
    weight = measure(adapter, [X], ["a"], Allocation.network_loss, 256, 0)["a"].weight
    generator = torch.Generator().manual_seed(1)
    whiten = torch.linalg.inv(torch.linalg.cholesky(X.T @ X / len(X)))
    with torch.no_grad():
        reference = adapter.forward(adapter.module, X).log_softmax(-1)
        divergences = []
        for _ in range(20):
            error = 0.01 * torch.randn(32, 24, generator=generator) @ whiten
            handle = adapter.module.a.register_forward_hook(lambda m, i, y, e=error: y + i[0] @ e.T)
            moved = adapter.forward(adapter.module, X).log_softmax(-1)
            handle.remove()
            divergences.append(float((reference.exp() * (reference - moved)).sum(-1).mean()))
    expected = weight * 32 * 24 * 0.01**2
    assert sum(divergences) / 20 == pytest.approx(expected, rel=0.15)


def images() -> tuple[ModelAdapter, torch.Tensor]:
    """A small network of two convolutions and a head, and what it sees."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 24, 3),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, stride=4, groups=24),
            nn.Flatten(),
            nn.Linear(96, 10),
        ).eval()
        X = torch.randn(64, 3, 12, 12)
    return ModelAdapter(name="m", module=module, task="any", forward=lambda m, x: m(x)), X


@pytest.mark.parametrize("first_last", [None, 2.5])
@pytest.mark.parametrize("allocation", ["equal_rate", "layer_error", "network_loss"])
def test_the_file_meets_the_budget(choice, allocation: str, first_last: float | None) -> None:
    adapter, X = images()
    report = quantize(
        adapter,
        [X],
        method=choice("method", "watersic"),
        grid=choice("grid", "entropy_columns", allocation=allocation),
        bits=choice("bits", "w2", weight=1.4 if first_last is None else 2.8, first_last=first_last),
        calibration=choice("calibration", "default", num_samples=64),
    )
    if first_last is not None:
        assert report.bits_per_coefficient()["total"] == pytest.approx(2.8, abs=0.01)
        assert [layer.bits for layer in report.layers][::2] == pytest.approx([2.5, 2.5], abs=0.02)
        return
    assert report.bits_per_coefficient()["total"] == pytest.approx(1.4, abs=0.005)
    rates = [layer.bits for layer in report.layers]
    assert max(rates) - min(rates) > 0.5 or allocation == "equal_rate"


@pytest.mark.parametrize("method", ["decoupleq", "awq", "comq", "brecq"])
def test_every_method_meets_the_budget(choice, method: str) -> None:
    """Layers whose codes jump over their rate, or are learned afterwards, are made up for by the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [layer for _ in range(4) for layer in (nn.Linear(40, 40), nn.ReLU())]
        module = nn.Sequential(*body, nn.Linear(40, 30)).eval()
        X = torch.randn(128, 40)
    trained = {"iterations": 30, "rounding_rate": 0.02} if method == "brecq" else {}
    report = quantize(
        ModelAdapter(name="m", module=module, task="any", forward=lambda m, x: m(x)),
        [X],
        method=choice("method", method, **trained),
        grid=choice("grid", "entropy"),
        bits=choice("bits", "w2", weight=2.5),
        calibration=choice("calibration", "default", num_samples=128),
    )
    assert report.bits_per_coefficient()["total"] == pytest.approx(2.5, abs=0.006)
    assert any(layer.grown_bits for layer in report.layers) == bool(trained)


def test_ends_that_take_the_whole_budget_are_refused(choice) -> None:
    adapter, X = images()
    with pytest.raises(InputError, match=r"bits\.weight=1\.4 is the mean of all.*take 2\.\d+ of it: raise"):
        quantize(
            adapter,
            [X],
            method=choice("method", "gptq"),
            grid=choice("grid", "entropy"),
            bits=choice("bits", "w2", weight=1.4, first_last=3.0),
            calibration=choice("calibration", "default", num_samples=64),
        )


def test_an_allocation_by_data_needs_data(choice) -> None:
    adapter, X = scaled(1.0)
    with pytest.raises(InputError, match=r"grid\.allocation=network_loss measures layers"):
        quantize(
            adapter,
            [X],
            method=choice("method", "rtn"),
            grid=choice("grid", "entropy", allocation="network_loss"),
            bits=choice("bits", "w2"),
            calibration=NoCalibration(),
        )
