"""What the scores say where the truth is known: dead layers, layers that matter more, a model by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ptq import importance
from ptq.grids.grid import Grid
from ptq.importance import FloatNetwork, Score, costs, divergence, limited
from ptq.models.adapter import ModelAdapter
from ptq.problem import LayerProblem

WIDTHS = [2, 3, 4, 8]
GRADIENTS = [Score.taylor, Score.integrated_gradient, Score.fisher, Score.hessian, Score.output_fisher]


class Branches(nn.Module):
    """A convolution, two equal branches of which one is multiplied by `gain`, and a head."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).mean((2, 3))
        return self.head(torch.tanh(self.left(x)) + self.gain * torch.tanh(self.right(x)))


def network(gain: float) -> FloatNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Branches(gain).eval()
        module.right.load_state_dict(module.left.state_dict())
        nn.init.normal_(module.head.weight)
        batches: list[Any] = list(torch.randn(96, 2, 5, 5).split(32))
    adapter = ModelAdapter(name="branches", module=module, task="any", forward=lambda m, x: m(x))
    return FloatNetwork(adapter=adapter, module=module, batches=batches, positions_per_image=None, seed=0)


NAMES = ["stem", "left", "right", "head"]


@pytest.fixture
def nearest(choice):
    spec = choice("grid", "affine")

    def rounding(problem: LayerProblem, width: float) -> tuple[Tensor, Grid]:
        grid = spec.fit(problem.W, width)
        return grid.round(problem.W), grid

    return rounding


def found(score: Score, net: FloatNetwork, rounding: Any) -> dict[str, Tensor]:
    return costs(score, net, NAMES, WIDTHS, rounding, needs_gram=False)


@pytest.mark.parametrize("score", list(Score), ids=lambda s: s.value)
def test_costs_fall_with_bits_and_nothing_is_changed(score: Score, nearest) -> None:
    net = network(1.0)
    before = {k: v.clone() for k, v in net.module.state_dict().items()}
    cost = found(score, net, nearest)
    assert list(cost) == NAMES
    assert cost["stem"].shape == (4, 1, 6)
    for c in cost.values():
        totals = c.sum((1, 2)).tolist()
        assert totals == sorted(totals, reverse=True)
        assert totals[-1] < 0.1 * totals[0]
    assert all(torch.equal(v, before[k]) for k, v in net.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.module.parameters())
    assert isinstance(net.module.left, nn.Linear)
    again = found(score, net, nearest)
    assert all(torch.equal(cost[n], again[n]) for n in NAMES)


@pytest.mark.parametrize("score", [*GRADIENTS, Score.probe], ids=lambda s: s.value)
def test_a_layer_that_cannot_be_seen_costs_nothing(score: Score, nearest) -> None:
    cost = found(score, network(0.0), nearest)
    assert float(cost["right"].abs().max()) < 1e-9
    assert float(cost["left"].sum()) > 1e-5


@pytest.mark.parametrize("score", [*GRADIENTS, Score.probe], ids=lambda s: s.value)
def test_the_branch_that_is_amplified_costs_more(score: Score, nearest) -> None:
    cost = found(score, network(4.0), nearest)
    assert float(cost["right"][0].sum()) > 2 * float(cost["left"][0].sum())


@pytest.mark.parametrize("score", [Score.weight_error, Score.output_error], ids=lambda s: s.value)
def test_scores_of_the_layer_alone_see_no_difference(score: Score, nearest) -> None:
    cost = found(score, network(4.0), nearest)
    assert_close(cost["right"], cost["left"])


@pytest.mark.parametrize("score", [Score.fisher, Score.output_fisher, Score.hessian], ids=lambda s: s.value)
def test_second_order_scores_foretell_the_divergence(score: Score, nearest) -> None:
    """Of one linear layer with small errors, to second order; correlations of errors are left out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 4))
        batch = torch.randn(4096, 6)
    adapter = ModelAdapter(name="line", module=module, task="any", forward=lambda m, x: m(x))
    net = FloatNetwork(adapter=adapter, module=module, batches=[batch], positions_per_image=None, seed=0)
    foretold, truth = (
        costs(s, net, ["0"], [4, 5], nearest, needs_gram=False)["0"].sum((1, 2)) for s in (score, Score.probe)
    )
    ratio = foretold / (2 * len(batch) * truth)
    assert bool(((ratio > 0.4) & (ratio < 2.5)).all()), ratio


def test_hutchinsons_trace_is_the_trace(nearest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "TRACE_DRAWS", 300)
    net = network(1.0)
    net = replace(net, batches=[torch.cat(net.batches)])
    with torch.no_grad():
        x = torch.relu(net.module.stem(net.batches[0])).mean((2, 3))
        x = torch.tanh(net.module.left(x)) + torch.tanh(net.module.right(x))
        p = net.module.head(x).softmax(-1)
    # the Hessian of KL in the logits is diag(p) − p pᵀ, and the logits are linear in the head's weight
    trace = float(((p - p * p).sum(-1) * x.square().sum(-1)).sum())
    W = net.module.head.weight.detach()[None]
    codes, grid = nearest(LayerProblem("head", W, torch.eye(6)[None]), 2)
    error = float((W - grid.values(codes)).double().square().sum())
    cost = costs(Score.hessian, net, ["head"], [2], nearest, needs_gram=False)["head"]
    assert float(cost.sum()) == pytest.approx(trace / W.numel() * error, rel=0.1)


def test_divergence_by_hand() -> None:
    target = torch.tensor([[0.5, 0.5]]).log()
    logits = torch.tensor([[0.9, 0.1]]).log()
    # ½ ln(5∕9) + ½ ln 5
    assert float(divergence(target, logits)) == pytest.approx(0.5 * math.log(25 / 9))
    assert float(divergence(target, target + 3.0)) == pytest.approx(0, abs=1e-7)


def test_limited() -> None:
    batches = [torch.zeros(4, 2), torch.ones(4, 2), torch.ones(4, 2)]
    assert [len(b) for b in limited(batches, 6)] == [4, 2]
    assert [len(b) for b in limited(batches, 4)] == [4]
    pairs: list[Any] = [{"x": torch.zeros(3)}, {"x": torch.zeros(3)}, {"x": torch.zeros(3)}]
    assert len(limited(pairs, 4)) == 2
    assert len(limited(batches, 100)) == 3
