"""Tuning: training of float parameters (scales, offsets, levels, norms, biases, scales of quantized inputs)
with the codes frozen.

Block scope is decoupleQ's block-wise stage (Guo et al., arXiv 2404.12759, Eq. 2): after all layers of a block
are quantized, the float parameters are trained so that the quantized block gives what the float block gives
on the same input, the one that the quantized prefix delivers. Network scope matches the float network's
output (no labels), or, with loss=cross_entropy, the labels: COMQ's norm tuning and decoupleQ's "+sft", which
are supervised fine-tuning and not PTQ.
Both are independent of how the codes were found, so they go with every method and every grid. Our additions:
any repeated part of a model is a block (residual blocks too), rates relative to each parameter's size, and a
return to the start where training did not lower the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq.activations import ActivationQuantizer, LearnedSteps
from ptq.block_calls import Float32, float32, separable, slices
from ptq.block_problem import BlockProblem
from ptq.calibration import Calibration, NoCalibration
from ptq.errors import InputError
from ptq.layers import QuantizedLayer, TrainableLayer, names_of, replace_module
from ptq.losses import mean_square
from ptq.models.adapter import QUANTIZABLE, ModelAdapter
from ptq.plan import Call, first_tensor, map_tensors
from ptq.precision import learning
from ptq.report import TuningReport
from ptq.resume import Resume
from ptq.training import TrainingRun

TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


class Scope(Enum):
    """What is trained as one."""

    block = "block"
    network = "network"


class Loss(Enum):
    """What training lowers."""

    mse = "mse"  # mean squared difference of outputs: the block's, or the network's logits
    relative_mse = "relative_mse"  # the same over the mean square of the float outputs
    kl = "kl"  # Kullback–Leibler divergence of the float network's class or token probabilities
    cross_entropy = "cross_entropy"  # of labels (for text, the next tokens): supervised


class Optimizer(Enum):
    adam = "adam"
    sgd = "sgd"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"  # to zero over all steps


@runtime_checkable
class Drawn(Protocol):
    """Samples that come in an order of their own, new in each pass."""

    generator: torch.Generator


@dataclass(kw_only=True)
class NoTuning:
    """Codes and grids stay as the method left them."""


@dataclass(kw_only=True)
class Tuning:
    """How to train, and which float parameters."""

    scope: Scope
    loss: Loss
    grids: bool  # scales, offsets, levels of the quantized layers
    norms: bool  # weights and biases of normalisation layers
    biases: bool  # of the quantized layers
    activations: bool  # scales of the quantized layers' inputs, where these are quantized (LSQ)
    others: bool  # all but layers: class token, positions, attention tables; biases of float convolutions too
    optimizer: Optimizer
    learning_rate: float
    relative_rate: bool  # the rate is multiplied by the root mean square of each parameter tensor
    schedule: Schedule
    betas: list[float]  # of adam
    epsilon: float  # of adam
    momentum: float  # of sgd
    weight_decay: float
    epochs: int
    batch_size: int  # samples a step
    num_samples: int | None  # network scope: samples of the calibration split; null = the calibration set
    train_mode: bool  # BatchNorm on batch statistics, dropout and stochastic depth active
    keep_best: bool  # go back to the start where the mean loss did not fall

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.epochs < 1 or self.batch_size < 1:
            raise InputError(
                "tuning needs learning_rate > 0, epochs and batch_size of at least 1; "
                f"got {self.learning_rate}, {self.epochs} and {self.batch_size}"
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InputError(f"tuning.betas must be two numbers in [0, 1); got {self.betas}")
        if not (self.grids or self.norms or self.biases or self.activations or self.others):
            raise InputError(
                "tuning has nothing to train: set one of grids, norms, biases, activations, others to true, "
                "or tuning=none"
            )
        if self.scope is Scope.block and self.loss not in (Loss.mse, Loss.relative_mse):
            raise InputError(
                f"tuning.loss={self.loss.value} compares class probabilities, which a block has none of; "
                "use mse or relative_mse, or tuning.scope=network"
            )
        if self.scope is Scope.block and self.num_samples is not None:
            raise InputError(
                "tuning.num_samples serves scope=network only; blocks are tuned on the calibration set: "
                "set calibration.num_samples"
            )

    def tune_block(self, problem: BlockProblem) -> TuningReport:
        """Train the block in place so that it maps the calls to the targets."""
        block, calls, targets = problem.block, problem.calls, problem.targets
        with Float32(block), Float32(problem.original), torch.enable_grad():
            cut = separable(problem.original, calls, targets, self.batch_size)
            pieces = list(slices(calls, targets, self.batch_size, cut))
            scale = mean_square(targets) if self.loss is Loss.relative_mse else 1.0
            device = next((t.device for t in [*block.parameters(), *block.buffers()]), torch.device("cpu"))

            def loss(piece: tuple[Call, Tensor]) -> Tensor:
                call, target = piece[0].to(device).cloned(), piece[1].to(device)
                output = first_tensor(block(*float32(call.args), **float32(call.kwargs)))
                assert output is not None
                return F.mse_loss(output, target.float()) / scale

            return self._train(
                block,
                pieces,
                loss,
                lambda p: len(p[1]),
                problem.name,
                problem.seed,
                problem.progress,
                problem.resume,
            )

    def tune_network(
        self,
        adapter: ModelAdapter,
        teacher: nn.Module | None,
        samples: Iterable[tuple[Tensor, Tensor | None]],
        *,
        device: torch.device,
        seed: int,
        progress: bool,
        resume: Resume,
    ) -> TuningReport:
        """Train `adapter.module` in place on `samples`: pairs of a batch and its labels (None where there are
        none).

        `teacher` is the float network; None serves loss=cross_entropy.
        """
        student = adapter.module
        scale = 1.0
        if self.loss is Loss.relative_mse:
            assert teacher is not None
            with torch.no_grad():
                scale = mean_square([adapter.forward(teacher, x.to(device)) for x, _ in samples])

        def loss(piece: tuple[Tensor, Tensor | None]) -> Tensor:
            batch = map_tensors(piece[0], lambda t: t.to(device))
            logits = adapter.forward(student, batch).float()
            if self.loss is Loss.cross_entropy:
                return _cross_entropy(adapter, logits, batch, piece[1])
            assert teacher is not None
            with torch.no_grad():
                wanted = adapter.forward(teacher, batch).float()
            if self.loss is Loss.kl:
                classes = logits.shape[-1]
                return F.kl_div(
                    logits.reshape(-1, classes).log_softmax(-1),
                    wanted.reshape(-1, classes).log_softmax(-1),
                    reduction="batchmean",
                    log_target=True,
                )
            return F.mse_loss(logits, wanted) / scale

        with torch.enable_grad():
            return self._train(student, samples, loss, lambda p: len(p[0]), "network", seed, progress, resume)

    def _train(
        self,
        module: nn.Module,
        pieces: Iterable[Any],
        loss: Callable[[Any], Tensor],
        count: Callable[[Any], int],
        name: str,
        seed: int,
        progress: bool,
        resume: Resume,
    ) -> TuningReport:
        started = time.perf_counter()
        flags = {p: p.requires_grad for p in module.parameters()}
        modes = {m: m.training for m in module.modules()}
        _exchange(module, QuantizedLayer, TrainableLayer)
        for p in module.parameters():
            p.requires_grad_(False)
        free = self._free(module)
        before = after = math.nan
        run: TrainingRun | None = None
        if free:
            statistics = {n: b.clone() for n, b in module.named_buffers() if n.rpartition(".")[2] in RUNNING}
            start = [p.detach().clone() for p in free]
            before = _mean_loss(pieces, loss, count)
            module.train(self.train_mode)
            moving = [b for n, b in module.named_buffers() if n in statistics]
            inputs = [q.scale for q in module.modules() if isinstance(q, ActivationQuantizer)]
            scales = [p for p in free if any(p is scale for scale in inputs)]
            run = self._descend([*free, *moving], free, scales, pieces, loss, seed, name, progress, resume)
            for m, training in modes.items():
                m.training = training
            after = _mean_loss(pieces, loss, count)
        kept = bool(free) and math.isfinite(after) and (after < before or not self.keep_best)
        if free and not kept:
            with torch.no_grad():
                for p, value in zip(free, start, strict=True):
                    p.copy_(value)
                for n, b in module.named_buffers():
                    if n in statistics:
                        b.copy_(statistics[n])
        for p in module.parameters():
            p.requires_grad_(flags.get(p, False))
        _exchange(module, TrainableLayer, TrainableLayer.frozen)
        return TuningReport(
            unit=name,
            loss_before=before,
            loss_after=after,
            kept=kept,
            steps=0 if run is None else run.step,
            seconds=time.perf_counter() - started,
            losses=[] if run is None else run.losses,
        )

    def _free(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters to train, each once."""
        free: dict[int, nn.Parameter] = {}

        def add(parameters: Iterable[nn.Parameter]) -> None:
            for p in parameters:
                if p.is_floating_point():
                    p.requires_grad_(True)
                    free[id(p)] = p

        taken: set[int] = set()
        for part in module.modules():
            own = list(part.parameters(recurse=False))
            if isinstance(part, TrainableLayer):
                taken |= {id(p) for p in part.parameters()}
                if self.grids:
                    add(part.free.values())
                if self.biases and part.bias is not None:
                    add([part.bias])
                if self.activations and part.input_quantizer is not None:
                    add(part.input_quantizer.parameters())
            elif isinstance(part, QUANTIZABLE):
                linear = not isinstance(part, nn.Conv2d)
                taken |= {id(p) for p in own if linear or p is not part.bias}
            elif is_norm(part):
                taken |= {id(p) for p in own}
                if self.norms:
                    add(own)
        if self.others:
            add(p for p in module.parameters() if id(p) not in taken)
        return list(free.values())

    def _descend(
        self,
        changing: Sequence[Tensor],
        free: Sequence[nn.Parameter],
        scales: Sequence[nn.Parameter],
        pieces: Iterable[Any],
        loss: Callable[[Any], Tensor],
        seed: int,
        name: str,
        progress: bool,
        resume: Resume,
    ) -> TrainingRun:
        """Run all epochs; stops at a loss that is not finite. `changing`: `free`, and statistics of norms;
        `scales`: those of `free` that are steps of inputs.
        """
        sizes = [float(p.detach().square().mean().sqrt()) if self.relative_rate else 1.0 for p in free]
        groups = [
            {"params": [p], "lr": self.learning_rate * (size or 1.0)}
            for p, size in zip(free, sizes, strict=True)
        ]
        optimizer: torch.optim.Optimizer
        if self.optimizer is Optimizer.adam:
            optimizer = torch.optim.Adam(
                groups,
                betas=(self.betas[0], self.betas[1]),
                eps=self.epsilon,
                weight_decay=self.weight_decay,
            )
        else:
            optimizer = torch.optim.SGD(groups, momentum=self.momentum, weight_decay=self.weight_decay)
        steps = LearnedSteps(scales)
        number = _length(pieces)
        total = number * self.epochs
        rates = [group["lr"] for group in optimizer.param_groups]
        generator = torch.Generator().manual_seed(seed)
        run = TrainingRun(
            f"tune {name}",
            total,
            resume=resume,
            progress=progress,
            tensors=changing,
            parts=[optimizer],
            generators=[generator, *([pieces.generator] if isinstance(pieces, Drawn) else [])],
        )
        for _ in run.rounds(self.epochs):
            for piece in _shuffled(pieces, generator):
                cosine = (1 + math.cos(math.pi * run.step / total)) / 2
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (cosine if self.schedule is Schedule.cosine else 1.0)
                optimizer.zero_grad(set_to_none=True)
                with learning():
                    value = loss(piece)
                if not torch.isfinite(value):
                    return run
                value.backward()
                optimizer.step()
                steps.keep_positive()
                run.record(value)
        return run


def check_tuning(tuning: Tuning | NoTuning | None, calibration: Calibration | NoCalibration) -> None:
    """Raise InputError where tuning would have no data."""
    if isinstance(tuning, Tuning) and isinstance(calibration, NoCalibration):
        raise InputError("tuning trains on calibration samples; choose tuning=none with calibration=none")


RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's norms, and the RMS norms that models bring themselves."""
    return isinstance(module, TORCH_NORMS) or type(module).__name__.endswith("Norm")


def _exchange(root: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Replace every `kind` inside `root`, under all of its names."""
    for part in [m for m in root.modules() if isinstance(m, kind)]:
        made = make(part)
        for name in names_of(root, part):
            replace_module(root, name, made)


@torch.no_grad()
def _mean_loss(pieces: Iterable[Any], loss: Callable[[Any], Tensor], count: Callable[[Any], int]) -> float:
    total, samples = 0.0, 0
    for piece in pieces:
        total, samples = total + float(loss(piece)) * count(piece), samples + count(piece)
    return total / max(1, samples)


def _length(pieces: Iterable[Any]) -> int:
    return len(pieces) if isinstance(pieces, Sequence) else sum(1 for _ in pieces)


def _shuffled(pieces: Iterable[Any], generator: torch.Generator) -> Iterator[Any]:
    """The pieces in random order where they are all at hand, else as the stream delivers them."""
    if isinstance(pieces, Sequence):
        for index in torch.randperm(len(pieces), generator=generator).tolist():
            yield pieces[index]
    else:
        yield from pieces


def _cross_entropy(adapter: ModelAdapter, logits: Tensor, batch: Any, labels: Tensor | None) -> Tensor:
    if adapter.task == "language_modeling":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    if labels is None:
        raise InputError(
            "tuning.loss=cross_entropy needs labels, and these calibration samples have none; "
            "use mse, relative_mse or kl"
        )
    return F.cross_entropy(logits, labels.to(logits.device))
