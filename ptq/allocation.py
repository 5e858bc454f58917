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
    """Bits per weight code: one width, exceptions for the first and last layers, and exceptions by name; the
    same for the codes of what the layers receive.

    Names in `layers`, `skip` and `activation_skip` may hold the wildcards of the shell (`blocks.*.qkv`); each
    must match some layer. Only inputs of quantized layers are quantized: never a softmax's output inside an
    attention, a residual sum, or the network's output.
    """

    weight: float  # whole for fixed-width grids
    group_size: int | None  # inputs that share scales; null = the whole row
    # bits of the layers that see the model's input or give its output; null = `weight`
    first_last: float | None
    layers: dict[str, float]
    skip: list[str]  # layers that stay float
    activation: int | None  # bits of the quantized layers' inputs; null = float
    # bits of the model's input and of what the layer that gives its output receives; null = `activation`
    activation_first_last: int | None
    activation_skip: list[str]  # layers whose input stays float

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise InputError(f"bits.weight must be positive; got {self.weight:g}")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(
                f"bits.group_size must be at least 1, or null for one scale per row; got {self.group_size}"
            )
        widths = {"activation": self.activation, "activation_first_last": self.activation_first_last}
        for key, width in widths.items():
            if width is not None and not 1 <= width <= 16:
                raise InputError(f"bits.{key} must be an integer from 1 to 16, or null; got {width}")
        if self.activation is None and self.activation_first_last is not None:
            raise InputError(
                f"bits.activation_first_last={self.activation_first_last} is an exception to "
                "bits.activation=null; give that a width, and name float inputs in bits.activation_skip"
            )

    def widths(self) -> list[float]:
        """Every width that may be asked of the grid."""
        return [self.weight, *([] if self.first_last is None else [self.first_last]), *self.layers.values()]

    def activation_widths(self) -> list[int]:
        """Every width of layer inputs; empty where they stay float."""
        return [w for w in (self.activation, self.activation_first_last) if w is not None]

    def allocate_activations(self, names: Iterable[str], ends: Iterable[str]) -> dict[str, int | None]:
        """Bits of the input per layer name, None where it stays float; `ends` as in `allocate`."""
        names, ends = list(names), set(ends)
        _must_match(self.activation_skip, names)
        special = self.activation if self.activation_first_last is None else self.activation_first_last
        return {
            name: None
            if any(fnmatchcase(name, pattern) for pattern in self.activation_skip)
            else special
            if name in ends
            else self.activation
            for name in names
        }

    def allocate(self, names: Iterable[str], ends: Iterable[str]) -> dict[str, float | None]:
        """Bits per layer name, None for a layer that stays float; `ends` are the first and last layers."""
        names, ends = list(names), set(ends)
        _must_match([*self.layers, *self.skip], names)
        allocation: dict[str, float | None] = {}
        for name in names:
            width: float | None = (
                self.first_last if name in ends and self.first_last is not None else self.weight
            )
            for pattern, exception in self.layers.items():
                width = exception if fnmatchcase(name, pattern) else width
            allocation[name] = None if any(fnmatchcase(name, pattern) for pattern in self.skip) else width
        return allocation


def _must_match(patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"bits names layer {pattern!r}, which the model does not have{suggestion(pattern, names)}"
            )
