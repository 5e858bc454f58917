"""AdaRound on stored inputs, AdaRound on the Gram, and codes learned from a good start, on the seeded layer.

Command: python -m experiments.soft_rounding [--size 512] [--tokens 4096] [--bits 4 2] [--iterations 200]
The first two learn the same variables on the same grid with as many steps; the last row starts from the codes
of comq_fast, which stand alone above it, and takes a twentieth of the steps. Seconds are of this process's
processor time in this one run; read them as ratios. Errors are ‖(W − Ŵ) X‖ / ‖W X‖ with hard codes, on the
calibration inputs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from experiments.benchmark import gram, seeded_layer
from ptq.config import build, load_choice
from ptq.grids.grid import Grid
from ptq.problem import LayerProblem
from ptq.solvers.soft_rounding import Softening, relax


def sampled(
    problem: LayerProblem,
    X: Tensor,
    grid: Grid,
    softening: Softening,
    *,
    iterations: int,
    rate: float,
    batch_tokens: int,
) -> Tensor:
    """Codes by AdaRound as usually written: each step takes a batch of the stored inputs X [tokens, in]."""
    rounding = relax(softening, grid, problem.T, grid.round(problem.T))
    optimizer = torch.optim.Adam([rounding.V.requires_grad_(True)], lr=rate)
    generator = torch.Generator().manual_seed(0)
    for step in range(iterations):
        batch = X[torch.randperm(len(X), generator=generator)[:batch_tokens]]
        difference = batch @ (rounding.values(grid)[0] - problem.T[0]).T
        loss = difference.square().sum(-1).mean()
        extra = rounding.regulariser(step / iterations)
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
    return rounding.codes(grid)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of one run, and its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def table(size: int, tokens: int, bits: int, iterations: int, batch_tokens: int) -> pd.DataFrame:
    """One row a way."""
    W, X, _ = seeded_layer(size, tokens)
    problem = LayerProblem("benchmark", W, gram(X))
    spec = build(load_choice("grid", "affine_mse"))
    rate = 10.0 / iterations  # published: 1e-3 for ten thousand steps
    grid = spec.fit(problem.T, bits, None, problem.H)
    adaround = build(load_choice("method", "adaround", iterations=iterations, rounding_rate=rate))
    softening = adaround.recipe().softening
    seconds, codes = timed(
        lambda: sampled(
            problem, X, grid, softening, iterations=iterations, rate=rate, batch_tokens=batch_tokens
        )
    )
    nearest = problem.relative_error(grid.values(grid.round(problem.T)))
    rows = [
        ("nearest", 0.0, nearest),
        ("sampled inputs", seconds, problem.relative_error(grid.values(codes))),
    ]
    changes = {"start": "comq_fast", "iterations": max(1, iterations // 20), "rounding_rate": 0.002}
    recipe = load_choice(
        "method",
        "adaround",
        **changes,
        relaxation="full_range",
        variables=["rounding", "grid"],
        schedule="cosine",
        keep_best=True,
    )
    for name, method, own in (
        ("Gram", adaround, spec),
        ("COMQ alone", build(load_choice("method", "comq_fast")), build(load_choice("grid", "affine_float"))),
        ("Gram, from COMQ", build(recipe), build(load_choice("grid", "affine_float"))),
    ):
        seconds, (codes, fitted) = timed(
            lambda method=method, own=own: method.quantize_layer(problem, own, bits, None)
        )
        rows.append((name, seconds, problem.relative_error(fitted.values(codes))))
    result = pd.DataFrame(rows, columns=["way", "seconds", "error"])
    result["times faster"] = rows[1][1] / result["seconds"]
    result.insert(0, "bits", bits)
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="32 images of 64 positions")
    options = parser.parse_args()
    parts = [
        table(options.size, options.tokens, bits, options.iterations, options.batch_tokens)
        for bits in options.bits
    ]
    print(pd.concat(parts).to_markdown(index=False, floatfmt=("", "", ".2f", ".4f", ".1f")))


if __name__ == "__main__":
    main()
