"""Meeting a rate: on a grid whose codes take the room they deserve, how much that is shows only afterwards.

The bits asked of the grid are moved until the bits stored are the ones wanted. Any method serves: it is run
again for each trial. On grids of fixed width this is one run and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec, LayerMethod, RatedGridSpec
from ptq.problem import LayerProblem

MOST_TRIALS = 12
# parameters may exceed a rate by one or the other: by bits in all, as in tiny layers, or by bits per weight
MOST_EXCESS, MOST_EXCESS_RATE = 2**10, 0.25
Trial = Callable[[float], tuple[Tensor, Grid]]  # codes and grid for the bits that are asked of the grid


@runtime_checkable
class PreparedMethod(Protocol):
    """A method that does once for a layer what does not change from trial to trial."""

    rate_slope: ClassVar[float]  # bits stored by each more that is asked, as far as known beforehand

    def prepared(self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None) -> Trial:
        """The trials for a target of `bits`."""

    def finished(self, problem: LayerProblem, codes: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The trial that is kept, with what its rate does not need."""


def quantize_to_rate(
    method: LayerMethod, problem: LayerProblem, spec: GridSpec, bits: float, group_size: int | None
) -> tuple[Tensor, Grid]:
    """Codes and grid of `method` at `bits` stored bits per weight, everything counted.

    Trials stop within the grid's tolerance. Where no step meets it (tiny or constant layers) the result
    nearest to the target counts. Where parameters and side information alone exceed it, there is none but to
    erase the weights: of few bits, the codes of the first trial are kept, which take as much as was asked
    beside the parameters; of many, InputError is raised. The layer's record has what it takes.
    """
    if not isinstance(spec, RatedGridSpec):
        return method.quantize_layer(problem, spec, bits, group_size)
    if isinstance(method, PreparedMethod):
        trial, slope = method.prepared(problem, spec, bits, group_size), method.rate_slope
    else:
        slope = 1.0
        trial = partial(_run, method, problem, spec, group_size)
    first = best = None
    best_miss = float("inf")
    trials: list[tuple[float, float]] = []  # (asked, stored)
    asked = bits
    while len(trials) < MOST_TRIALS and asked not in [a for a, _ in trials]:
        codes, grid = trial(asked)
        stored = sum(grid.storage_bits(codes).values()) / problem.W.numel()
        trials.append((asked, stored))
        first = first or (codes, grid)
        if abs(stored - bits) < best_miss:
            best, best_miss = (codes, grid), abs(stored - bits)
        if best_miss <= spec.tolerance:
            break
        asked = min(_next(trials, bits, slope), spec.most_bits)
    assert first is not None
    assert best is not None
    if min(stored for _, stored in trials) > bits + spec.tolerance and _bare(problem, *best, bits) > bits:
        best = first
    return method.finished(problem, *best) if isinstance(method, PreparedMethod) else best


def _bare(problem: LayerProblem, codes: Tensor, grid: Grid, bits: float) -> float:
    """Bits per weight of the layer when all its codes are 0; InputError where they are far too many."""
    bare = sum(grid.storage_bits(torch.zeros_like(codes)).values()) / codes.numel()
    if bare - bits > MOST_EXCESS_RATE and (bare - bits) * codes.numel() > MOST_EXCESS:
        groups, out, inputs = codes.shape
        raise InputError(
            f"{bits:g} bits a weight must cover scales and steps, which take {bare:.2f} with {groups} groups "
            f"of {out} rows and {inputs} inputs; give the layer more, or none, by bits.layers, or use a "
            "method and grid without scales of columns and rows, such as gptq on grid=entropy"
        )
    return bare


def _run(
    method: LayerMethod, problem: LayerProblem, spec: GridSpec, group_size: int | None, asked: float
) -> tuple[Tensor, Grid]:
    return method.quantize_layer(problem, spec, asked, group_size)


def _next(trials: list[tuple[float, float]], bits: float, slope: float) -> float:
    """The next rate to ask for: on the line through the nearest trials on both sides of the target, or
    through the last two; after one, on the line of this slope.
    """
    below = max((t for t in trials if t[1] <= bits), default=None)
    above = min((t for t in trials if t[1] > bits), default=None)
    if below is not None and above is not None:
        share = (bits - below[1]) / (above[1] - below[1])
        # kept off the ends, and halved now and then, so that a crooked curve cannot stall it
        share = 0.5 if len(trials) % 4 == 0 else min(max(share, 0.05), 0.95)
        return below[0] + share * (above[0] - below[0])
    asked, stored = trials[-1]
    if len(trials) > 1 and trials[-2][0] != asked:
        slope = min(max((stored - trials[-2][1]) / (asked - trials[-2][0]), 0.2), 2.0)
    return min(max(asked + (bits - stored) / slope, asked / 3), 2 * asked + 1)
