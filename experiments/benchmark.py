"""Seconds and relative error of every method on seeded layers, and the cost of COMQ's plain formula beside
ours.

Command: python -m experiments.benchmark [--sizes 512 1024] [--tokens 4096] [--bits 3] [--methods rtn comq …]
Every time is the best of `--repeats` in this one run; read them as ratios. The unit is one matrix product
[out, in] × [in, in] in float32, below which no sweep over a layer can go.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ptq.config import build, choices, companion, load_choice
from ptq.problem import LayerProblem
from ptq.solvers.coordinate_descent import Order, coordinate_descent


def seeded_layer(size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """W [size, size] with every fifth row heavy-tailed, X [tokens, size] correlated with a non-zero mean."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator)
    W[::5] *= torch.randn(len(W[::5]), size, generator=generator).abs()
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    X = torch.randn(tokens, size, generator=generator) @ mixing + 0.3 * torch.randn(size, generator=generator)
    return W, X


def best_time(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Shortest of `repeats` runs in seconds, and the last result."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - started)
    return min(times), result


def plain_formula(W: Tensor, X: Tensor, grid: Any, sweeps: int, visits: Tensor | None) -> Tensor:
    """COMQ as written on X: the residual X (W − Ŵ)ᵀ [tokens, out] is kept and updated at every coordinate.

    `visits` [out, in] gives each row its own order; None is the natural one.
    """
    W_hat, codes = W.clone(), torch.zeros_like(W)
    energy = X.square().sum(0)
    U = X @ (W - W_hat).T  # [tokens, out]
    for _ in range(sweeps):
        for t in range(W.shape[1]):
            if visits is None:
                x = X[:, t : t + 1]  # [tokens, 1]
                now, wish = W_hat[:, t].clone(), W_hat[:, t] + (U.T @ x)[:, 0] / energy[t]
                code, value = (y[0] for y in grid.round_column(wish[None], t))
                W_hat[:, t], codes[:, t] = value, code
                U += x * (now - value)
            else:
                column = visits[:, t : t + 1]
                x = X[:, visits[:, t]]  # [tokens, out]
                now = W_hat.gather(1, column)[:, 0]
                wish = now + (U * x).sum(0) / energy[visits[:, t]]
                code, value = (y[0] for y in grid.round_column(wish[None], column.T))
                W_hat.scatter_(1, column, value[:, None])
                codes.scatter_(1, column, code[:, None])
                U += x * (now - value)
    return codes


def sweep_table(size: int, tokens: int, bits: int, repeats: int) -> pd.DataFrame:
    """Three sweeps at λ = 1 by the plain formula on stored inputs and by ours on H, both orders."""
    W, X = seeded_layer(size, tokens)
    problem = LayerProblem("benchmark", W, (X.T @ X).double() / tokens)
    grid = build(load_choice("grid", "affine_release")).fit(problem.W, bits)
    rows = []
    for order in (Order.natural, Order.greedy):
        visits = None
        if order is Order.greedy:
            importance = problem.H[0].diagonal().sqrt() * W.abs()
            visits = importance.argsort(dim=-1, descending=True, stable=True)
        ours, codes = best_time(
            lambda order=order: coordinate_descent(problem, grid, sweeps=3, order=order), repeats
        )
        plain, plain_codes = best_time(lambda visits=visits: plain_formula(W, X, grid, 3, visits), 1)
        errors = [
            problem.relative_error(grid.values(c.reshape(problem.W.shape))) for c in (codes, plain_codes)
        ]
        same = float((codes[0] == plain_codes).float().mean())
        rows.append((order.value, plain, ours, plain / ours, errors[1], errors[0], 100 * same))
    columns = ["order", "plain, s", "ours, s", "ratio", "plain error", "our error", "equal codes, %"]
    return pd.DataFrame(rows, columns=columns)


def method_table(sizes: list[int], tokens: int, bits: int, repeats: int, methods: list[str]) -> pd.DataFrame:
    """Every method with its own grid on every size."""
    rows = []
    for size in sizes:
        W, X = seeded_layer(size, tokens)
        problem = LayerProblem("benchmark", W, (X.T @ X).double() / tokens)
        H = problem.H[0].float()
        product, _ = best_time(lambda W=W, H=H: W @ H, 5)
        for name in methods:
            method = build(load_choice("method", name))
            spec = build(load_choice("grid", companion("method", name, "grid") or "affine"))
            seconds, (codes, grid) = best_time(
                lambda method=method, problem=problem, spec=spec: method.quantize_layer(
                    problem, spec, bits, None
                ),
                repeats,
            )
            stored = sum(grid.storage_bits(codes).values()) / W.numel()
            rows.append(
                (size, name, seconds, seconds / product, problem.relative_error(grid.values(codes)), stored)
            )
    return pd.DataFrame(
        rows, columns=["size", "method", "seconds", "products", "relative error", "bits per coefficient"]
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=choices("method"))
    options = parser.parse_args()
    table = method_table(options.sizes, options.tokens, options.bits, options.repeats, options.methods)
    print(f"Every method, {options.bits} bits, {torch.get_num_threads()} threads\n")
    print(table.to_markdown(index=False, floatfmt=("", "", ".3f", ".0f", ".4f", ".3f")))
    size = max(options.sizes)
    print(f"\nThree COMQ sweeps on {size} × {size}, {options.tokens} stored inputs against H\n")
    table = sweep_table(size, options.tokens, options.bits, options.repeats)
    print(table.to_markdown(index=False, floatfmt=("", ".2f", ".3f", ".1f", ".4f", ".4f", ".2f")))


if __name__ == "__main__":
    main()
