"""Weights that learned rounding leaves between two codes: the warning, and what keeps them few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.layers import QuantizedLayer
from tests.methods.test_gradient_ptq import net, run

__all__ = ["net"]  # a fixture


@pytest.mark.parametrize("name", ["brecq", "adaround"])
def test_one_line_warns_of_weights_between_two_codes(net, caplog, name: str) -> None:
    decided = {"rounding_rate": 0.1, "regularisation": 0.1, "schedule": "constant"}
    run(net, name, iterations=200, **decided)
    run(net, name, iterations=5, relaxation="full_range")
    assert not caplog.records
    _, report = run(net, name, iterations=5)
    [line] = caplog.messages
    fractions = {t.unit: 100 * t.undecided for t in report.tuning if t.undecided is not None}
    worst = max(fractions, key=lambda unit: fractions[unit])
    mean = sum(fractions.values()) / len(fractions)
    assert f"up to {fractions[worst]:.0f} % of" in line
    assert f"(unit {worst}; mean over {len(fractions)} units: {mean:.0f} %)" in line
    assert "take more method.iterations, a larger method.rounding_rate or method.regularisation, or" in line


class Homogeneous(nn.Module):
    """Inputs a hundred times as large give outputs a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU())])
        self.head = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](x))


@pytest.mark.parametrize("unit", ["layer", "block", "network"])
def test_relative_regularisation_does_not_hang_on_the_size_of_outputs(unit: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = Homogeneous().eval(), torch.randn(64, 12)
    name = "adaround" if unit == "layer" else "brecq"
    settings = {
        "iterations": 200,
        "rounding_rate": 0.1,
        "batch_size": 64,
        "unit": unit,
        "float_target": False,
    }

    def learned(size: float, relative: bool) -> tuple[list[Tensor], float]:
        quantized, report = ptq.quantize_model(
            module,
            [size * x],
            name,
            bits=3,
            regularisation=0.03 if relative else 0.1,
            relative_regularisation=relative,
            **settings,
        )
        layers = [m for m in quantized.modules() if isinstance(m, QuantizedLayer)]
        undecided = max(t.undecided for t in report.tuning if t.undecided is not None)
        return [layer.grid_and_codes()[1] for layer in layers], undecided

    codes, undecided = learned(1.0, relative=True)
    large, also_undecided = learned(100.0, relative=True)
    assert max(undecided, also_undecided) < 0.05
    assert learned(100.0, relative=False)[1] > 0.1
    for a, b in zip(codes, large, strict=True):
        assert (a == b).double().mean() > 0.95
