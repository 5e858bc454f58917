"""Methods that try several candidates on the task and keep the best: what they ask for and what they get.

A candidate is a grid to be fitted to every layer of the model. The runner provides the trial: it quantizes a
copy of the model and measures it on a validation split that neither calibrates nor tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ptq.methods.method import GridSpec, LayerMethod


@runtime_checkable
class CandidateGrid(GridSpec, Protocol):
    """A grid (conf/grid) that names several ways to fit it."""

    def candidates(self) -> Mapping[str, GridSpec]:
        """Every candidate by name, in a fixed order."""

    def report(self) -> dict[str, Any]:
        """Facts about the candidates for the record; may be empty."""


class Trial(Protocol):
    """Quantize a copy of the model with a candidate at a width and measure it on the validation split."""

    def __call__(self, name: str, grid: GridSpec, bits: float) -> dict[str, Any]:
        """Metrics as the evaluation gives them, with `weight_error`; or {"failed": reason}."""


@dataclass(kw_only=True)
class Selection:
    """What a selecting method found."""

    grid: GridSpec  # the chosen candidate's
    facts: dict[str, Any] = field(default_factory=dict)  # JSON for the record


@runtime_checkable
class SelectingMethod(LayerMethod, Protocol):
    """A method that chooses among candidates by the task before the model is quantized.

    Without data to try them on (the Python API, one layer by itself) it chooses by weight error in
    `quantize_layer`.
    """

    validation_samples: int | None  # at most so many images of the validation split; null = all
    validation_tokens: int | None  # the first so many of the validation text; null = all

    def select(self, grid: GridSpec, bits: float, reference: Mapping[str, Any], trial: Trial) -> Selection:
        """The best candidate at `bits`; `reference` holds the float model's metrics on the same split."""


def chooses(method: object, grid: GridSpec) -> bool:
    """Whether the method has two candidates or more to choose between."""
    return (
        isinstance(method, SelectingMethod) and isinstance(grid, CandidateGrid) and len(grid.candidates()) > 1
    )
