"""GPTQ: round one input column at a time and spread its error over the columns not yet rounded.

Paper: Frantar et al., 2022, arXiv 2210.17323, Algorithm 1; options as in the released code.
Differs: H is divided by the token count; Ŵ is the same, because damping is relative to H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec
from ptq.problem import LayerProblem
from ptq.solvers.error_feedback import error_feedback, prepare


@dataclass(kw_only=True, slots=True)
class GPTQ:
    """Error feedback on any grid whose values are found column by column."""

    block_size: int  # columns rounded before the lazy update of the rest; B in the paper
    damping: float  # added to diag(H), as a fraction of its mean
    act_order: bool  # visit inputs by decreasing H_ii
    # find a group's scales when the sweep reaches it, from the compensated weights; entropy grids keep theirs
    refit_groups: bool

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InputError(f"block_size must be at least 1; got {self.block_size}")
        if self.damping < 0:
            raise InputError(f"damping must not be negative; got {self.damping}")
        if self.refit_groups and self.act_order:
            raise InputError(
                "refit_groups needs act_order=false: "
                "with act_order the columns of a group are not met together"
            )

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        fitted = grid.fit(problem.T, bits, group_size, problem.H)
        feedback = prepare(problem, damping=self.damping, act_order=self.act_order)
        refit = self.refit_groups and group_size is not None
        return error_feedback(
            problem,
            fitted,
            feedback,
            block_size=self.block_size,
            fit_unit=(lambda W: grid.fit(W, bits)) if refit else None,
            group_size=group_size,
        )
