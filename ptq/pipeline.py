"""Quantize a model: by the walk over its units, or as one network where the method works on the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ptq.allocation import Bits
from ptq.batchnorm import check_batchnorm
from ptq.calibration import Calibration, NoCalibration
from ptq.methods.method import GridSpec, LayerMethod
from ptq.models.adapter import ModelAdapter
from ptq.observers import Activations
from ptq.report import Report
from ptq.resume import Resume
from ptq.tuning import NoTuning, Tuning
from ptq.walk import Walk
from ptq.whole_network import WholeNetworkMethod, quantize_whole


def quantize(
    adapter: ModelAdapter,
    batches: list[Any],
    *,
    method: LayerMethod | WholeNetworkMethod,
    grid: GridSpec,
    bits: Bits,
    calibration: Calibration | NoCalibration,
    activations: Activations | None = None,
    tuning: Tuning | NoTuning | None = None,
    samples: Iterable[tuple[Any, Tensor | None]] | None = None,
    redraw: Callable[[int], list[Any]] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
    resume: Resume | None = None,
) -> Report:
    """Quantize `adapter.module` in place and say what was done.

    `batches` are model inputs of the calibration set (for NoCalibration, one batch to trace with).
    `activations` says how layer inputs are quantized where `bits` gives them a width. `samples`
    are (batch, labels) pairs that tuning of the whole network goes over in each epoch, the unlabelled
    `batches` where it is None. `redraw(k)` gives the batches of the k-th layer, for
    calibration.fresh_per_layer. Raises InputError, with the layer's name, on NaN or infinity in weights or
    inputs. `resume` holds what interrupted runs of the same job have done, and keeps what this one does.
    """
    if isinstance(method, WholeNetworkMethod):

        def solve(other: ModelAdapter, starting: LayerMethod, widths: Bits) -> Report:
            return quantize(
                other,
                batches,
                method=starting,
                grid=grid,
                bits=widths,
                calibration=calibration,
                device=device,
                seed=seed,
                progress=progress,
                resume=(resume or Resume()).within("start"),
            )

        return quantize_whole(
            adapter,
            batches,
            solve,
            method=method,
            grid=grid,
            bits=bits,
            calibration=calibration,
            activations=activations,
            tuning=tuning,
            device=torch.device(device),
            seed=seed,
            progress=progress,
            resume=resume or Resume(),
        )
    check_batchnorm(adapter, calibration)
    with torch.no_grad():
        walk = Walk(
            adapter,
            batches,
            method,
            grid,
            bits,
            calibration,
            activations,
            tuning,
            redraw,
            torch.device(device),
            seed,
        )
        return walk.run(
            [(b, None) for b in batches] if samples is None else samples, progress, resume or Resume()
        )
