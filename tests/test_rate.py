"""The search for a stored rate."""

from __future__ import annotations

import pytest
import torch

from ptq.errors import InputError
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


@pytest.mark.parametrize("shape", [(1, 5, 1), (1, 1, 1), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("method", "grid"), [("gptq", "entropy"), ("watersic", "entropy_columns")])
def test_a_tiny_layer_keeps_its_weights(choice, method: str, grid: str, shape: tuple[int, int, int]) -> None:
    """Its step alone is beyond the rate, and so few bits are nothing to the model."""
    problem = random_problem(shape[1], shape[2], groups=shape[0], dtype=torch.float32)
    codes, fitted = quantize_to_rate(choice("method", method), problem, choice("grid", grid), 3, None)
    assert problem.relative_error(fitted.values(codes)) < 0.35
    assert sum(fitted.storage_bits(codes).values()) <= 16 + 32 + 4 * codes.numel()


@pytest.mark.parametrize(("method", "grid"), [("awq", "entropy"), ("watersic_paper", "entropy_columns")])
def test_a_rate_below_the_parameters_is_refused(choice, method: str, grid: str) -> None:
    problem = random_problem(1, 9, groups=96, dtype=torch.float32)
    solver = choice("method", method, **({"exponents": 2, "shrink": []} if method == "awq" else {}))
    with pytest.raises(
        InputError, match=r"^1\.5 bits a weight must cover.*take 1\d\.\d+ with 96 groups.*use a"
    ):
        quantize_to_rate(solver, problem, choice("grid", grid), 1.5, None)
