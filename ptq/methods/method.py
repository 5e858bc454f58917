"""What a method is: a dataclass of hyperparameters with a hook that the pipeline calls for each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ptq.allocation import Allocation
from ptq.block_problem import BlockProblem
from ptq.calibration import Calibration, NoCalibration
from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.models.adapter import ModelAdapter
from ptq.problem import LayerProblem
from ptq.report import TuningReport
from ptq.resume import Resume


@dataclass(frozen=True, kw_only=True)
class Wants:
    """Which hooks of a method the pipeline is to call, and what beside the usual it is to hand them."""

    blocks: bool
    network: bool
    stages: bool = False  # blocks of one stage are one (see units_of)
    float_inputs: bool = False  # BlockProblem.float_calls
    output_gradients: bool = False  # BlockProblem.output_gradients


@runtime_checkable
class Configurable(Protocol):
    """A method whose settings decide which of its hooks are called."""

    def wants(self) -> Wants:
        """What the pipeline is to call, and with what."""


class GridSpec(Protocol):
    """How to fit a grid (conf/grid): hyperparameters with `check` and `fit`."""

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""

    def fit(self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None) -> Grid:
        """Grid for W [groups, out, in]."""

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take, {"codes", "parameters"}, without solving anything."""


@runtime_checkable
class RatedGridSpec(Protocol):
    """A grid whose stored size depends on the codes, so that its step, not a range, sets the rate."""

    tolerance: float  # bits per weight that the stored rate may differ from the target
    most_bits: float  # largest rate that may be asked of it
    allocation: Allocation  # of the mean rate over the layers that have no bits of their own
    allocation_samples: int  # calibration samples that layers are measured on for it


@runtime_checkable
class ModelGridSpec(Protocol):
    """A grid of which something is chosen for a whole model, from its weights, before any layer is fitted."""

    def for_model(self, layers: Iterable[tuple[Tensor, float]], group_size: int | None) -> GridSpec:
        """The grid after that choice; each layer is its W [groups, out, in] and its bits."""


@runtime_checkable
class LayerMethod(Protocol):
    """A method with the layer hook."""

    needs_gram: ClassVar[bool]  # False: the method works without calibration data

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        """Codes [groups, out, in] and the fitted grid they are on."""


@runtime_checkable
class BlockMethod(Protocol):
    """A method that also trains each block after its layers are quantized."""

    def tune_block(self, problem: BlockProblem) -> TuningReport:
        """Change `problem.block` in place."""


@runtime_checkable
class NetworkMethod(Protocol):
    """A method that also trains the network after all layers are quantized."""

    def tune_network(
        self,
        adapter: ModelAdapter,
        teacher: nn.Module | None,
        samples: Iterable[tuple[Tensor, Tensor | None]],
        *,
        device: torch.device,
        seed: int,
        progress: bool,
        resume: Resume,
    ) -> TuningReport:
        """Change `adapter.module` in place; `teacher` is the float network."""


@runtime_checkable
class GridChecker(Protocol):
    """A method that some grids make no sense for."""

    def check_grid(self, grid: GridSpec) -> None:
        """Raise InputError, with the reason and a grid that serves, where the method cannot use `grid`."""


@runtime_checkable
class SizedMethod(Protocol):
    """A method that stores more than the grid does."""

    def size(self, grid: GridSpec, W: Tensor, bits: float, group_size: int | None) -> dict[str, int]:
        """Bits that W will take, {"codes", "parameters"}, without solving anything."""


def wants(method: LayerMethod) -> Wants:
    """What the method says it wants, else every hook it has."""
    if isinstance(method, Configurable):
        return method.wants()
    return Wants(blocks=isinstance(method, BlockMethod), network=isinstance(method, NetworkMethod))


def units_of(method: object, adapter: ModelAdapter) -> list[str]:
    """Names of the parts of several layers that the method wants quantized as one: the blocks, or the stages
    and the blocks outside all stages. Raises InputError where it wants stages and the model has none.
    """
    blocks = adapter.blocks()
    if not isinstance(method, Configurable) or not method.wants().stages:
        return blocks
    stages = adapter.stages()
    if not stages:
        found = ", ".join(blocks[:2]) + (", …" if blocks[2:] else "") or "none"
        raise InputError(
            "method.unit=stage takes each Sequential of two or more blocks as one, and model "
            f"{adapter.name!r} has no such part (its blocks: {found}); use method.unit=block or network"
        )
    return stages + [b for b in blocks if not any(b.startswith(f"{s}.") for s in stages)]


def stored_size(
    method: object, grid: GridSpec, W: Tensor, bits: float, group_size: int | None
) -> dict[str, int]:
    """Bits that W [groups, out, in] will take by this method on this grid, {"codes", "parameters"}."""
    if isinstance(method, SizedMethod):
        return method.size(grid, W, bits, group_size)
    return grid.size(W, bits, group_size)


def check_pair(method: object, grid: GridSpec) -> None:
    """Raise InputError where the method refuses the grid."""
    if isinstance(method, GridChecker):
        method.check_grid(grid)


def check_bias_correction(method: LayerMethod, calibration: Calibration | NoCalibration) -> None:
    """Raise InputError where biases would be corrected for codes that are still to be learned.

    Correcting them after that instead undoes what the codes have learned, the means of a unit's output
    included: measured with brecq at 2 bits on the digits ResNet, errors of the logits grow by two fifths.
    """
    wanted = wants(method)
    corrects = isinstance(calibration, Calibration) and calibration.bias_correction
    if corrects and (wanted.blocks or wanted.network):
        raise InputError(
            "calibration.bias_correction=true mends what each layer lost when it was solved; method "
            f"{type(method).__name__} learns other codes after that, for the output of a whole unit, its "
            "mean included: leave it false (with bias in method.variables biases are learned too), or use "
            "a layer-wise method (unit=layer)"
        )
