"""PTNQ: one scalar function for the whole model, chosen with its initialisation and schedule by the task.

Paper: Venâncio and Lopes, "PTNQ: Post-Training Non-Linear Quantization", OpenReview AEvu2ifH1r. Candidates
are tried from the widest codes down, and one that fails at a width is dropped for the narrower ones.
Differs: the paper names no split for the choice; here it is a validation split, and the test split is read
once, for the chosen candidate. What counts as failing is ours: the paper says "e.g. zero accuracy".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec
from ptq.methods.selecting import CandidateGrid, Selection, Trial
from ptq.problem import LayerProblem
from ptq.solvers.nearest import nearest

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class PTNQ:
    """The choice; how a candidate is fitted is the grid's matter."""

    widths: list[int]  # tried from the widest down; those at or below the job's width are left out
    validation_samples: int | None  # at most so many images of the validation split; null = all
    validation_tokens: int | None  # the first so many of the validation text; null = all
    min_accuracy_fraction: float  # of the float model's accuracy; a candidate with no more has failed
    max_perplexity_factor: float  # of the float model's perplexity; a candidate with no less has failed

    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_accuracy_fraction < 1:
            raise InputError(
                "min_accuracy_fraction must be at least 0 and less than 1; "
                f"got {self.min_accuracy_fraction:g}"
            )
        if self.max_perplexity_factor <= 1:
            raise InputError(
                f"max_perplexity_factor must be greater than 1; got {self.max_perplexity_factor:g}"
            )

    def check_grid(self, grid: GridSpec) -> None:
        """Raise InputError unless the grid lists candidates."""
        if not isinstance(grid, CandidateGrid):
            raise InputError(
                f"method PTNQ chooses among the candidates of a grid, and {type(grid).__name__} has none; "
                "choose grid=ptnq_paper, grid=ptnq_function or grid=ptnq_affine_control, or method=rtn "
                "for nearest rounding on this grid"
            )

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        """One layer on the grid given; of several candidates, the grid takes the least weight error."""
        fitted = grid.fit(problem.T, bits, group_size, problem.H)
        return nearest(problem, fitted), fitted

    def select(self, grid: GridSpec, bits: float, reference: Mapping[str, Any], trial: Trial) -> Selection:
        """The candidate with the best validation metric at `bits` among those that failed at no width."""
        self.check_grid(grid)
        assert isinstance(grid, CandidateGrid)
        candidates = dict(grid.candidates())
        facts: dict[str, Any] = {"candidates": len(candidates), **grid.report()}
        for kind, names in facts.get("signs", {}).items():
            log.info("%s: %s", kind, ", ".join(names) or "none")
        if len(candidates) == 1:
            [(name, only)] = candidates.items()
            return Selection(grid=only, facts={**facts, "chosen": name, "tried": 0, "widths": []})
        survivors = list(candidates)
        widths = [*sorted((float(w) for w in self.widths if w > bits), reverse=True), bits]
        steps: list[dict[str, Any]] = []
        metrics: dict[str, dict[str, Any]] = {}
        chosen = survivors[0]
        tried = 0
        for width in widths:
            metrics = {name: trial(name, candidates[name], width) for name in survivors}
            tried += len(metrics)
            failed = [name for name in survivors if self._fails(metrics[name], reference)]
            chosen = min(survivors, key=lambda name: _cost(metrics[name]))
            steps.append({"bits": width, "best": chosen, "failed": failed, "metrics": metrics})
            log.info(
                f"{width:g} bits: {len(survivors)} tried, {len(failed)} failed, best {chosen}, "
                f"{_shown(metrics[chosen])}"
            )
            if len(failed) < len(survivors):  # where all fail, none is better than another to drop
                survivors = [name for name in survivors if name not in failed]
        facts |= {
            "chosen": chosen,
            "validation": metrics[chosen],
            "reference": dict(reference),
            "tried": tried,
            "saved_by_dropping": len(candidates) * len(widths) - tried,
            "widths": steps,
        }
        return Selection(grid=candidates[chosen], facts=facts)

    def _fails(self, metrics: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
        if "failed" in metrics:
            return True
        if "top1" in metrics:
            return bool(metrics["top1"] <= self.min_accuracy_fraction * reference["top1"])
        perplexity = metrics["perplexity"]
        return not perplexity < self.max_perplexity_factor * reference["perplexity"]


def _cost(metrics: Mapping[str, Any]) -> tuple[float, ...]:
    """What is least for the best candidate: the metric, then top-5, then the weight error."""
    if "failed" in metrics:
        return (math.inf,)
    if "top1" in metrics:
        return -metrics["top1"], -metrics["top5"], metrics["weight_error"]
    return metrics["perplexity"], metrics["weight_error"]


def _shown(metrics: Mapping[str, Any]) -> str:
    if "failed" in metrics:
        return f"failed: {metrics['failed']}"
    key = "top1" if "top1" in metrics else "perplexity"
    return f"{key} {metrics[key]:.4g}"
