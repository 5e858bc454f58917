"""Closed-form parameters: the normal equations of each row, all its units jointly.

Shapes: W, basis [groups, out, in]; H [groups, in, in]; θ, v [groups, out, p]; M [groups, out, p, p].
"""

from __future__ import annotations

import torch
from torch import Tensor


def normal_equations(
    basis: list[Tensor], W: Tensor, H: Tensor, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """M [groups, out, p, p] and v [groups, out, p] of min_θ (w − θB) H (w − θB)ᵀ per row.

    B holds each tensor of `basis` [groups, out or 1, in] restricted to each unit of `group_size` inputs:
    p = basis · units. A diagonal H, which couples neither columns nor units, costs no matrix product.
    """
    in_features = W.shape[-1]
    unit_of = torch.arange(in_features, device=W.device) // (group_size or in_features)
    units = int(unit_of[-1]) + 1
    indicator = torch.nn.functional.one_hot(unit_of, units).to(W.dtype)  # [in, units]
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    if torch.equal(H, torch.diag_embed(diagonal)):
        weighted = [B * diagonal[:, None] for B in basis]
        blocks = [[torch.diag_embed((A * B) @ indicator) for B in basis] for A in weighted]
        M = torch.cat([torch.cat([b.expand(*W.shape[:-1], -1, -1) for b in row], -1) for row in blocks], -2)
        return M, torch.cat([(W * A) @ indicator for A in weighted], -1)
    rows, sides = [], []
    for A in basis:
        for unit in range(units):
            columns = slice(unit * (group_size or in_features), (unit + 1) * (group_size or in_features))
            AH = A[..., columns] @ H[..., columns, :]  # [groups, out or 1, in]
            rows.append(torch.cat([((AH * B) @ indicator).expand(*W.shape[:-1], -1) for B in basis], -1))
            sides.append((AH * W).sum(-1))
    M = torch.stack(rows, -2)
    return (M + M.mT) / 2, torch.stack(sides, -1)


def solve_ridged(M: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """θ with M θ ≈ v by least squares around `start`, so that a direction M does not see keeps its old
    value.
    """
    size = M.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device) * torch.where(
        size > 0, size * 1e-10, torch.ones_like(size)
    )
    step, _ = torch.linalg.solve_ex(M + ridge, (v - (M @ start[..., None])[..., 0])[..., None])
    return start + step[..., 0]


def quadratic(M: Tensor, v: Tensor, theta: Tensor) -> Tensor:
    """θᵀMθ − 2vᵀθ per row, [groups, out]."""
    return ((M @ theta[..., None])[..., 0] * theta).sum(-1) - 2 * (v * theta).sum(-1)
