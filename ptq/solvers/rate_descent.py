"""Coordinate descent on error plus code length: each weight in turn takes the code that is best for both.

Minimises tr((T − Ŵ) H (T − Ŵ)ᵀ) + weight · bits, bits being the ideal length of the codes under frequencies
counted in classes of rows and columns of like magnitude, as in ptq/coding.py. Frequencies are counted before
every sweep and stay fixed in it. At each weight the nearest code, the one after it towards zero, and zero are
compared; the arithmetic is that of coordinate_descent.
Shapes: T, codes [groups, out, in]; H [groups, in, in]; work is on transposes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.grids.grid import Grid, code_dtype
from ptq.problem import LayerProblem

REACH = 32  # larger codes are as long as this one
RESOLUTION = 2  # classes per octave of magnitude
PRIOR = 0.05  # of each code, halved with every step from zero


def rate_descent(
    problem: LayerProblem, grid: Grid, codes: Tensor, *, weight: float, sweeps: int, block_size: int = 64
) -> Tensor:
    """Codes [groups, out, in] after `sweeps` passes; `weight` is the error that one bit is worth."""
    T, H = problem.T.mT.contiguous(), problem.H.to(problem.T.dtype)
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-30), torch.zeros_like(diagonal))
    now = codes.to(T.dtype).mT.contiguous()  # [groups, in, out]
    W_hat = grid.values(codes).to(T.dtype).mT.contiguous()
    for _ in range(sweeps):
        table, first = code_lengths(now)
        G = H @ (T - W_hat)
        for start in range(0, T.shape[1], block_size):
            stop = min(start + block_size, T.shape[1])
            G_block = G[:, start:stop].clone()
            before = W_hat[:, start:stop].clone()
            for j in range(start, stop):
                k = j - start
                wish = torch.addcmul(W_hat[:, j], G_block[:, k], inverse[:, j, None])  # [groups, out]
                code, value = _best(grid, wish, j, diagonal[:, j, None], table, first[:, j], weight)
                G_block[:, k + 1 :].addcmul_(H[:, j + 1 : stop, j, None], (W_hat[:, j] - value)[:, None])
                W_hat[:, j], now[:, j] = value, code
            G.baddbmm_(H[:, :, start:stop], before - W_hat[:, start:stop])
    return now.mT.to(code_dtype(grid)).contiguous()


def _best(
    grid: Grid, wish: Tensor, column: int, curvature: Tensor, table: Tensor, first: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """The code and value with the least curvature · (wish − value)² + weight · length, [groups, out]."""
    code, value = grid.round_column(wish, column)
    # values are code times step, so a code one step nearer to zero has this value
    step = torch.where(code != 0, value / code, torch.zeros_like(value))
    best_cost = curvature * (wish - value).square() + weight * _lengths(table, first, code)
    for other in (code - code.sign(), torch.zeros_like(code)):
        other_value = other * step
        cost = curvature * (wish - other_value).square() + weight * _lengths(table, first, other)
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        code, value = torch.where(better, other, code), torch.where(better, other_value, value)
    return code, value


def _lengths(table: Tensor, first: Tensor, codes: Tensor) -> Tensor:
    return table[first + codes.clamp(-REACH, REACH).long()]


def code_lengths(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of every code of every class, flat, and where code 0 of each weight's class is in it.

    codes [groups, in, out], columns first; a class joins rows and columns whose mean squares' logarithms add
    up alike, and positive and negative codes count together.
    """
    square = codes.double().square()
    floor = 0.1 / max(codes.shape[1:])
    rows, columns = (square.mean(d, keepdim=True).clamp_min(floor).log2() for d in (1, 2))
    middle = square.mean().clamp_min(floor).log2()
    classes = ((rows + columns - middle) * (RESOLUTION / 2)).round().long()
    classes = (classes - classes.min()).clamp_max(63)
    width = 2 * REACH + 1
    first = classes * width + REACH
    count = torch.zeros(64 * width, dtype=torch.float64, device=codes.device)
    at = (first + codes.clamp(-REACH, REACH).long()).flatten()
    count.index_add_(0, at, torch.ones_like(at, dtype=torch.float64))
    count = count.reshape(64, width)
    prior = PRIOR * torch.exp2(-torch.arange(-REACH, REACH + 1, device=codes.device).abs().double())
    count = count + count.flip(-1) + prior
    return -(count / count.sum(-1, keepdim=True)).log2().reshape(-1).to(codes.dtype), first
