"""Shared fixtures: the golden layer, and a private folder for what jobs write."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq.config import build, load_choice
from ptq.problem import LayerProblem

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, in the jobs it starts too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "layer_small.npz"


class Golden:
    """The golden layer in float64 and the stored results."""

    def __init__(self) -> None:
        stored = np.load(GOLDEN, allow_pickle=False)
        self.results = {k: torch.tensor(stored[k]).double() for k in stored.files if k not in ("W", "X")}
        self.W, self.X = (torch.tensor(stored[k]).double() for k in ("W", "X"))
        self.H = self.X.T @ self.X / len(self.X)
        self.problem = LayerProblem("golden", self.W, self.H)

    def error(self, W_hat: Tensor) -> float:
        """‖X(W − Ŵ)ᵀ‖_F / ‖XWᵀ‖_F, from X itself."""
        return float((self.X @ (self.W - W_hat).T).norm() / (self.X @ self.W.T).norm())


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture
def choice():
    """choice("method", "comq", sweeps=1) builds an object of conf/ with overrides."""
    return lambda group, name, **overrides: build(load_choice(group, name, **overrides), group)


def random_problem(
    out: int, inputs: int, *, groups: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64
) -> LayerProblem:
    """Correlated inputs with a non-zero mean, weights of unequal size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    X = normal(groups, 8 * inputs, inputs) @ normal(groups, inputs, inputs) / inputs**0.5 + 0.3 * normal(
        groups, 1, inputs
    )
    W = normal(groups, out, inputs) * normal(groups, out, 1).abs().add(0.1)
    return LayerProblem("random", W, (X.mT @ X / X.shape[1]).double())
