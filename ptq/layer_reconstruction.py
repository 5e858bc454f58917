"""Training of one layer's codes on its Gram: full batch, all rows at once.

The loss tr((T − Ŵ) H (T − Ŵ)ᵀ) is the mean over all inputs of the squared output error, summed over channels,
so its gradient 2 (Ŵ − T) H has no sampling noise and costs one matrix product whatever the number of inputs.
Shapes: T, Ŵ, codes [groups, out, in]; H [groups, in, in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.grids.grid import Grid
from ptq.problem import LayerProblem
from ptq.reconstruction import Recipe, Selection, Variable, selected
from ptq.solvers.grid_variables import GridVariables
from ptq.solvers.soft_rounding import relax
from ptq.solvers.solution import Solution


def reconstruct_layer(
    problem: LayerProblem, grid: Grid, codes: Tensor, recipe: Recipe, seed: int
) -> tuple[Tensor, Grid]:
    """Codes and grid after training; with keep_best the best measured, row by row where the grid stays."""
    T, H = problem.T, problem.H.to(problem.T.dtype)
    start = Solution(problem, grid, codes)
    generator = torch.Generator().manual_seed(seed)
    slope = None
    if recipe.selection is Selection.gradient:
        slope = (grid.values(codes) - T) @ H
    learned = selected(recipe.selection, recipe.selected, grid, T, slope, generator)
    relaxation = relax(recipe.softening, grid, T, codes, learned)
    variables = GridVariables(grid, recipe.grid_form, recipe.trains(Variable.grid))
    stepper = recipe.descent.start(
        [
            ([relaxation.V.requires_grad_(True)], recipe.rates.rounding, recipe.schedule),
            (variables.requires_grad(), recipe.rates.grid, recipe.other_schedule),
        ]
    )
    total = recipe.descent.iterations
    checks = {round(total * (k + 1) / recipe.checks) for k in range(recipe.checks)}
    best = start
    for step in range(total):
        stepper.zero_grad()
        W_hat = relaxation.values(variables.grid())
        with torch.no_grad():
            slope = (W_hat - T) @ H
            slope.mul_(2)
        extra = relaxation.regulariser(step / total)
        if extra is None:
            W_hat.backward(slope)
        else:
            torch.autograd.backward([W_hat, extra], [slope, torch.ones_like(extra)])
        stepper.step(step)
        variables.advance()
        with torch.no_grad():
            relaxation.advance((step + 1) / total, variables.grid())
            if step + 1 in checks:
                now = Solution(problem, variables.stored(), relaxation.codes(variables.grid()))
                if recipe.keep_best and not variables.trained:
                    best = best.or_better(now)
                elif not recipe.keep_best or now.total() < best.total():
                    best = now  # as a whole: rows may share a parameter that was trained
    return best.codes, best.grid
