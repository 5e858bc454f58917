"""BatchNorm after quantization: biases taken up, running statistics re-estimated.

A bias that correction gave a layer without one goes into the running mean of the BatchNorm that alone reads
the layer: the same function, and nothing to store.

Re-estimation puts running statistics of the quantized network in place of the float one's. It needs inputs
like those of training: a model trained with augmentation and re-estimated on plain images can lose points. So
this is an option and never a default; it uses the calibration batches as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibration import Calibration, NoCalibration
from ptq.errors import InputError
from ptq.layers import QuantizedLayer, layer_bias
from ptq.models.adapter import ModelAdapter
from ptq.models.graph import scale_graph
from ptq.plan import Plan
from ptq.report import Report

log = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_batchnorm(adapter: ModelAdapter, calibration: Calibration | NoCalibration) -> None:
    """Raise InputError where re-estimation is asked for and there is nothing to re-estimate."""
    if isinstance(calibration, Calibration) and calibration.reestimate_batchnorm and not _norms(adapter):
        raise InputError(
            f"calibration.reestimate_batchnorm=true: {adapter.name!r} has no BatchNorm, or it was folded; "
            "leave it false, or preparation=none"
        )


def _norms(adapter: ModelAdapter) -> list[Any]:
    return [m for m in adapter.module.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]


def readers(adapter: ModelAdapter, batch: Any, plan: Plan) -> dict[str, str]:
    """The BatchNorm that alone reads a layer's output, by the layer's name, for layers without a bias; none
    where the float network cannot be traced.
    """
    bare = {n for n in plan.layers() if layer_bias(adapter.module.get_submodule(n)) is None}
    if not bare or not _norms(adapter):
        return {}
    try:
        graph = scale_graph(adapter, batch, plan.layers())
    except InputError as error:
        log.info("corrected biases stay with their layers: %s", error)
        return {}
    return {layer: norm for layer, norm in graph.foldable if layer in bare}


@torch.no_grad()
def take_up_biases(module: nn.Module, norms: dict[str, str], report: Report) -> None:
    """Move biases that were added to layers of `report` into the BatchNorms in `norms`, by layer."""
    for layer in report.layers:
        norm = module.get_submodule(norms[layer.name]) if layer.added_bias and layer.name in norms else None
        quantized = module.get_submodule(layer.name)
        if norm is not None and isinstance(quantized, QuantizedLayer) and quantized.bias is not None:
            assert isinstance(norm.running_mean, Tensor)
            norm.running_mean.sub_(quantized.bias.to(norm.running_mean))
            quantized.bias, layer.added_bias = None, False


@torch.no_grad()
def reestimate(adapter: ModelAdapter, batches: list[Any]) -> int:
    """Replace running mean and variance of every BatchNorm by averages over `batches`; return their count.

    Each batch counts the same (cumulative average). All other modules stay in eval mode.
    """
    norms = _norms(adapter)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for batch in batches:
        adapter.forward(adapter.module, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return len(norms)
