"""What quantizing a model did: facts for the record, and bits per coefficient of the result."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ptq.activations import ActivationQuantizer

log = logging.getLogger(__name__)
MOST_UNDECIDED = 0.05  # of a layer's weights, before a run says so


@dataclass(kw_only=True)
class LayerReport:
    """One quantized layer: facts for the record."""

    name: str
    shape: list[int]  # W [groups, out, in]
    bits: float
    storage_bits: dict[str, int]
    seconds: float
    # ‖(T − Ŵ) X‖ / ‖T X‖ of the codes and grid it ends with; None where that is not known: while it is to be
    # trained, and in networks that are too large for it (ptq/layer_errors.py)
    relative_error: float | None = None
    # rate at which no Gaussian code does better (ptq/limit.py); None likewise, and without data
    limit_bits: float | None = None
    activation: dict[str, Any] | None = None  # of the input's quantizer; None where it stays float
    added_bias: bool = False  # by bias correction, on a layer that had none
    clipped_fraction: float | None = (
        None  # weights beyond the range, of methods that train it; None elsewhere
    )
    grown_bits: int = 0  # of storage_bits: what learning the codes added


@dataclass(kw_only=True)
class TuningReport:
    """What training one block, or the network, did: facts for the record."""

    unit: str  # the block's name, or "network"
    loss_before: float  # mean over the samples it was trained on, or over those held out to choose the epoch
    loss_after: float
    kept: bool  # False: the loss had not fallen and the start was restored
    steps: int
    seconds: float
    losses: list[float] = field(default_factory=list)  # in training, means of up to a hundred equal stretches
    undecided: float | None = None  # largest fraction of a layer's weights still between two codes at the end


@dataclass(kw_only=True)
class Report:
    """What quantizing a model did."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)  # name, shape, reason, parameters
    doubled: int = 0  # weights that the float model stores once and this one twice, as codes and as floats
    tuning: list[TuningReport] = field(default_factory=list)
    mixed_precision: dict[str, Any] | None = None  # how widths were chosen, where they were
    seconds: dict[str, float] = field(default_factory=lambda: {"capture": 0.0, "solve": 0.0})

    def weights(self) -> int:
        """How many weights the quantized layers have."""
        return sum(_count(layer.shape) for layer in self.layers)

    def bits_per_coefficient(self) -> dict[str, float]:
        """Stored bits of the quantized layers per weight of theirs: codes, parameters, total."""
        count = self.weights()
        if count == 0:
            return {"codes": 0.0, "parameters": 0.0, "total": 0.0}
        codes = sum(layer.storage_bits["codes"] for layer in self.layers) / count
        parameters = sum(layer.storage_bits["parameters"] for layer in self.layers) / count
        return {"codes": codes, "parameters": parameters, "total": codes + parameters}

    def model_bits_per_coefficient(self, module: nn.Module) -> float:
        """Stored bits of the whole model per parameter of the float model: quantized layers as stored, all
        else at its float width, with the scales and zero points of quantized inputs and biases that were
        added.
        """
        quantized = sum(sum(layer.storage_bits.values()) for layer in self.layers)
        weights = self.weights()
        quantizers = [m for m in module.modules() if isinstance(m, ActivationQuantizer)]
        steps = {id(p) for quantizer in quantizers for p in quantizer.parameters()}
        rest = [p for p in module.parameters() if id(p) not in steps]
        bits = quantized + sum(p.numel() * p.element_size() * 8 for p in rest)
        bits += sum(quantizer.storage_bits() for quantizer in quantizers)
        added = sum(layer.shape[0] * layer.shape[1] for layer in self.layers if layer.added_bias)
        return bits / max(1, weights + sum(p.numel() for p in rest) - added - self.doubled)

    def warn_of_undecided(self) -> None:
        """One line where rounding was learned and hard codes differ from what was trained, in any unit."""
        left = {unit.unit: unit.undecided for unit in self.tuning if unit.undecided is not None}
        worst = max(left, key=lambda name: left[name], default=None)
        if worst is not None and left[worst] > MOST_UNDECIDED:
            log.warning(
                "learned rounding left up to %.0f %% of a layer's weights (unit %s; mean over %d units: "
                "%.0f %%) between two codes, so that the hard codes are not what was trained; take more "
                "method.iterations, a larger method.rounding_rate or method.regularisation, or "
                "method.relative_regularisation=true where outputs are large",
                100 * left[worst],
                worst,
                len(left),
                100 * sum(left.values()) / len(left),
            )


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
