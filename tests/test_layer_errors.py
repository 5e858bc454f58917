"""Recorded errors are those of the codes that layers end with, also where these are learned later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ptq
from ptq import layer_errors, walk
from ptq.limit import limit_bits
from ptq.problem import LayerProblem
from tests.test_resume import Net, X, net

LEARNED = {"iterations": 30, "batch_size": 8, "rounding_rate": 0.05}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "brecq": ("brecq", LEARNED),
    "network": (
        "gradient_ptq",
        {**LEARNED, "unit": "network", "loss": "l2", "augmentation": "none", "float_target": False},
    ),
    "block and tuned network": ("brecq", {**LEARNED, "tuning": "network"}),
    "tuned": ("comq", {"tuning": "block"}),
    "adaround": ("adaround", {"iterations": 30, "rounding_rate": 0.05}),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[LayerProblem, float]]:
    """The problem of each layer, and the error that its first codes have, as runs go along."""
    found: dict[str, tuple[LayerProblem, float]] = {}
    solve = walk.quantize_to_rate

    def spy(method: Any, problem: LayerProblem, *rest: Any) -> Any:
        codes, grid = solve(method, problem, *rest)
        found[problem.name] = problem, problem.relative_error(grid.values(codes))
        return codes, grid

    monkeypatch.setattr(walk, "quantize_to_rate", spy)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_error_is_that_of_the_final_codes(started, case: str) -> None:
    method, overrides = CASES[case]
    quantized, report = ptq.quantize_model(net(Net), X, method, None, 2, **overrides)
    assert len(report.layers) == 9
    moved = 0
    for layer in report.layers:
        problem, first = started[layer.name]
        grid, codes = quantized.get_submodule(layer.name).grid_and_codes()
        expected = problem.relative_error(grid.values(codes))
        assert layer.relative_error == expected
        assert layer.limit_bits == limit_bits(problem.H, problem.T, expected)
        moved += expected != first
    assert moved == 0 if case == "adaround" else moved > 4


def test_problems_are_kept_for_one_unit_only_or_as_far_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    keep = layer_errors.LayerErrors.keep

    def counted(self: layer_errors.LayerErrors, problem: LayerProblem) -> None:
        keep(self, problem)
        held.append(len(self._kept))

    monkeypatch.setattr(layer_errors.LayerErrors, "keep", counted)
    ptq.quantize_model(net(Net), X, "brecq", None, 2, **LEARNED)
    assert max(held) == 2  # the layers of a block
    held.clear()
    method, overrides = CASES["network"]
    ptq.quantize_model(net(Net), X, method, None, 2, **overrides)
    assert max(held) == 9
    held.clear()
    monkeypatch.setattr(layer_errors, "KEPT_BYTES", 1000)
    _, report = ptq.quantize_model(net(Net), X, method, None, 2, **overrides)
    assert not held
    assert report.tuning[0].kept
    assert all(layer.relative_error is layer.limit_bits is None for layer in report.layers)


def test_the_size_of_problems_counts_both_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(6, 9)
    monkeypatch.setattr(layer_errors, "KEPT_BYTES", 6 * 6 * 8 + 9 * 6 * 4)
    assert layer_errors.fits([layer])
    assert not layer_errors.fits([layer, torch.nn.Linear(1, 1)])
