"""Training of one layer's codes on its Gram: full batch, all rows at once.

The loss tr((T − Ŵ) H (T − Ŵ)ᵀ) is the mean over all inputs of the squared output error, summed over channels,
so its gradient 2 (Ŵ − T) H has no sampling noise and costs one matrix product whatever the number of inputs.
Nothing is saved on the way: a layer takes seconds, and the pipeline keeps its units (see ptq/saved_units.py)
one by one, so an interruption costs the layers of one block at most.
Shapes: T, Ŵ, codes [groups, out, in]; H [groups, in, in].
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ptq.grids.grid import Grid
from ptq.problem import LayerProblem
from ptq.reconstruction import ROUND, Recipe, Selection, Variable, selected
from ptq.report import TuningReport
from ptq.resume import Resume
from ptq.solvers.grid_variables import GridVariables
from ptq.solvers.soft_rounding import relax
from ptq.solvers.solution import Solution
from ptq.training import TrainingRun


def reconstruct_layer(
    problem: LayerProblem, grid: Grid, codes: Tensor, recipe: Recipe, seed: int
) -> tuple[Tensor, Grid, TuningReport]:
    """Codes and grid after training, and how it went; with keep_best the best measured, row by row where the
    grid stays. Ends at a loss that is not finite.
    """
    started = time.perf_counter()
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
    best, undecided, taken, diverged = start, 0.0, False, False
    run = TrainingRun(f"round {problem.name}", total, resume=Resume(), progress=problem.progress, tensors=[])
    losses = torch.zeros(ROUND, dtype=T.dtype, device=T.device)  # read once a round: that waits for a GPU
    for index in run.rounds(-(-total // ROUND)):
        steps = range(index * ROUND, min((index + 1) * ROUND, total))
        for step in steps:
            stepper.zero_grad()
            W_hat = relaxation.values(variables.grid())
            with torch.no_grad():
                R = W_hat - T
                slope = R @ H
                losses[step - steps.start] = R.flatten() @ slope.flatten()
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
                    if not (torch.isfinite(relaxation.V).all() and math.isfinite(now.total())):
                        diverged = True
                        break
                    undecided, taken = relaxation.undecided(), taken or not recipe.keep_best
                    if recipe.keep_best and not variables.trained:
                        best = best.or_better(now)
                    elif not recipe.keep_best or now.total() < best.total():
                        best = now  # as a whole: rows may share a parameter that was trained
        if not all(run.record(loss) for loss in losses[: step - steps.start + 1].tolist()) or diverged:
            break
    before, after = start.total(), best.total()
    tuned = TuningReport(
        unit=problem.name,
        loss_before=before,
        loss_after=after,
        kept=taken or (recipe.keep_best and after < before),
        steps=run.step,
        seconds=time.perf_counter() - started,
        losses=run.losses,
        undecided=undecided,
    )
    return best.codes, best.grid, tuned
