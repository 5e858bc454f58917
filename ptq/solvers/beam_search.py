"""Beam search: error feedback that keeps the K best partial roundings of every row instead of one.

The search is K-best sphere decoding (Guo and Nilsson 2006) on the triangular factor that error feedback uses
(arXiv 2210.17323): when column j is rounded to v and later columns stay free, a row's objective grows by
((w_j − v) / U_jj)², w_j the compensated weight. Each partial rounding goes on with the two grid values around
its w_j. K = 1 is error feedback.
Work is blocked: inside a block of B columns a partial rounding is its errors e = (w − v) / U_jj in the block
and a pointer to its ancestor at the block's start; the rest of the weights is brought up to date once per
block. A layer costs about K times error feedback.
Shapes: T [groups, out, in]; U [groups, in, in]; compensated weights [groups, in, K, out]; partial roundings
[groups, K, out].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.grids.grid import Grid, code_dtype
from ptq.grids.row_widths import RowWidthsGrid
from ptq.problem import LayerProblem
from ptq.solvers.error_feedback import Feedback


def beam_search(
    problem: LayerProblem, grid: Grid, feedback: Feedback, *, candidates: int, block_size: int = 32
) -> Tensor:
    """Codes [groups, out, in] of the best of the `candidates` roundings that reach the last column."""
    T, visit, U = problem.T, feedback.visit, feedback.U
    groups, out, in_features = T.shape
    index = visit[:, None, :].expand_as(T)
    step = _mean_step(grid, T).gather(-1, index).mT  # [groups, in, out]
    W = T.gather(-1, index).mT[:, :, None].expand(-1, -1, candidates, -1)  # [groups, in, K, out]
    shared_visit = visit[0].tolist() if bool((visit == visit[0]).all()) else None
    # all start from the same weights: only the first may go on, or the others would be its copies
    cost = T.new_full((groups, candidates, out), torch.inf)
    cost[:, 0] = 0
    first = torch.arange(groups, device=T.device)[:, None, None] * candidates * out
    first = first + torch.arange(out, device=T.device)  # [groups, 1, out], the row of errors of candidate 0
    blocks: list[tuple[Tensor, Tensor]] = []  # codes in each block and the ancestor at its start
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        size = stop - start
        errors = T.new_empty(groups * candidates * out, size)  # rows, so that one read takes a path along
        codes = T.new_empty(groups, size, candidates, out)
        parents = torch.empty(codes.shape, dtype=torch.int64, device=T.device)
        ancestor = torch.arange(candidates, device=T.device)[:, None].expand(groups, -1, out)
        for j in range(start, stop):
            t = j - start
            w = W[:, t].gather(1, ancestor)  # [groups, K, out]
            if t:
                paths = errors.view(groups, -1, size)[..., :t]  # [groups, K · out, t]
                w = w - (paths @ U[:, start:j, j, None]).view_as(w)
            column = shared_visit[j] if shared_visit else visit[:, j : j + 1].expand(-1, out)
            code, value = _two_values(grid, w, column, step[:, j])  # [groups, 2K, out]
            error = (w.repeat(1, 2, 1) - value) / U[:, j, j, None, None]
            grown = cost.repeat(1, 2, 1) + error.square()
            # at the end of the grid both values may be the same one: follow it once
            grown[:, candidates:].masked_fill_(value[:, candidates:] == value[:, :candidates], torch.inf)
            cost, chosen = grown.topk(candidates, dim=1, largest=False)
            parent = chosen % candidates
            ancestor = ancestor.gather(1, parent)
            errors = errors.index_select(0, (parent * out + first).flatten())
            errors[:, t] = error.gather(1, chosen).flatten()
            codes[:, t], parents[:, t] = code.gather(1, chosen), parent
        blocks.append((_followed(codes, parents), ancestor))
        later = W[:, size:]
        later = later.gather(2, ancestor[:, None].expand(-1, later.shape[1], -1, -1))
        spread = U[:, start:stop, stop:].mT @ errors.view(groups, -1, size).mT  # [groups, later, K · out]
        W = later - spread.unflatten(-1, (candidates, out))
    return _best_path(blocks, cost, index).to(code_dtype(grid))


def _mean_step(grid: Grid, T: Tensor) -> Tensor:
    """Mean distance of neighbouring values for each weight, [groups, out, in]: exact on a uniform grid."""
    ends = [
        grid.values(torch.full(T.shape, code, dtype=code_dtype(grid), device=T.device))
        for code in (grid.code_min, grid.code_max)
    ]
    span = grid.code_span() if isinstance(grid, RowWidthsGrid) else max(1, grid.code_max - grid.code_min)
    return (ends[1] - ends[0]).abs() / span


def _two_values(grid: Grid, w: Tensor, column: int | Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and values nearest to w [groups, K, out] and those one step further on w's other side, one after
    the other: [groups, 2K, out].
    """
    nearest = [grid.round_column(w[:, k], column) for k in range(w.shape[1])]
    further = [
        grid.round_column(w[:, k] + torch.where(w[:, k] >= value, step, -step), column)
        for k, (_, value) in enumerate(nearest)
    ]
    codes, values = zip(*nearest, *further, strict=True)
    return torch.stack(codes, 1).to(w.dtype), torch.stack(values, 1)


def _followed(codes: Tensor, parents: Tensor) -> Tensor:
    """Codes of a block along the path of each rounding that left it, [groups, B, K, out]."""
    followed = codes.clone()
    path = parents[:, -1]
    for t in range(codes.shape[1] - 2, -1, -1):
        followed[:, t] = codes[:, t].gather(1, path)
        path = parents[:, t].gather(1, path)
    return followed


def _best_path(blocks: list[tuple[Tensor, Tensor]], cost: Tensor, index: Tensor) -> Tensor:
    """Codes [groups, out, in] of each row's cheapest rounding, columns back in the order of the layer."""
    path = cost.argmin(1, keepdim=True)  # [groups, 1, out]
    columns: list[Tensor] = []
    for codes, ancestor in reversed(blocks):
        columns.insert(0, codes.gather(2, path[:, None].expand(-1, codes.shape[1], -1, -1))[:, :, 0])
        path = ancestor.gather(1, path)
    ordered = torch.cat(columns, 1).mT  # [groups, out, in]
    return torch.empty_like(ordered).scatter_(-1, index, ordered)
