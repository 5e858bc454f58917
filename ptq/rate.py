"""Meeting a rate: on a grid whose codes take the room they deserve, how much that is shows only afterwards.

The bits asked of the grid are moved until the bits stored are the ones wanted. Any method serves: it is run
again for each trial. On grids of fixed width this is one run and nothing more.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec, LayerMethod
from ptq.problem import LayerProblem

MOST_TRIALS = 12


@runtime_checkable
class RatedGridSpec(Protocol):
    """A grid whose stored size depends on the codes."""

    tolerance: float  # bits per weight that the stored rate may differ from the target


def quantize_to_rate(
    method: LayerMethod, problem: LayerProblem, spec: GridSpec, bits: float, group_size: int | None
) -> tuple[Tensor, Grid]:
    """Codes and grid of `method` at `bits` stored bits per weight, everything counted.

    Trials stop within the grid's tolerance. Where no step meets it (tiny or constant layers) the result
    nearest to the target counts.
    """
    if not isinstance(spec, RatedGridSpec):
        return method.quantize_layer(problem, spec, bits, group_size)
    asked, best, best_miss = bits, None, float("inf")
    below: tuple[float, float] | None = None  # (asked, stored) with stored ≤ bits
    above: tuple[float, float] | None = None
    for _ in range(MOST_TRIALS):
        codes, grid = method.quantize_layer(problem, spec, asked, group_size)
        stored = sum(grid.storage_bits(codes).values()) / problem.W.numel()
        if abs(stored - bits) < best_miss:
            best, best_miss = (codes, grid), abs(stored - bits)
        if best_miss <= spec.tolerance:
            break
        if stored <= bits:
            below = (asked, stored)
        else:
            above = (asked, stored)
        following = _next(asked, stored, bits, below, above)
        if following == asked:
            break
        asked = following
    assert best is not None
    return best


def _next(
    asked: float,
    stored: float,
    bits: float,
    below: tuple[float, float] | None,
    above: tuple[float, float] | None,
) -> float:
    """The next rate to ask for: by a line through the bracket, else as if one bit more asked stored one."""
    if below is None or above is None:
        return min(max(asked + bits - stored, asked / 2), 2 * asked, 16.0)
    share = (bits - below[1]) / max(above[1] - below[1], 1e-12)
    # kept off the ends, so that a crooked curve cannot stall it
    return below[0] + min(max(share, 0.05), 0.95) * (above[0] - below[0])
