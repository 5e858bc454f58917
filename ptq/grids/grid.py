"""What every grid promises: codes ↔ values, a closed-form refit, and its exact size in bits.

Shapes: W, codes, Ŵ [groups, out, in] (`groups`: convolution groups, 1 elsewhere); parameters
[groups, out, units], where a unit is `group_size` inputs that share parameters, or the whole row.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ptq.errors import InputError


class Grid(Protocol):
    """Fitted parameters plus the verbs that solvers and storage need. Codes are integers in
    [code_min, code_max].
    """

    @property
    def code_min(self) -> int:
        """The least code."""

    @property
    def code_max(self) -> int:
        """The greatest code."""

    @property
    def shared(self) -> bool:
        """Whether one set of parameters serves several rows, so that rows cannot choose for themselves."""

    def scaled(self, factor: float) -> Self:
        """The grid with all values multiplied by `factor`."""

    def round(self, W: Tensor) -> Tensor:
        """Codes of the nearest values, [groups, out, in] of `code_dtype`."""

    def values(self, codes: Tensor) -> Tensor:
        """Ŵ [groups, out, in] in the parameters' dtype."""

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to w [groups, out] in one input column, or in column[g, r] of each row."""

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> Self:
        """The grid with parameters that minimise tr((W − Ŵ) H (W − Ŵ)ᵀ) for fixed codes; never a higher
        objective.
        """

    def where(self, better: Tensor, other: Self) -> Self:
        """Parameters of `self` for the rows where better [groups, out] is true, of `other` elsewhere."""

    def replace_unit(self, unit: int, other: Self) -> Self:
        """This grid with the parameters of one unit taken from the one-unit grid `other`."""

    def parameters(self) -> dict[str, Tensor]:
        """Float parameters that `values` depends on smoothly, by name: what tuning may train."""

    def with_parameters(self, parameters: dict[str, Tensor]) -> Self:
        """The grid with these parameters, exactly as given: `values` is differentiable in them."""

    def as_stored(self) -> Self:
        """The grid with every parameter as a file would return it."""

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps: packed tensors and the JSON facts needed to read them back."""

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        """{"codes": bits, "parameters": bits} that `storage` takes."""


def code_dtype(grid: Grid) -> torch.dtype:
    """int16 where the codes fit, else int32 (unsigned codes of 16 bits)."""
    return torch.int16 if grid.code_max < 2**15 else torch.int32


def check_bits(bits: float) -> int:
    """`bits` as an integer from 1 to 16, or InputError: fixed-width codes have no other size."""
    if not float(bits).is_integer() or not 1 <= bits <= 16:
        raise InputError(f"bits must be an integer from 1 to 16 on a fixed-width grid; got {bits:g}")
    return int(bits)


def check_group_size(group_size: int | None) -> int | None:
    """`group_size` if it is None (whole row) or positive, else InputError."""
    if group_size is not None and group_size < 1:
        raise InputError(f"group_size must be at least 1, or null for one scale per row; got {group_size}")
    return group_size
