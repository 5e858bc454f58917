"""The search for a stored rate."""

from __future__ import annotations

import pytest
import torch

from ptq.problem import LayerProblem
from ptq.rate import MOST_TRIALS, quantize_to_rate
from tests.conftest import random_problem


class Counting:
    """A method that counts its runs."""

    needs_gram = True

    def __init__(self, method) -> None:
        self.method, self.asked = method, []

    def quantize_layer(self, problem, grid, bits, group_size):
        self.asked.append(bits)
        return self.method.quantize_layer(problem, grid, bits, group_size)


def test_a_grid_of_fixed_width_is_fitted_once(choice) -> None:
    method = Counting(choice("method", "gptq"))
    quantize_to_rate(method, random_problem(9, 11), choice("grid", "affine"), 3, None)
    assert method.asked == [3]


@pytest.mark.parametrize("bits", [0.3, 1.0, 2.37, 5.0])
@pytest.mark.parametrize("case", ["gaussian", "heavy tails", "sparse"])
def test_few_trials_find_the_rate(choice, bits: float, case: str) -> None:
    problem = random_problem(300, 220, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(300, 220, generator=generator)
    if case == "heavy tails":
        W = W / torch.randn(300, 220, generator=generator).abs().clamp_min(0.01)
    elif case == "sparse":
        W = W * (torch.rand(300, 220, generator=generator) < 0.3)
    method = Counting(choice("method", "rtn"))
    problem = LayerProblem(case, W[None], problem.H)
    codes, grid = quantize_to_rate(method, problem, choice("grid", "entropy"), bits, None)
    assert abs(sum(grid.storage_bits(codes).values()) / codes.numel() - bits) <= 0.005
    assert len(method.asked) <= 8


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_layer_that_cannot_take_the_rate_ends_the_search(choice, value: float) -> None:
    problem = LayerProblem("constant", torch.full((1, 5, 12), value), random_problem(5, 12).H.float())
    method = Counting(choice("method", "gptq"))
    codes, grid = quantize_to_rate(method, problem, choice("grid", "entropy"), 8, None)
    assert len(method.asked) <= MOST_TRIALS
    assert problem.relative_error(grid.values(codes)) < 0.1
