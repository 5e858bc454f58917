"""WaterSIC as published: 16-bit factors for every row and column, least squares for both.

Paper: "WaterSIC", arXiv 2603.04956 (v1), Algorithms 3 and 4, for one layer. Letters as there: Ŵ = T Z A Γ, Z
integers, A the steps c / l_i, Γ factors of columns, T factors of rows.
The layer's float-path target stands for the paper's two input matrices: with
calibration.target=float_path and target_damping as `damping` it is the same objective. Not here: the
residual-stream term, attention-weighted statistics and the mixing of statistics, which need a transformer's
block.
Differs: the rate is that of the file (the range coder's stream, 16 bits for each factor of both kinds), met
by the search of ptq/rate.py; the paper counts the pooled entropy. The paper does not say when the alternation
ends: `tolerance` and `most_rounds` are those of the authors' code.
Shapes: T, codes [groups, out, in]; H [groups, in, in]; γ, steps [groups, in]; t [groups, out].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.entropy import Entropy, Rows, Steps
from ptq.grids.grid import Grid
from ptq.grids.scaled import ColumnScaled, RowScaled
from ptq.methods.method import GridSpec
from ptq.methods.watersic import cell
from ptq.problem import LayerProblem
from ptq.solvers.error_feedback import Feedback, error_feedback, inverse_factor

FACTOR_BITS = 16


@dataclass(kw_only=True, slots=True)
class PublishedWaterSIC:
    """Successive rounding with shrunk feedback, then alternating least squares for the factors."""

    damping: float  # of H, as a fraction of its mean diagonal
    dead_fraction: float  # inputs with less power than this fraction of the median are deleted
    shrink: bool  # feed back g_i α_i z_i, the best multiple of the codes of a column (LMMSE)
    tolerance: float  # the alternation ends where a round lowers the error by less than this fraction
    most_rounds: int

    needs_gram: ClassVar[bool] = True
    rate_slope: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if min(self.damping, self.dead_fraction, self.tolerance) < 0 or self.most_rounds < 0:
            raise InputError(
                "damping, dead_fraction, tolerance and most_rounds must not be negative; got "
                f"{self.damping}, {self.dead_fraction}, {self.tolerance} and {self.most_rounds}"
            )

    def check_grid(self, grid: GridSpec) -> None:
        """Refuse grids of fixed width and steps that columns share."""
        if not isinstance(grid, Entropy) or grid.steps is not Steps.columns or grid.rows is not Rows.equal:
            raise InputError(
                "WaterSIC as published has a step for every column and factors of its own for rows: "
                f"use grid=entropy_columns; got {type(grid).__name__}"
            )

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        return self.prepared(problem, grid, bits, group_size)(bits)

    def prepared(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> Callable[[float], tuple[Tensor, Grid]]:
        """Trials around `bits`; H is factorised here."""
        self.check_grid(grid)
        assert isinstance(grid, Entropy)
        if group_size is not None:
            raise InputError(f"WaterSIC as published takes no group_size; got {group_size}; set it to null")
        H = problem.H.double()
        power = H.diagonal(dim1=-2, dim2=-1)
        dead = power <= self.dead_fraction * power.median(-1, keepdim=True).values
        live = ~dead
        alive = LayerProblem(problem.name, problem.T, H * live[:, :, None] * live[:, None, :])
        visit = torch.arange(H.shape[-1] - 1, -1, -1, device=H.device).expand(H.shape[0], -1)
        U = inverse_factor(alive.H.flip((-2, -1)), self.damping, problem.name)
        return partial(
            self._trial, problem, alive, grid, dead, Feedback(visit=visit, U=U.to(problem.T.dtype))
        )

    def finished(self, problem: LayerProblem, codes: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """As it is: factors of rows and columns take part in the rate."""
        return codes, grid

    def _trial(
        self,
        problem: LayerProblem,
        alive: LayerProblem,
        spec: Entropy,
        dead: Tensor,
        feedback: Feedback,
        bits: float,
    ) -> tuple[Tensor, Grid]:
        fitted = spec.fit_steps(alive.T, bits, None, alive.H, feedback.weight())
        fitted = replace(fitted, dead=dead | fitted.dead)
        # the steps of the paper, not rounded to parts of an octave: c / l_i
        steps = cell(fitted, feedback.weight()).sqrt() * feedback.weight().double().rsqrt()  # [groups, in]
        uniform = replace(fitted, octaves=torch.zeros_like(fitted.octaves))
        relative = (steps / float(uniform.step)).to(alive.T.dtype)[:, None]
        grid = ColumnScaled(inner=uniform, scale=relative, scale_bits=FACTOR_BITS)
        shrinking = _Shrinking(grid=grid, shrink=self.shrink)
        codes, _ = error_feedback(alive, shrinking, feedback)  # type: ignore[arg-type]  # rounds columns only
        g, t = self._factors(problem, grid.values(codes).double(), shrinking.factors(codes))
        column_scale = (relative.double() * torch.where(g == 0, 1.0, g)[:, None]).to(relative.dtype)
        row_scale = torch.where(t == 0, 1.0, t)[..., None].to(relative.dtype)
        scaled = ColumnScaled(inner=uniform, scale=column_scale, scale_bits=FACTOR_BITS)
        return codes, RowScaled(inner=scaled, scale=row_scale, scale_bits=FACTOR_BITS).as_stored()

    def _factors(self, problem: LayerProblem, W0: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """γ [groups, in] and t [groups, out] by alternating least squares for W0 = Z A, from γ = g, t = 1."""
        H, C = problem.H.double(), problem.T.double() @ problem.H.double()
        ridge = (1e-8 * H.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(1e-11)[:, None]  # [groups, 1]
        t = torch.ones_like(W0[..., 0])
        error = float(problem.error(W0 * g[:, None]).sum())
        for _ in range(self.most_rounds):
            scaled = t[..., None] * W0
            A = H * (scaled.mT @ scaled) + torch.diag_embed(ridge.expand(g.shape))
            new_g = torch.linalg.solve(A, (scaled * C).sum(1)[..., None])[..., 0]
            V = W0 * new_g[:, None]
            new_t = (C * V).sum(-1) / (((V @ H) * V).sum(-1) + ridge)
            mean = new_t.abs().mean(-1, keepdim=True).clamp_min(1e-30)
            new_t, new_g = new_t / mean, new_g * mean
            new_error = float(problem.error(new_t[..., None] * W0 * new_g[:, None]).sum())
            if not new_error < error:
                break
            small = new_error > (1 - self.tolerance) * error
            g, t, error = new_g, new_t, new_error
            if small:
                break
        return g, t


@dataclass(kw_only=True, slots=True)
class _Shrinking:
    """What the sweep rounds with: the value of a column is the multiple of its codes nearest to it."""

    grid: ColumnScaled
    shrink: bool
    found: dict[int, Tensor] = field(default_factory=dict)

    @property
    def code_max(self) -> int:
        return self.grid.code_max

    def round_column(self, w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        codes, values = self.grid.round_column(w, column)
        if not self.shrink:
            return codes, values
        power = values.square().sum(-1, keepdim=True)
        g = torch.where(power > 0, (values * w).sum(-1, keepdim=True) / power, torch.zeros_like(power))
        self.found[column] = g
        return codes, g * values

    def factors(self, codes: Tensor) -> Tensor:
        """g of every column, [groups, in] float64."""
        if not self.shrink:
            return torch.ones(codes.shape[0], codes.shape[-1], dtype=torch.float64, device=codes.device)
        return torch.cat([self.found[j] for j in range(codes.shape[-1])], -1).double()
