"""How many bits each layer gets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from ptq.errors import InputError, suggestion


class Allocation(Enum):
    """How layers without bits of their own share the mean rate, on grids whose rate is free."""

    equal_rate = "equal_rate"
    layer_error = "layer_error"  # equal slope of the layers' relative squared errors
    network_loss = "network_loss"  # equal slope of the change of the network's predictions, to second order


@dataclass(kw_only=True)
class Bits:
    """Bits per weight code: one width, exceptions for the first and last layers, and exceptions by name.

    Names in `layers` and `skip` may hold the wildcards of the shell (`blocks.*.qkv`); each must match some
    layer.
    """

    weight: float  # whole for fixed-width grids
    group_size: int | None  # inputs that share scales; null = the whole row
    # bits of the layers that see the model's input or give its output; null = `weight`
    first_last: float | None
    layers: dict[str, float]
    skip: list[str]  # layers that stay float

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise InputError(f"bits.weight must be positive; got {self.weight:g}")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(
                f"bits.group_size must be at least 1, or null for one scale per row; got {self.group_size}"
            )

    def widths(self) -> list[float]:
        """Every width that may be asked of the grid."""
        return [self.weight, *([] if self.first_last is None else [self.first_last]), *self.layers.values()]

    def allocate(self, names: Iterable[str], ends: Iterable[str]) -> dict[str, float | None]:
        """Bits per layer name, None for a layer that stays float; `ends` are the first and last layers."""
        names, ends = list(names), set(ends)
        for pattern in [*self.layers, *self.skip]:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    f"bits names layer {pattern!r}, which the model does not have{suggestion(pattern, names)}"
                )
        allocation: dict[str, float | None] = {}
        for name in names:
            width: float | None = (
                self.first_last if name in ends and self.first_last is not None else self.weight
            )
            for pattern, exception in self.layers.items():
                width = exception if fnmatchcase(name, pattern) else width
            allocation[name] = None if any(fnmatchcase(name, pattern) for pattern in self.skip) else width
        return allocation
