"""One job: a config in, a record out. Everything is checked before anything is computed."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ptq import checkpoint, pipeline
from ptq.allocation import Bits
from ptq.calibration import Calibration, NoCalibration
from ptq.config import build, load_choice
from ptq.data.draw import Samples, calibration_batches
from ptq.data.held_out import HeldOut
from ptq.data.noise import check_job
from ptq.dry_run import describe
from ptq.errors import InputError
from ptq.hardware import device_name, peak_memory_bytes, reset_peak_memory
from ptq.integers import check_integers
from ptq.methods.method import check_bias_correction, check_pair, units_of
from ptq.methods.selecting import SelectingMethod, chooses
from ptq.mixed_precision import MixedBits, check_mixed
from ptq.models.adapter import ModelAdapter
from ptq.observers import Activations, check_activations
from ptq.plan import check_layers
from ptq.precision import products
from ptq.preparation import NoPreparation, Preparation
from ptq.records import RECORD, config_hash, finished, versions, write_json
from ptq.resume import Resume, Store
from ptq.seeding import isolated_seed
from ptq.selection import Trials, select, validation_evaluation
from ptq.tuning import Loss, NoTuning, Scope, Tuning, check_tuning
from ptq.whole_network import WholeNetworkMethod, check_whole

log = logging.getLogger(__name__)
RESUME = "resume"  # folder of an unfinished job's work, beside its record
GROUPS = (
    "model",
    "data",
    "calibration",
    "grid",
    "bits",
    "activations",
    "preparation",
    "method",
    "tuning",
    "eval",
    "tracker",
)


@dataclass(kw_only=True)
class Settings:
    """The root keys of the config that are not groups; conf/config.yaml explains them."""

    name: str
    output_dir: str
    seed: int
    device: str
    progress: bool
    dry_run: bool
    tf32: bool
    bfloat16: bool
    save_model: bool
    save_every_s: float
    rerun: bool

    def __post_init__(self) -> None:
        if self.save_every_s < 0:
            raise InputError(f"save_every_s must not be negative; got {self.save_every_s}")

    def torch_device(self) -> torch.device:
        """The device that computes; InputError where it does not exist."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise InputError(f"device must be auto, cpu, cuda or cuda:N; got {self.device!r}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"device={self.device}: this machine has no CUDA device that torch can use; say device=cpu"
            )
        return device


@dataclass(kw_only=True)
class Parts:
    """The objects of one job, built and checked."""

    adapter: ModelAdapter
    data: Any
    batches: list[Tensor]
    method: Any
    grid: Any
    bits: Bits
    calibration: Calibration | NoCalibration
    activations: Activations
    preparation: Preparation | NoPreparation
    tuning: Tuning | NoTuning
    samples: Samples | None  # what tuning of the whole network goes over
    redraw: Callable[[int], list[Tensor]]  # the batches of the k-th layer, where each has its own
    evaluation: Any
    tracker: Any
    device: torch.device


def run(config: DictConfig, choices: dict[str, str]) -> dict[str, Any]:
    """Do the job that `config` describes, write its record and return it.

    `choices` are the names chosen per group. A job whose record says done is not done again. An error ends in
    a record with status "failed" and is not raised, so that a sweep goes on; with dry_run it is raised and
    nothing is written.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    plain: dict[str, Any] = {str(k): v for k, v in resolved.items() if k != "hydra"}
    settings = build(
        {"_target_": "ptq.runner.Settings", **{k: v for k, v in plain.items() if k not in GROUPS}}
    )
    digest = config_hash(plain)
    directory = job_directory(settings, choices, digest)
    if settings.dry_run:
        with isolated_seed(settings.seed):
            parts = prepare(config, settings)
            print(describe(parts, directory))
        return {"status": "dry_run", "directory": str(directory)}
    _check_writable(directory)
    previous = None if settings.rerun else finished(directory, digest)
    if previous is not None and settings.save_model and not (directory / "model" / "model.json").is_file():
        previous = None
    if previous is not None:
        log.info("already done: %s", directory)
        return {**previous, "directory": str(directory)}
    record: dict[str, Any] = {
        "status": "failed",
        "error": None,
        "config": {**plain, "choices": choices},
        "config_hash": digest,
        "seed": settings.seed,
        "versions": versions(),
    }
    try:
        with isolated_seed(settings.seed), products(tf32=settings.tf32, bfloat16=settings.bfloat16):
            _execute(config, settings, plain, directory, record)
        record["status"] = "done"
    except Exception as error:
        record["error"] = {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": None if isinstance(error, InputError) else traceback.format_exc(),
        }
        log.error("failed: %s: %s", directory.name, error)
    write_json(directory / RECORD, record)
    if record["status"] == "done":
        shutil.rmtree(directory / RESUME, ignore_errors=True)
        log.info("%s", summary(record))
    try:
        build(config.tracker, "tracker").log(record, directory)
    except InputError:
        if record["status"] == "done":
            raise
    return {**record, "directory": str(directory)}


def job_directory(settings: Settings, choices: dict[str, str], digest: str) -> Path:
    """outputs/<name>/<model>/<method>-<grid>-<bits>-<calibration>-seed<N>-<hash>."""
    words = [choices.get(g, "custom") for g in ("method", "grid", "bits", "calibration")]
    label = "-".join([*words, f"seed{settings.seed}", digest[:8]])
    return (
        Path(settings.output_dir).absolute()
        / settings.name
        / choices.get("model", "custom")
        / re.sub(r"[^\w.-]+", "_", label)
    )


def prepare(config: DictConfig, settings: Settings) -> Parts:
    """Build every object of the job and check what can be checked without quantizing; raises InputError."""
    device = settings.torch_device()
    method = build(config.method, "method")
    grid = build(config.grid, "grid")
    bits = build(config.bits, "bits")
    calibration = build(config.calibration, "calibration")
    activations = build(config.activations, "activations")
    preparation = build(config.preparation, "preparation")
    tuning = build(config.tuning, "tuning")
    evaluation = build(config.eval, "eval")
    tracker = build(config.tracker, "tracker")
    data = build(config.data, "data")
    check_pair(method, grid)
    check_tuning(tuning, calibration)
    if evaluation.integers:
        check_integers(bits, grid, activations)
    check_activations(activations, bits.activation_widths(), calibration)
    if isinstance(bits, MixedBits):
        check_mixed(bits, method, grid, calibration)
    for width in bits.widths():
        grid.check(width, bits.group_size)
    if isinstance(calibration, NoCalibration) and method.needs_gram:
        raise InputError(
            f"method {type(method).__name__} needs calibration data; choose another calibration than none"
        )
    model = build(config.model, "model")
    adapter = model.load()
    if isinstance(preparation, Preparation):
        preparation.check(adapter)
    if isinstance(method, WholeNetworkMethod):
        check_whole(adapter, bits, calibration, activations, tuning)
    else:
        check_bias_correction(method, calibration)
    units_of(method, adapter)
    data.check(adapter)
    source = data
    if isinstance(calibration, Calibration) and calibration.source is not None:
        source = build(load_choice("data", calibration.source), "calibration.source")
        source.check(adapter)
    check_job(data, source, isinstance(tuning, Tuning) and tuning.loss is Loss.cross_entropy)
    if chooses(method, grid):
        data, source = HeldOut(data), HeldOut(source)
    batches = calibration_batches(source, adapter, calibration, settings.seed)
    samples = None
    if isinstance(tuning, Tuning) and tuning.scope is Scope.network and isinstance(calibration, Calibration):
        samples = Samples(
            source,
            adapter,
            calibration,
            num_samples=tuning.num_samples,
            batch_size=tuning.batch_size,
            seed=settings.seed,
        )
    check_layers(adapter, bits)
    return Parts(
        adapter=adapter,
        data=data,
        batches=batches,
        method=method,
        grid=grid,
        bits=bits,
        calibration=calibration,
        activations=activations,
        preparation=preparation,
        tuning=tuning,
        samples=samples,
        redraw=lambda k: calibration_batches(source, adapter, calibration, settings.seed + k),
        evaluation=evaluation,
        tracker=tracker,
        device=device,
    )


def _execute(
    config: DictConfig, settings: Settings, plain: dict[str, Any], directory: Path, record: dict[str, Any]
) -> None:
    """Fill `record` with what the job finds."""
    clock = _Clock()
    reset_peak_memory(settings.torch_device())
    parts = prepare(config, settings)
    parts.adapter.module.to(parts.device)
    record["device"] = device_name(parts.device)
    clock.lap("load")
    record["float"] = _float_metrics(parts, settings, plain)
    clock.lap("float_eval")
    if isinstance(parts.preparation, Preparation):
        parts.preparation.apply(parts.adapter, parts.batches[0].to(parts.device))
        clock.lap("prepare")
    if chooses(parts.method, parts.grid):
        record["selection"] = _select(parts, settings, plain)
        clock.lap("select")
    store = _store(settings, directory, record, parts.device)
    report = pipeline.quantize(
        parts.adapter,
        parts.batches,
        method=parts.method,
        grid=parts.grid,
        bits=parts.bits,
        calibration=parts.calibration,
        activations=parts.activations,
        tuning=parts.tuning,
        samples=parts.samples,
        redraw=parts.redraw,
        device=parts.device,
        seed=settings.seed,
        progress=settings.progress,
        resume=Resume(store),
    )
    clock.lap("calibrate_and_quantize", store.spent.seconds)
    module = parts.adapter.module
    record["quantized"] = parts.evaluation.run(
        parts.adapter, module, parts.data, parts.device, settings.progress
    )
    clock.lap("evaluate")
    record["bits_per_coefficient"] = report.bits_per_coefficient()
    record["file_bits_per_coefficient"] = 8 * checkpoint.file_bytes(module) / max(1, report.weights())
    record["model_bits_per_coefficient"] = report.model_bits_per_coefficient(module)
    record["layers"] = [
        {
            **asdict(layer),
            "bits_per_coefficient": sum(layer.storage_bits.values()) / torch.Size(layer.shape).numel(),
        }
        for layer in report.layers
    ]
    record["skipped_layers"] = report.skipped
    if report.mixed_precision is not None:
        record["mixed_precision"] = report.mixed_precision
    record["tuning"] = [asdict(unit) for unit in report.tuning]
    if settings.save_model:
        checkpoint.save(module, directory / "model", plain["model"])
        record["saved_bytes"] = checkpoint.quantized_bytes(directory / "model")
        clock.lap("save")
    record["seconds"] = {**clock.laps, **report.seconds, "total": clock.total()}
    record["interruptions"] = store.spent.runs
    record["peak_memory_bytes"] = max(peak_memory_bytes(parts.device), store.spent.peak_memory_bytes)


def _store(settings: Settings, directory: Path, record: dict[str, Any], device: torch.device) -> Store:
    """What interrupted runs of this very job have left; empty where there is none."""
    folder = directory / RESUME
    if settings.rerun:
        shutil.rmtree(folder, ignore_errors=True)
    identity = {"config_hash": record["config_hash"], "versions": record["versions"], "device": device.type}
    return Store(folder, identity, settings.save_every_s, lambda: peak_memory_bytes(device))


def _select(parts: Parts, settings: Settings, plain: dict[str, Any]) -> dict[str, Any]:
    """Put the grid that the method chooses by the task into `parts`; facts about the choice.

    Trials are kept under output_dir for a model × data × eval × validation split × seed × device, and for all
    of `bits` but the width that the method varies.
    """
    method = parts.method
    assert isinstance(method, SelectingMethod)
    evaluation = validation_evaluation(method, parts.evaluation)
    key = config_hash(
        {
            **_what_is_evaluated(parts, plain),
            "validation": asdict(evaluation),
            "bits": {**plain["bits"], "weight": None},
            "calibration_source": plain["calibration"].get("source"),
            "preparation": plain["preparation"],
            "seed": settings.seed,
        }
    )
    trials = Trials(
        adapter=parts.adapter,
        batch=parts.batches[0][:2],
        method=method,
        bits=parts.bits,
        data=parts.data,
        evaluation=evaluation,
        device=parts.device,
        seed=settings.seed,
        path=Path(settings.output_dir).absolute() / ".selection" / f"{key}.jsonl",
    )
    selection = select(method, parts.grid, trials)
    parts.grid = selection.grid
    return selection.facts


def _what_is_evaluated(parts: Parts, plain: dict[str, Any]) -> dict[str, Any]:
    """Model, its weights' file, data, eval and the machine's kind: what a metric depends on besides the
    quantization.
    """
    source = parts.adapter.source
    stamp = None
    if source is not None and Path(source).exists():
        stat = Path(source).stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
    # only a source that tests on its calibration images has other test images where a method chooses
    held_out = {"held_out": True} if isinstance(parts.data, HeldOut) and parts.data.changes_test else {}
    return {
        **{g: plain[g] for g in ("model", "data", "eval")},
        "device": parts.device.type,
        "stamp": stamp,
        "torch": torch.__version__,
        "tf32": plain["tf32"],
        **held_out,
    }


def _float_metrics(parts: Parts, settings: Settings, plain: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the float model, computed once for a model × data × eval × device and kept under
    output_dir.
    """
    key = config_hash(_what_is_evaluated(parts, plain))
    path = Path(settings.output_dir).absolute() / ".float_metrics" / f"{key}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    metrics = dict(
        parts.evaluation.run(parts.adapter, parts.adapter.module, parts.data, parts.device, settings.progress)
    )
    write_json(path, metrics)
    return metrics


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str, earlier: float = 0.0) -> None:
        """A phase ends; runs that were interrupted have spent `earlier` seconds on it."""
        now = time.perf_counter()
        self.laps[phase], self.last = now - self.last + earlier, now
        self.start -= earlier

    def total(self) -> float:
        return time.perf_counter() - self.start


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"output folder {directory} cannot be written: {error.strerror}; set output_dir to another place"
        ) from error


def summary(record: dict[str, Any]) -> str:
    """One line: what was run, the quantized metric beside the float one, bits, seconds."""
    choices = record["config"]["choices"]
    metric = next(m for m in ("top1", "perplexity") if m in record["quantized"])
    return (
        f"{choices.get('model')} {choices.get('method')} {choices.get('bits')}: "
        f"{metric} {record['quantized'][metric]:.4g} (float {record['float'][metric]:.4g}), "
        f"{record['bits_per_coefficient']['total']:.3f} bits per coefficient, "
        f"{record['seconds']['total']:.1f} s"
    )
