"""Walk the model unit by unit: capture inputs → accumulate Grams → solve layers → replace them → next unit.

A unit is a block (see models/adapter), where the method wants so a stage of blocks, or a quantizable layer
outside all of these. One traced forward pass
finds the order in which units and layers run, which layers share an input, and whether a unit's input is
exactly the previous unit's output. Where it is, units are chained: the stored outputs of one are the inputs
of the next. Elsewhere (a pooling in between, a changed mask) the inputs are captured by a forward pass of the
whole model that stops at the unit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptq.allocation import Bits
from ptq.batchnorm import readers, reestimate, take_up_biases
from ptq.block_problem import BlockProblem
from ptq.calibration import Calibration, Inputs, NoCalibration, Statistics, Target
from ptq.capture import output_gradients, unit_calls, unit_outputs
from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.layer_errors import LayerErrors, fits
from ptq.layers import (
    QuantizedLayer,
    layer_bias,
    names_of,
    quantized_layer,
    replace_module,
    weight_matrix,
)
from ptq.methods.method import (
    BlockMethod,
    GridSpec,
    LayerMethod,
    ModelGridSpec,
    NetworkMethod,
    check_bias_correction,
    check_pair,
    units_of,
    wants,
)
from ptq.mixed_precision import Choice, MixedBits, check_mixed, choose
from ptq.models.adapter import ModelAdapter
from ptq.observers import Activations, check_activations
from ptq.plan import (
    Call,
    Unit,
    allocate,
    allocate_activations,
    doubled_weights,
    map_tensors,
    skipped_parameters,
    trace,
)
from ptq.precision import products
from ptq.problem import LayerProblem
from ptq.rate import quantize_to_rate
from ptq.rate_allocation import budget, check_allocation
from ptq.report import LayerReport, Report, TuningReport
from ptq.resume import Resume
from ptq.saved_units import SavedUnits
from ptq.stage_inputs import StageInputs
from ptq.tuning import NoTuning, Scope, Tuning, check_tuning


class Walk:
    """State of one pass over the model. `student` is quantized in place; `teacher` stays float."""

    def __init__(
        self,
        adapter: ModelAdapter,
        batches: list[Any],
        method: LayerMethod,
        grid: GridSpec,
        bits: Bits,
        calibration: Calibration | NoCalibration,
        activations: Activations | None,
        tuning: Tuning | NoTuning | None,
        redraw: Callable[[int], list[Any]] | None,
        device: torch.device,
        seed: int,
    ) -> None:
        if not batches:
            raise InputError(
                "quantization needs one batch of model inputs at least; the calibration iterable is empty"
            )
        if isinstance(calibration, NoCalibration) and method.needs_gram:
            raise InputError(
                f"method {type(method).__name__} needs calibration data; "
                "calibration=none serves rtn-like methods only"
            )
        check_pair(method, grid)
        check_bias_correction(method, calibration)
        check_tuning(tuning, calibration)
        check_activations(activations, bits.activation_widths(), calibration)
        check_allocation(grid, calibration)
        if isinstance(calibration, Calibration) and calibration.fresh_per_layer and redraw is None:
            raise InputError(
                "calibration.fresh_per_layer=true draws samples for each layer and needs a data source, "
                "not a list of batches; set it to false"
            )
        for width in bits.widths():
            grid.check(width, bits.group_size)
        self.adapter, self.method, self.grid, self.bits, self.device = adapter, method, grid, bits, device
        self.calibration, self.seed = calibration, seed
        self.tuning = tuning if isinstance(tuning, Tuning) else None
        self.batches = [map_tensors(b, lambda t: t.to(device)) for b in batches]
        self.student = adapter.module.to(device)
        _check_finite(self.student)
        self.units_of_several = units_of(method, adapter)
        self.plan = trace(adapter, self.batches[0], self.units_of_several)
        self.allocation = allocate(adapter, self.plan, bits)
        self.mixed: Choice | None = None
        if isinstance(bits, MixedBits):
            check_mixed(bits, method, grid, calibration)
            self.mixed = choose(
                bits,
                adapter,
                self.plan,
                self.batches,
                method=method,
                grid=grid,
                calibration=calibration,
                seed=seed,
            )
            self.allocation = self.mixed.layers
        if isinstance(grid, ModelGridSpec):
            widths = {name: width for name, width in self.allocation.items() if width is not None}
            layers = [
                (weight_matrix(self.student.get_submodule(name)).float(), width)
                for name, width in widths.items()
            ]
            self.grid = grid.for_model(layers, bits.group_size)
        started = time.perf_counter()
        self.budget = budget(adapter, self.batches, self.allocation, bits, grid, seed=seed)
        self.report = Report(
            skipped=skipped_parameters(adapter, self.plan, self.allocation),
            doubled=doubled_weights(adapter, self.allocation),
        )
        self.errors = LayerErrors(report=self.report, limits=isinstance(calibration, Calibration))
        if self.budget is not None:
            self.report.seconds["allocate"] = time.perf_counter() - started
        self.norms: dict[str, str] = {}  # that take up the biases which layers are given
        if isinstance(calibration, Calibration) and calibration.bias_correction:
            self.norms = readers(adapter, self.batches[0], self.plan)
        if self.mixed is not None:
            self.report.mixed_precision = self.mixed.facts
            self.report.seconds["allocate"] = self.mixed.facts["seconds"]
        self.wants = wants(method)
        self.needs_teacher = self.needs_student = self.compares = False
        if isinstance(calibration, Calibration):
            self.needs_student = calibration.inputs is Inputs.quantized
            self.compares = calibration.target is Target.float_path
            self.needs_teacher = (
                calibration.inputs is Inputs.float or self.compares or self.wants.float_inputs
            )
        self.teacher = copy.deepcopy(self.student) if self.needs_teacher else None
        # the float network that tuning looks up to, also where the layers do not need it
        self.example: nn.Module | None = self.teacher
        distilled = self.tuning is not None and self.tuning.scope is Scope.network
        wanted = self.wants.network or self.wants.output_gradients
        if (distilled or wanted) and self.teacher is None:
            self.example = copy.deepcopy(self.student)
        solved = (self.student.get_submodule(n) for n, width in self.allocation.items() if width is not None)
        self.keeps_all = (distilled or self.wants.network) and fits(solved)
        self.stage_inputs = StageInputs(
            adapter=adapter,
            teacher=self.teacher,
            batches=self.batches,
            order=[n for n in self.plan.layers() if self.allocation[n] is not None],
            bits=allocate_activations(adapter, self.plan, bits, self.allocation),
            activations=activations,
            calibration=calibration,
            redraw=redraw,
            device=device,
            seed=seed,
        )

    def run(self, samples: Iterable[tuple[Any, Tensor | None]], progress: bool, resume: Resume) -> Report:
        saved = SavedUnits(resume, self.plan.units, self.student, self.report, self.errors)
        layers = [name for name, width in self.allocation.items() if width is not None]
        bar = tqdm(
            total=len(layers),
            initial=len(saved.finished(layers)),
            desc="quantize",
            unit="layer",
            disable=not progress,
            delay=1,
        )
        inputs: dict[str, list[Call]] = {}
        for k, unit in enumerate(self.plan.units):
            following = self.plan.units[k + 1] if k + 1 < len(self.plan.units) else None
            wanted = [[n for n in stage if self.allocation[n] is not None] for stage in unit.stages]
            sequential = (
                isinstance(self.calibration, Calibration)
                and self.calibration.sequential
                and self.needs_student
            )
            stages = [s for s in wanted if s] if sequential else [[n for s in wanted for n in s]]
            gathers = isinstance(self.calibration, Calibration) and k >= saved.first
            if gathers:
                started = time.perf_counter()
                for role, module in self._roles():
                    if unit.replayable and not (unit.chained and role in inputs):
                        wanted_calls = any(stages) or (following and following.chained)
                        inputs[role] = (
                            unit_calls(self.adapter, module, unit.name, self.batches) if wanted_calls else []
                        )
                self.report.seconds["capture"] += time.perf_counter() - started
            original = None
            if any(stages) and self._reconstructs(unit) and k >= saved.done:
                original = copy.deepcopy(self.student.get_submodule(unit.name))
            restored = saved.restore(k)
            if self.budget is not None:
                for layer in restored:
                    self.budget.spend(layer.name, sum(layer.storage_bits.values()) - layer.grown_bits)
                    if k < saved.done and self.wants.blocks:
                        self.budget.grow(layer.name, layer.grown_bits)
            if k >= saved.done and not restored:
                self.stage_inputs.enter(stages)
                for stage in stages:
                    self._quantize_stage(unit, stage, inputs, bar, progress)
                saved.keep(k, done=original is None)
            if original is not None:
                self._reconstruct(unit, original, inputs, progress, saved.place(k))
                names = {name for stage in unit.stages for name in stage}
                if self.wants.blocks:
                    self._remeasure(names)
                if not self.keeps_all:
                    self.errors.measure(self.student, names)
                saved.keep(k, done=True)
            if following is not None and following.chained and gathers:
                started = time.perf_counter()
                for role, module in self._roles():
                    outputs = unit_outputs(module.get_submodule(unit.name), inputs[role], self.device)
                    inputs[role] = [c.with_first(x) for c, x in zip(inputs[role], outputs, strict=True)]
                self.report.seconds["capture"] += time.perf_counter() - started
            else:
                inputs.clear()
        bar.close()
        self._reestimate()
        trainers: list[NetworkMethod] = []
        if isinstance(self.method, NetworkMethod) and self.wants.network:
            trainers.append(self.method)
        if self.tuning is not None and self.tuning.scope is Scope.network:
            trainers.append(self.tuning)
        for number, trainer in enumerate(trainers):
            trained = trainer.tune_network(
                self.adapter,
                self.example,
                samples,
                device=self.device,
                seed=self.seed,
                progress=progress,
                resume=resume.within(f"network{number}"),
            )
            self._tuned(trained)
            if trained.kept and not self.keeps_all:
                self.errors.forget()
            self._reestimate()
        if self.wants.network:
            self._remeasure(set(layers))
        self.errors.measure(self.student, layers)
        take_up_biases(self.student, self.norms, self.report)
        self.report.warn_of_undecided()
        return self.report

    def _remeasure(self, names: set[str]) -> None:
        """Sizes after training: where codes were learned, those of an entropy-coded layer are others, and the
        layers to come make up for it.
        """
        for layer in (layer for layer in self.report.layers if layer.name in names):
            module = self.student.get_submodule(layer.name)
            assert isinstance(module, QuantizedLayer)
            grid, codes = module.grid_and_codes()
            before, layer.storage_bits = sum(layer.storage_bits.values()), grid.storage_bits(codes)
            layer.grown_bits = sum(layer.storage_bits.values()) - before
            if self.budget is not None:
                self.budget.grow(layer.name, layer.grown_bits)

    def _reestimate(self) -> None:
        if isinstance(self.calibration, Calibration) and self.calibration.reestimate_batchnorm:
            started = time.perf_counter()
            reestimate(self.adapter, self.batches)
            seconds = self.report.seconds
            seconds["reestimate_batchnorm"] = (
                seconds.get("reestimate_batchnorm", 0.0) + time.perf_counter() - started
            )

    def _reconstruct(
        self,
        unit: Unit,
        original: nn.Module,
        inputs: dict[str, list[Call]],
        progress: bool,
        resume: Resume,
    ) -> None:
        """Train the unit to give what `original`, the float unit, gives on the inputs that the quantized unit
        gets (with target=float_path: on the float network's inputs).
        """
        assert isinstance(self.calibration, Calibration)
        calls = inputs["student" if self.needs_student else "teacher"]
        sources = inputs["teacher"] if self.calibration.target is Target.float_path else calls
        block = self.student.get_submodule(unit.name)
        alone = nn.Sequential(block) if isinstance(block, QuantizedLayer) else None
        problem = BlockProblem(
            name=unit.name,
            block=block if alone is None else alone,
            original=original if alone is None else nn.Sequential(original),
            calls=calls,
            float_calls=inputs.get("teacher"),
            targets=unit_outputs(original, sources, self.device),
            output_gradients=self._output_gradients(unit),
            seed=self.seed,
            progress=progress,
            resume=resume.within("method"),
        )
        if isinstance(self.method, BlockMethod) and self.wants.blocks:
            self._tuned(self.method.tune_block(problem))
        if self._tunes_blocks() and unit.name in self.units_of_several:
            assert self.tuning is not None
            self._tuned(self.tuning.tune_block(replace(problem, resume=resume.within("tuning"))))
        if alone is not None and alone[0] is not block:
            for alias in names_of(self.student, block):
                replace_module(self.student, alias, alone[0])

    def _tunes_blocks(self) -> bool:
        return self.tuning is not None and self.tuning.scope is Scope.block

    def _reconstructs(self, unit: Unit) -> bool:
        """Whether the unit is trained as one after its layers are quantized."""
        blocks = self._tunes_blocks() and unit.name in self.units_of_several
        return unit.replayable and (blocks or self.wants.blocks)

    def _output_gradients(self, unit: Unit) -> list[Tensor] | None:
        if not self.wants.output_gradients:
            return None
        assert self.example is not None
        return output_gradients(self.adapter, self.example, unit.name, self.batches, self.seed)

    def _tuned(self, report: TuningReport) -> None:
        self.report.tuning.append(report)
        self.report.seconds["tune"] = self.report.seconds.get("tune", 0.0) + report.seconds

    def _roles(self) -> list[tuple[str, nn.Module]]:
        roles: list[tuple[str, nn.Module]] = []
        if self.teacher is not None:
            roles.append(("teacher", self.teacher))
        if self.needs_student:
            roles.append(("student", self.student))
        return roles

    def _quantize_stage(
        self, unit: Unit, stage: list[str], inputs: dict[str, list[Call]], bar: tqdm[Any], progress: bool
    ) -> None:
        if not stage:
            return
        started = time.perf_counter()
        seen = self.stage_inputs
        quantizers = seen.quantizers(unit, stage, inputs)
        statistics: dict[str, Statistics] = {}
        if isinstance(self.calibration, Calibration):
            statistics = seen.statistics(unit, stage, inputs, quantizers)
        self.report.seconds["capture"] += time.perf_counter() - started
        for name in stage:
            started = time.perf_counter()
            layer = self.student.get_submodule(name)
            width = self.allocation[name]
            assert width is not None
            if self.budget is not None:
                trained = self.wants.blocks and self._reconstructs(unit)
                width = self.budget.ask(name, width, trained=trained)
            W = weight_matrix(layer).float()
            found = statistics.get(name)
            if isinstance(self.calibration, Calibration):
                assert found is not None
                problem = LayerProblem(name, W, found.H, found.C, self.calibration.target_damping)
            else:
                eye = torch.eye(W.shape[-1], dtype=torch.float64, device=W.device)
                problem = LayerProblem(name, W, eye.expand(W.shape[0], -1, -1))
            problem.progress = progress
            try:
                grid = self.grid if self.mixed is None else self.mixed.grid(name, self.grid)
                with products(tf32=False):
                    codes, fitted = quantize_to_rate(self.method, problem, grid, width, self.bits.group_size)
            except InputError as error:
                raise InputError(f"layer {name!r} {list(W.shape)}: {error}") from error
            # of the runs that met a rate, the one that counts; its seconds are a part of those of solving
            self.report.tuning += [tuned for trained, tuned in problem.trained if trained is codes]
            if self.budget is not None:
                self.budget.spend(name, sum(fitted.storage_bits(codes).values()))
            change = None if found is None else found.bias_change(W, fitted.values(codes))
            replacement = quantized_layer(layer, fitted, codes, quantizers.get(name), change)
            self._replace(
                name, layer, replacement, problem, codes, fitted, width, time.perf_counter() - started
            )
            if self.keeps_all or self._reconstructs(unit):
                self.errors.keep(problem)
            else:
                self.errors.enter(self.report.layers[-1], problem, fitted.values(codes))
            self.report.seconds["solve"] += time.perf_counter() - started
            bar.update()

    def _replace(
        self,
        name: str,
        layer: nn.Module,
        replacement: QuantizedLayer,
        problem: LayerProblem,
        codes: Tensor,
        grid: Grid,
        width: float,
        seconds: float,
    ) -> None:
        if not torch.isfinite(grid.values(codes)).all():
            raise InputError(f"layer {name!r}: quantized weights hold NaN or infinity")
        replacement.to(self.device)
        for alias in names_of(self.student, layer):
            replace_module(self.student, alias, replacement)
        quantizer = replacement.input_quantizer
        self.report.layers.append(
            LayerReport(
                name=name,
                shape=list(problem.W.shape),
                bits=width,
                storage_bits=grid.storage_bits(codes),
                seconds=seconds,
                activation=None if quantizer is None else quantizer.summary(),
                added_bias=layer_bias(layer) is None and replacement.bias is not None,
            )
        )


def _check_finite(module: nn.Module) -> None:
    bad = [
        n
        for n, p in [*module.named_parameters(), *module.named_buffers()]
        if p.is_floating_point() and not torch.isfinite(p).all()
    ]
    if bad:
        raise InputError(f"NaN or infinity in the model's tensors: {', '.join(bad)}; use a sound checkpoint")
