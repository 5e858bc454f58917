"""Coordinate descent on the codes: each weight in turn takes the grid value that is best given all the
others.

Sources: COMQ (arXiv 2403.07134), section 3 of whose algorithm is written on X; this is the identical
update on H
(also QuantEase, arXiv 2309.01885). With R = T − Ŵ and G = R H the one-dimensional minimiser at column i is
t = ŵ_i + G_i / H_ii, and the best admissible value is the grid value nearest to t, on any grid.

Work is blocked: inside a block of B columns only the block's part of G is kept up to date, and one matrix
product per block brings the rest up to date, so that a sweep costs about one product [out, in] × [in, in]
(in / B of them when every row has its own order).
Shapes: T, Ŵ, G [groups, out, in]; H [groups, in, in]. The fast path works on transposes, where a column is
contiguous.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ptq.grids.grid import Grid, code_dtype
from ptq.problem import LayerProblem

ROW_BLOCK = 2**26  # elements of the gathered [rows, B, B] Grams held at once


class Order(Enum):
    """In which order the columns are visited, the same in every sweep."""

    natural = "natural"  # as stored
    greedy = "greedy"  # per row, by decreasing √H_ii · |w_i| (COMQ)
    shared = "shared"  # for all rows, by decreasing H_ii


def coordinate_descent(
    problem: LayerProblem,
    grid: Grid,
    *,
    sweeps: int,
    order: Order = Order.natural,
    codes: Tensor | None = None,
    block_size: int = 64,
) -> Tensor:
    """Codes [groups, out, in] int16 after `sweeps` passes over all columns.

    Starts from `codes`, or, as COMQ does, from the float weights themselves: then the first pass is a greedy
    error feedback and only the later ones are descents. From codes on the grid no sweep raises the objective.
    """
    T = problem.T
    H = problem.H.to(T.dtype)
    W_hat = T.clone() if codes is None else grid.values(codes).to(T.dtype)
    out_codes = torch.zeros_like(T) if codes is None else codes.to(T.dtype)
    if order is Order.greedy:
        importance = H.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()[:, None, :] * problem.W.abs()
        visits = importance.argsort(dim=-1, descending=True, stable=True)  # [groups, out, in]
        _sweep_rows(T, H, W_hat, out_codes, grid, visits, sweeps, block_size)
        return out_codes.to(code_dtype(grid))
    if order is Order.shared:
        visit = H.diagonal(dim1=-2, dim2=-1).sum(0).argsort(descending=True, stable=True)
    else:
        visit = torch.arange(T.shape[-1], device=T.device)
    return _sweep_columns(T, H, W_hat, out_codes, grid, visit, sweeps, block_size).to(code_dtype(grid))


def _inverse_diagonal(H: Tensor) -> Tensor:
    """1 / H_ii, and 0 for a dead input, whose weight then stays at its nearest grid value. [groups, in]"""
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    return torch.where(
        diagonal > 0, 1 / diagonal.clamp_min(torch.finfo(H.dtype).tiny), torch.zeros_like(diagonal)
    )


def _sweep_columns(
    T: Tensor,
    H: Tensor,
    W_hat: Tensor,
    codes: Tensor,
    grid: Grid,
    visit: Tensor,
    sweeps: int,
    block_size: int,
) -> Tensor:
    columns = visit.tolist()
    T, W_hat, codes = (x[..., visit].mT.contiguous() for x in (T, W_hat, codes))  # [groups, in, out]
    H = H[:, visit][:, :, visit].contiguous()
    inverse = _inverse_diagonal(H)[..., None]  # [groups, in, 1]
    for _ in range(sweeps):
        G = H @ (T - W_hat)  # afresh in each sweep: rounding errors of the updates do not pile up
        for start in range(0, len(columns), block_size):
            stop = min(start + block_size, len(columns))
            H_block = H[:, start:stop, start:stop]
            G_block = G[:, start:stop].clone()
            before = W_hat[:, start:stop].clone()
            for k in range(stop - start):
                j = start + k
                t = torch.addcmul(W_hat[:, j], G_block[:, k], inverse[:, j])  # [groups, out]
                code, value = grid.round_column(t, columns[j])
                moved = W_hat[:, j] - value
                G_block[:, k + 1 :].addcmul_(H_block[:, k + 1 :, k, None], moved[:, None])
                W_hat[:, j] = value
                codes[:, j] = code
            G.baddbmm_(H[:, :, start:stop], before - W_hat[:, start:stop])
    result = torch.empty_like(codes)
    result[:, visit] = codes
    return result.mT.contiguous()


def _sweep_rows(
    T: Tensor,
    H: Tensor,
    W_hat: Tensor,
    codes: Tensor,
    grid: Grid,
    visits: Tensor,
    sweeps: int,
    block_size: int,
) -> None:
    """Every row in its own order; W_hat and codes are changed in place."""
    groups, out, in_features = T.shape
    inverse = _inverse_diagonal(H)
    group = torch.arange(groups, device=T.device)[:, None, None, None]
    rows_at_once = max(1, ROW_BLOCK // (groups * block_size * block_size))
    for _ in range(sweeps):
        G = (T - W_hat) @ H
        for start in range(0, in_features, block_size):
            visited = visits[..., start : start + block_size]  # [groups, out, B]
            moved = torch.zeros_like(T)
            for top in range(0, out, rows_at_once):
                rows = slice(top, min(top + rows_at_once, out))
                index = visited[:, rows]  # [groups, rows, B]
                H_block = H[group, index[..., :, None], index[..., None, :]]  # [groups, rows, B, B]
                G_block = G[:, rows].gather(-1, index)
                now = W_hat[:, rows].gather(-1, index)
                before = now.clone()
                code_block = torch.empty_like(now)
                scale = inverse[:, None, :].expand(-1, index.shape[1], -1).gather(-1, index)
                for k in range(index.shape[-1]):
                    t = torch.addcmul(now[..., k], G_block[..., k], scale[..., k])
                    code, value = _round_rows(grid, t, index[..., k], rows, out)
                    G_block[..., k + 1 :].addcmul_(H_block[..., k, k + 1 :], (now[..., k] - value)[..., None])
                    now[..., k] = value
                    code_block[..., k] = code
                W_hat[:, rows].scatter_(-1, index, now)
                codes[:, rows].scatter_(-1, index, code_block)
                moved[:, rows].scatter_(-1, index, before - now)
            G.baddbmm_(moved, H)


def _round_rows(grid: Grid, t: Tensor, column: Tensor, rows: slice, out: int) -> tuple[Tensor, Tensor]:
    """`round_column` for a slice of the rows: grids know all their rows, so the slice is padded when it is
    not whole.
    """
    if rows.stop - rows.start == out:
        return grid.round_column(t, column)
    whole_t, whole_column = t.new_zeros(t.shape[0], out), column.new_zeros(t.shape[0], out)
    whole_t[:, rows], whole_column[:, rows] = t, column
    code, value = grid.round_column(whole_t, whole_column)
    return code[:, rows], value[:, rows]
