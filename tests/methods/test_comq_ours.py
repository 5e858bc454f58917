"""Our COMQ on a layer of the benchmark's kind: what each part buys, on the inputs it saw and on others."""

from __future__ import annotations

import pytest
import torch

from experiments.benchmark import gram, seeded_layer
from ptq.errors import InputError
from ptq.problem import LayerProblem, shrunk
from tests.conftest import random_problem

SIZE, TOKENS = 160, 640


@pytest.fixture(scope="module")
def layer() -> tuple[LayerProblem, LayerProblem]:
    """The same weights on the calibration inputs and on the held-out ones."""
    W, X, X_held_out = seeded_layer(SIZE, TOKENS)
    return LayerProblem("layer", W, gram(X)), LayerProblem("held out", W, gram(X_held_out))


def errors(choice, layer, name: str, grid: str, bits: int, **overrides) -> torch.Tensor:
    """Relative error on the calibration inputs and on the others, [2]."""
    method, spec = choice("method", name, **overrides), choice("grid", grid)
    codes, fitted = method.quantize_layer(layer[0], spec, bits, None)
    return torch.tensor([problem.relative_error(fitted.values(codes)) for problem in layer])


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_quick_is_ahead_of_decoupleq_and_more_work_pays(choice, layer, bits: int) -> None:
    released = errors(choice, layer, "decoupleq_release", "decoupleq_release", bits)
    quick = errors(choice, layer, "comq_fast", "affine_float", bits)
    usual = errors(choice, layer, "comq", "affine_float", bits)
    thorough = errors(choice, layer, "comq_thorough", "affine_float", bits, sweeps=3, candidates=4)
    assert bool((quick < 0.98 * released).all())
    assert thorough[0] < usual[0] < quick[0]
    assert thorough[1] < quick[1]


@pytest.mark.parametrize("bits", [3, 2])
def test_free_levels_are_ahead_of_even_ones(choice, layer, bits: int) -> None:
    even = errors(choice, layer, "comq", "affine_float", bits)
    free = errors(choice, layer, "comq_codebook", "codebook_quick", bits)
    assert bool((free < even).all())


def test_shrinkage_lowers_the_error_on_other_inputs(choice, layer) -> None:
    plain, less = (errors(choice, layer, "comq", "affine_float", 2, shrinkage=s) for s in (0.0, 0.05))
    assert less[1] < 0.99 * plain[1]


def test_shrinkage_divides_every_correlation_and_keeps_the_target() -> None:
    problem = random_problem(3, 7, groups=2)
    before = problem.H.clone()
    less = shrunk(problem, 0.25)

    def correlation(H: torch.Tensor) -> torch.Tensor:
        scale = H.diagonal(dim1=-2, dim2=-1).rsqrt()
        return (H * scale[..., None] * scale[:, None]).masked_fill(torch.eye(7, dtype=torch.bool), 0)

    torch.testing.assert_close(correlation(less.H), correlation(problem.H) / 1.25)
    assert torch.equal(less.T, problem.T)
    assert torch.equal(problem.H, before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shrinkage": -0.1}, "shrinkage must not be negative; got -0.1"),
        ({"candidates": -1}, "candidates must not be negative; got -1"),
        ({"factors": []}, "factors needs one positive factor"),
        ({"factors": [1.0, 0.0]}, "factors needs one positive factor"),
        ({"search_refits": -1}, "search_refits must not be negative"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_hyperparameters(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("method", "comq", **overrides)
