"""ptq from a notebook: the parts of conf/ by name, or as objects."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq import pipeline
from ptq.allocation import Bits
from ptq.calibration import Calibration, NoCalibration
from ptq.config import build, companion, load_choice
from ptq.data.draw import check_plain
from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.methods.method import GridSpec, LayerMethod, check_pair
from ptq.models.adapter import ModelAdapter
from ptq.observers import Activations
from ptq.plan import map_tensors
from ptq.precision import products
from ptq.preparation import NoPreparation, Preparation
from ptq.problem import LayerProblem
from ptq.rate import quantize_to_rate
from ptq.report import Report
from ptq.seeding import isolated_seed
from ptq.tuning import NoTuning, Tuning
from ptq.whole_network import WholeNetworkMethod


@dataclass(kw_only=True)
class QuantizedWeight:
    """Codes and grid of one weight matrix. `codes` and `values()` have the shape of the given W."""

    codes: Tensor  # int16; int32 where they do not fit
    grid: Grid
    relative_error: float  # ‖(W − Ŵ) X‖ / ‖W X‖
    bits_per_coefficient: float

    def values(self) -> Tensor:
        """Ŵ."""
        codes = self.codes if self.codes.dim() == 3 else self.codes[None]
        return self.grid.values(codes).reshape(self.codes.shape)


def quantize_layer(
    W: Tensor,
    H: Tensor,
    method: str | LayerMethod = "comq",
    grid: str | GridSpec | None = None,
    bits: float = 4,
    group_size: int | None = None,
    C: Tensor | None = None,
    **overrides: Any,
) -> QuantizedWeight:
    """Quantize W [out, in] (or [groups, out, in]) given H = X Xᵀ / tokens [in, in] ([groups, in, in]).

    `method` and `grid` are names of conf/ or objects; `grid` None is the method's own. `overrides` are
    hyperparameters of a method given by name. C = X_float Xᵀ / tokens asks for the output of the float layer
    on float inputs.
    Raises InputError on shapes that disagree, NaN, or bits that the grid does not have.

    >>> import torch
    >>> X = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    >>> W = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    >>> quantize_layer(W, X @ X.T / 1000, method="rtn", bits=8).relative_error < 0.01
    True
    """
    solver, spec = _method_and_grid(method, grid, overrides)
    if not isinstance(solver, LayerMethod):
        raise InputError(f"method {type(solver).__name__} quantizes whole networks: use quantize_model")
    check_pair(solver, spec)
    spec.check(bits, group_size)
    problem = LayerProblem("W", W.detach(), H, C)
    with products(tf32=False):
        codes, fitted = quantize_to_rate(solver, problem, spec, bits, group_size)
    return QuantizedWeight(
        codes=codes.reshape(W.shape),
        grid=fitted,
        relative_error=problem.relative_error(fitted.values(codes)),
        bits_per_coefficient=sum(fitted.storage_bits(codes).values()) / W.numel(),
    )


def quantize_model(
    model: nn.Module,
    calibration: Iterable[Any],
    method: str | LayerMethod | WholeNetworkMethod = "comq",
    grid: str | GridSpec | None = None,
    bits: float | str | Bits = 4,
    *,
    group_size: int | None = None,
    skip: Iterable[str] = (),
    embeddings: bool = False,
    settings: str | Calibration | NoCalibration = "default",
    activations: str | Activations = "default",
    preparation: str | Preparation | NoPreparation = "none",
    tuning: str | Tuning | NoTuning = "none",
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    tf32: bool = False,
    bfloat16: bool = False,
    **overrides: Any,
) -> tuple[nn.Module, Report]:
    """A quantized copy of `model` (in eval mode) and what was done to each layer.

    `calibration` yields model inputs: a tensor, a tuple of positional arguments or a dict of keyword
    arguments. `bits` is a width, a name of conf/bits such as "w3g128", or a Bits object; `skip` names layers
    that stay float (wildcards allowed), as embeddings do unless `embeddings` is true; `settings` a name of
    conf/calibration or an object: which inputs layers see and what they reproduce (its sample counts are not
    read here, and it may not ask for images drawn in some way). `activations` is a name of conf/activations
    or an object, read where `bits` gives layer inputs a width ("w4a8"). `preparation` is a name of
    conf/preparation or an object: how the float network is rewritten first. `tuning` is a name of conf/tuning
    or an object: which float parameters are trained, without labels, once the codes stand. `device` is where
    to compute, by default where the model is; products are in full float32 there unless `tf32` (GPUs) or
    `bfloat16` (while codes, steps or a network are learned) is true.
    `overrides` are hyperparameters of a method given by name.
    """
    solver, spec = _method_and_grid(method, grid, overrides)
    if isinstance(calibration, Tensor):
        raise InputError(
            "calibration must be an iterable of batches, not one Tensor: pass [tensor] or tensor.split(n)"
        )
    batches = list(calibration)
    drawn: Calibration | NoCalibration = (
        build(load_choice("calibration", settings), "calibration") if isinstance(settings, str) else settings
    )
    if isinstance(drawn, Calibration):
        check_plain(drawn, "these batches are drawn already")
    student = copy.deepcopy(model).eval()
    config: Any = getattr(student, "config", None)
    cached = getattr(config, "use_cache", None)
    if cached:  # a key-value cache would grow with each replay of a block
        config.use_cache = False
    adapter = ModelAdapter(
        name=type(model).__name__, module=student, task="any", forward=_call, embeddings=embeddings
    )
    own = next((p.device for p in model.parameters()), torch.device("cpu"))
    where = own if device is None else device
    if isinstance(preparation, str):
        preparation = build(load_choice("preparation", preparation), "preparation")
    with isolated_seed(seed), products(tf32=tf32, bfloat16=bfloat16):
        if isinstance(preparation, Preparation):
            student.to(where)
            preparation.apply(adapter, map_tensors(batches[0], lambda t: t.to(where)))
        report = pipeline.quantize(
            adapter,
            batches,
            method=solver,
            grid=spec,
            bits=_bits(bits, group_size, list(skip)),
            calibration=drawn,
            activations=build(load_choice("activations", activations), "activations")
            if isinstance(activations, str)
            else activations,
            tuning=build(load_choice("tuning", tuning), "tuning") if isinstance(tuning, str) else tuning,
            device=where,
            seed=seed,
            progress=progress,
        )
    if cached:
        config.use_cache = cached
    return student, report


def _method_and_grid(
    method: str | LayerMethod | WholeNetworkMethod, grid: str | GridSpec | None, overrides: dict[str, Any]
) -> tuple[LayerMethod | WholeNetworkMethod, GridSpec]:
    if not isinstance(method, str) and overrides:
        raise InputError(
            f"hyperparameters {', '.join(overrides)} go with a method's name; set them on the object instead"
        )
    if grid is None:
        grid = (companion("method", method, "grid") if isinstance(method, str) else None) or "affine"
    solver = (
        build(load_choice("method", method, **overrides), "method") if isinstance(method, str) else method
    )
    spec = build(load_choice("grid", grid), "grid") if isinstance(grid, str) else grid
    return solver, spec


def _bits(bits: float | str | Bits, group_size: int | None, skip: list[str]) -> Bits:
    if isinstance(bits, Bits):
        if group_size is not None or skip:
            raise InputError("a Bits object holds group_size and skip itself; set them there")
        return bits
    if isinstance(bits, str):
        changes: dict[str, Any] = {"group_size": group_size} if group_size is not None else {}
        named = build(load_choice("bits", bits, skip=skip, **changes), "bits")
        assert isinstance(named, Bits)
        return named
    return Bits(
        weight=float(bits),
        group_size=group_size,
        first_last=None,
        layers={},
        skip=skip,
        activation=None,
        activation_first_last=None,
        activation_skip=[],
    )


def _call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
