"""Error feedback (OPTQ): round one input column at a time and spread its error over the columns not yet
rounded.

Source: Frantar et al., arXiv 2210.17323, Algorithm 1, and the released code for act-order and groups.
Differs: H is divided by the token count and has no factor 2; damping is relative to H, so Ŵ is the same.
Shapes: T [groups, out, in]; H [groups, in, in]; U [groups, in, in] upper, H⁻¹ = Uᵀ U. Work is on transposes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid, code_dtype
from ptq.problem import LayerProblem


@dataclass(kw_only=True)
class Feedback:
    """What error feedback needs of H: the visiting order and the factor, computed once for any number of
    grids.
    """

    visit: Tensor  # [groups, in] input columns in the order they are rounded
    U: Tensor  # [groups, in, in] upper, (H + d I)⁻¹ = Uᵀ U in that order

    def weight(self) -> Tensor:
        """1 / U_jj² of every input column [groups, in]: the objective is the sum of these times the squared
        distances of the compensated weights from their values.
        """
        weight = self.U.diagonal(dim1=-2, dim2=-1) ** -2
        return torch.empty_like(weight).scatter_(-1, self.visit, weight)


def prepare(problem: LayerProblem, *, damping: float, act_order: bool, conditional: bool = False) -> Feedback:
    """Factorise H in float64; `act_order` visits inputs by decreasing H_ii, and with `conditional` (ours) by
    decreasing 1 / [H⁻¹]_ii, what is left of an input's power when all others have explained their part.

    Raises InputError when H cannot be factorised even with much damping.
    """
    H = problem.H.double()
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    if act_order and conditional:
        inverse, _ = inverse_and_factor(H, damping, problem.name)
        explained = torch.where(diagonal > 0, inverse.diagonal(dim1=-2, dim2=-1), torch.inf)
        visit = explained.argsort(dim=-1, stable=True)  # dead inputs last
        U, failed = torch.linalg.cholesky_ex(_visited(inverse, visit), upper=True)
        if not failed.any():
            return Feedback(visit=visit, U=U.to(problem.T.dtype))
    elif act_order:
        visit = diagonal.argsort(dim=-1, descending=True, stable=True)
    else:
        visit = torch.arange(H.shape[-1], device=H.device).expand(H.shape[0], -1)
    _, U = inverse_and_factor(_visited(H, visit), damping, problem.name)
    return Feedback(visit=visit, U=U.to(problem.T.dtype))


def output_weight(problem: LayerProblem, *, damping: float, act_order: bool) -> Tensor:
    """`Feedback.weight` of `prepare`, [groups, in] float64, by one factorisation of H: with the inputs in
    reversed order its Cholesky factor has 1 / U_jj on the diagonal.
    """
    H = problem.H.double()
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    visit = torch.arange(H.shape[-1], device=H.device).expand(H.shape[0], -1)
    if act_order:
        visit = diagonal.argsort(dim=-1, descending=True, stable=True)
    mean = diagonal.mean(-1, keepdim=True)
    own = torch.where(mean > 0, damping * mean, torch.ones_like(mean)) + (diagonal <= 0)
    backwards = visit.flip(-1)
    L, failed = torch.linalg.cholesky_ex(_visited(H + torch.diag_embed(own), backwards))
    if failed.any():
        return prepare(problem, damping=damping, act_order=act_order).weight().double()
    weight = L.diagonal(dim1=-2, dim2=-1).square()
    return torch.empty_like(weight).scatter_(-1, backwards, weight)


def _visited(H: Tensor, visit: Tensor) -> Tensor:
    """Rows and columns of H [groups, in, in] in the order of visit [groups, in]."""
    return H.gather(1, visit[:, :, None].expand_as(H)).gather(2, visit[:, None, :].expand_as(H))


def error_feedback(
    problem: LayerProblem,
    grid: Grid,
    feedback: Feedback,
    *,
    block_size: int = 128,
    fit_unit: Callable[[Tensor], Grid] | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Grid]:
    """Codes [groups, out, in] int16 and the grid they are on.

    With `fit_unit` the parameters of each group of `group_size` inputs are found from the partly compensated
    weights [groups, out, group] when the sweep reaches the group; this needs the natural order.
    """
    T, visit, U = problem.T, feedback.visit, feedback.U
    groups, out, in_features = T.shape
    W = T.gather(-1, visit[:, None, :].expand_as(T)).mT.contiguous()  # [groups, in, out]
    codes = torch.empty_like(W)
    shared_visit = visit[0].tolist() if bool((visit == visit[0]).all()) else None
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        errors = W.new_empty(groups, stop - start, out)
        reached = W[:, start:stop].clone()
        for j in range(start, stop):
            if fit_unit is not None and group_size is not None and j % group_size == 0:
                # as released: with the errors of all earlier blocks spread in,
                # but not yet those of this block
                unit = torch.cat([reached[:, j - start :], W[:, stop:]], 1)[:, :group_size]
                grid = grid.replace_unit(j // group_size, fit_unit(unit.mT.contiguous()))
            column = shared_visit[j] if shared_visit else visit[:, j : j + 1].expand(-1, out)
            codes[:, j], value = grid.round_column(W[:, j], column)
            error = (W[:, j] - value) / U[:, j, j, None]  # [groups, out]
            W[:, j + 1 : stop].addcmul_(U[:, j, j + 1 : stop, None], error[:, None], value=-1)
            errors[:, j - start] = error
        W[:, stop:].baddbmm_(U[:, start:stop, stop:].mT, errors, alpha=-1)
    result = torch.empty_like(T)
    result.scatter_(-1, visit[:, None, :].expand_as(T), codes.mT)
    return result.to(code_dtype(grid)), grid


def inverse_factor(H: Tensor, damping: float, name: str) -> Tensor:
    """U upper with (H + d I)⁻¹ = Uᵀ U, see `inverse_and_factor`."""
    return inverse_and_factor(H, damping, name)[1]


def inverse_and_factor(H: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """(H + d I)⁻¹ and U upper with (H + d I)⁻¹ = Uᵀ U in float64, d = damping · mean diag H, ten times more
    where that does not factorise.

    A dead input (zero row and column) is uncoupled from the rest, so its weight is simply rounded.
    """
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    dead = torch.diag_embed((diagonal <= 0).to(H.dtype))
    for attempt in range(6):
        extra = torch.where(mean > 0, damping * 10**attempt * mean, torch.ones_like(mean))[..., None]
        L, failed = torch.linalg.cholesky_ex(H + dead + extra * eye)
        if not failed.any():
            inverse = torch.cholesky_inverse(L)
            U, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.any():
                return inverse, U
        if damping == 0:
            break
    raise InputError(
        f"the Gram matrix of {name!r} is not positive definite with damping={damping:g}; "
        "use more calibration samples or a larger method.damping"
    )
