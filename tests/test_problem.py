"""The layer problem: its error, the float-path target, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.problem import LayerProblem


def inputs(seed: int, tokens: int = 50, features: int = 6) -> torch.Tensor:
    return (
        torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        + 0.5
    )


def test_error_is_the_output_error() -> None:
    X, W, W_hat = inputs(0), inputs(1, 4), inputs(2, 4)
    problem = LayerProblem("layer", W, X.T @ X / 50)
    expected = (X @ (W - W_hat).T).square().sum(0) / 50
    assert_close(problem.error(W_hat[None])[0], expected)
    assert_close(problem.relative_error(W_hat[None]), float((X @ (W - W_hat).T).norm() / (X @ W.T).norm()))


def test_float_path_objective_differs_by_a_constant() -> None:
    X, X_float, W = inputs(0), inputs(0) + 0.1 * inputs(3), inputs(1, 4)
    problem = LayerProblem("layer", W, X.T @ X / 50, X_float.T @ X / 50, damping=0.0)
    differences = []
    for seed in (4, 5, 6):
        W_hat = inputs(seed, 4)
        wanted = (X_float @ W.T - X @ W_hat.T).square().sum() / 50
        differences.append(float(wanted - problem.error(W_hat[None]).sum()))
    assert_close(differences[1:], differences[:1] * 2)


def test_same_inputs_on_both_paths_leave_the_weights_alone() -> None:
    X, W = inputs(0), inputs(1, 4)
    H = X.T @ X / 50
    assert_close(LayerProblem("layer", W, H, H, damping=0.1).T[0], W)
    dead = torch.zeros_like(H)
    assert_close(LayerProblem("layer", W, dead, dead).T[0], W)


@pytest.mark.parametrize("where", ["weights", "input statistics"])
def test_nan_is_named(where: str) -> None:
    W, H = torch.ones(3, 4), torch.eye(4)
    (W if where == "weights" else H)[0, 0] = float("nan")
    with pytest.raises(InputError, match=f"'blocks.7.fc1'.*{where}"):
        LayerProblem("blocks.7.fc1", W, H)


def test_shapes_that_disagree() -> None:
    with pytest.raises(InputError, match=r"H must be \[1, 4, 4\]"):
        LayerProblem("layer", torch.ones(3, 4), torch.eye(5))
