"""BatchNorm re-estimation: running statistics of the quantized network in place of the float one's.

It needs inputs like those of training: a model trained with augmentation and re-estimated on plain images can
lose points. So this is an option and never a default; it uses the calibration batches as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ptq.calibration import Calibration, NoCalibration
from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter

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
