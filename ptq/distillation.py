"""Label-free training of a quantized network against the float one, as a whole.

The loss compares the feature map before global pooling, the logits, or both. A part of the images is held
out; the parameters of the epoch that does best on it stay, those of the start included.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter
from ptq.models.graph import ScaleGraph
from ptq.precision import learning
from ptq.report import TuningReport
from ptq.resume import Resume

log = logging.getLogger(__name__)
CURVE_POINTS = 100  # means of the loss kept for the record
TINY = 1e-12  # added to a norm that is divided by


class Target(Enum):
    """What the student shall reproduce."""

    backbone = "backbone"  # the feature map before global pooling; where no module gives it, the head's input
    logits = "logits"
    both = "both"  # the sum of both losses: only so does the head learn too


class Distance(Enum):
    """How it is compared."""

    relative_l2 = "relative_l2"  # Σ(student − teacher)² / Σ teacher²
    l2 = "l2"  # mean of the squared differences
    cosine = "cosine"  # 1 − cosine of the angle, mean over images
    kl = "kl"  # divergence of the class probabilities; logits only


@dataclass(kw_only=True)
class Distillation:
    """How to train."""

    target: Target
    distance: Distance
    epochs: int
    batch_size: int
    cycles: int  # cosine decays to zero, one after the other
    validation_fraction: float  # images held out to choose the epoch; 0 = chosen on those trained on
    flip: bool  # images mirrored at random, the same for student and teacher
    shift: int  # pixels that images are moved at random at most, filled with zeros
    seed: int
    progress: bool


class Outputs:
    """Runs a network and returns what the target names: [features], [logits] or both."""

    def __init__(self, adapter: ModelAdapter, module: nn.Module, graph: ScaleGraph, target: Target) -> None:
        self.forward, self.module, self.target = adapter.forward, module, target
        self.features: list[Tensor] = []
        if graph.feature is None:
            head = module.get_submodule(graph.head)
            self.handle = head.register_forward_pre_hook(lambda _, args: self.features.append(args[0]))
        else:
            part = module.get_submodule(graph.feature)
            self.handle = part.register_forward_hook(lambda _, args, out: self.features.append(out))

    def __call__(self, batch: Tensor) -> list[Tensor]:
        self.features.clear()
        logits = self.forward(self.module, batch)
        wanted = [] if self.target is Target.logits else [self.features[-1]]
        return wanted if self.target is Target.backbone else [*wanted, logits]

    def close(self) -> None:
        self.handle.remove()


def distance(kind: Distance, student: Tensor, teacher: Tensor) -> Tensor:
    """How far the student's output is from the teacher's."""
    if kind is Distance.relative_l2:
        return (student - teacher).square().sum() / (teacher.square().sum() + TINY)
    if kind is Distance.l2:
        return F.mse_loss(student, teacher)
    if kind is Distance.cosine:
        return 1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), eps=TINY).mean()
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def distill(
    adapter: ModelAdapter,
    teacher: nn.Module,
    graph: ScaleGraph,
    images: Tensor,
    groups: list[dict[str, Any]],
    settings: Distillation,
    resume: Resume,
) -> TuningReport:
    """Train the parameters of `groups` (each with its rate "lr") of `adapter.module` on `images`. A loss that
    is not finite ends the training.
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(images), generator=generator)
    held = round(settings.validation_fraction * len(images))
    if held >= len(images):
        raise InputError(
            f"validation_fraction={settings.validation_fraction} leaves none of {len(images)} images to "
            "train on; lower it, or raise calibration.num_samples"
        )
    training, validation = order[held:], order[:held] if held else order
    student = Outputs(adapter, adapter.module, graph, settings.target)
    example = Outputs(adapter, teacher, graph, settings.target)
    moves = settings.flip or settings.shift > 0
    # images that move have targets of their own at each step: the others' are computed once
    wanted = _Targets(
        example, images, validation if moves else torch.arange(len(images)), settings.batch_size
    )

    def loss(batch: Tensor, targets: Sequence[Tensor]) -> Tensor:
        terms = [distance(settings.distance, s, t) for s, t in zip(student(batch), targets, strict=True)]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def validate() -> float:
        total = 0.0
        for index in validation.split(settings.batch_size):
            total += float(loss(images[index], wanted[index])) * len(index)
        return total / len(validation)

    parameters = [p for group in groups for p in group["params"]]
    run = _Run(parameters, validate())
    if parameters:
        optimizer = torch.optim.Adam(groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        run.load(resume.load("epochs"), optimizer, generator)
        total = settings.epochs * math.ceil(len(training) / settings.batch_size)
        bar = tqdm(
            total=total,
            initial=len(run.losses),
            desc="train network",
            unit="step",
            disable=not settings.progress,
            delay=1,
        )
        for epoch in range(run.epoch, settings.epochs):
            shuffled = training[torch.randperm(len(training), generator=generator)]
            for index in shuffled.split(settings.batch_size):
                factor = (1 + math.cos(math.pi * (len(run.losses) / total * settings.cycles % 1))) / 2
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                batch = images[index]
                if moves:
                    batch = moved(batch, settings, generator)
                with torch.no_grad():
                    targets = example(batch) if moves else wanted[index]
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    with learning():
                        value = loss(batch, targets)
                    value.backward()
                number = float(value.detach())
                if not math.isfinite(number):
                    run.ended = True
                    break
                optimizer.step()
                run.losses.append(number)
                bar.update()
                bar.set_postfix(loss=f"{run.losses[-1]:.4g}", best=f"{run.best:.4g}", refresh=False)
            if run.ended:
                log.warning(
                    "the network's loss is no longer finite at step %d of %d: training ends, and the best "
                    "parameters until then stay; lower the method's rates",
                    len(run.losses) + 1,
                    total,
                )
                break
            run.finish_epoch(epoch, validate())
            resume.save("epochs", lambda: run.state(optimizer, generator))
        bar.close()
        run.restore_best()
    student.close()
    example.close()
    return TuningReport(
        unit="network",
        loss_before=run.first,
        loss_after=run.best,
        kept=run.best < run.first,
        steps=len(run.losses),
        seconds=time.perf_counter() - started,
        losses=_curve(run.losses),
    )


class _Targets:
    """What the float network gives for some of the images, by the images' numbers."""

    def __init__(self, network: Outputs, images: Tensor, numbers: Tensor, batch_size: int) -> None:
        self.place = torch.full((len(images),), -1)
        self.place[numbers] = torch.arange(len(numbers))
        self.outputs: list[Tensor] = []
        with torch.no_grad():
            for part in numbers.split(batch_size):
                found = network(images[part])
                if not self.outputs:
                    self.outputs = [t.new_empty(len(numbers), *t.shape[1:]) for t in found]
                for whole, t in zip(self.outputs, found, strict=True):
                    whole[self.place[part]] = t

    def __getitem__(self, numbers: Tensor) -> list[Tensor]:
        return [t[self.place[numbers]] for t in self.outputs]


class _Run:
    """How far training is, and the parameters that did best so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], first: float) -> None:
        self.parameters, self.first, self.best = parameters, first, first
        self.kept = _copies(parameters)
        self.epoch = 0  # the next one
        self.losses: list[float] = []  # of each step
        self.ended = False  # by a loss that was not finite

    def finish_epoch(self, epoch: int, loss: float) -> None:
        self.epoch = epoch + 1
        if loss < self.best:  # false for NaN
            self.best, self.kept = loss, _copies(self.parameters)

    def restore_best(self) -> None:
        with torch.no_grad():
            for p, value in zip(self.parameters, self.kept, strict=True):
                p.copy_(value)

    def state(self, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "first": self.first,
            "best": self.best,
            "kept": self.kept,
            "losses": self.losses,
            "parameters": _copies(self.parameters),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
        }

    def load(
        self, state: dict[str, Any] | None, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Go on from what an interrupted run kept, if anything."""
        if state is None:
            return
        self.epoch, self.first, self.best = state["epoch"], state["first"], state["best"]
        self.losses = state["losses"]
        self.kept = [t.to(p.device) for t, p in zip(state["kept"], self.parameters, strict=True)]
        with torch.no_grad():
            for p, value in zip(self.parameters, state["parameters"], strict=True):
                p.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])


def moved(images: Tensor, settings: Distillation, generator: torch.Generator) -> Tensor:
    """Images [n, channels, h, w], each mirrored and shifted at random as the settings allow."""
    count, reach = len(images), settings.shift
    if settings.flip:
        mirror = torch.rand(count, generator=generator).to(images.device) < 0.5
        images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
    if reach == 0:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, [reach] * 4)
    corners = torch.randint(2 * reach + 1, (count, 2), generator=generator).tolist()
    return torch.stack(
        [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
    )


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that nothing trains."""
    return copy.deepcopy(module).requires_grad_(False)


def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _curve(losses: list[float]) -> list[float]:
    size = math.ceil(len(losses) / CURVE_POINTS) or 1
    return [sum(losses[k : k + size]) / len(losses[k : k + size]) for k in range(0, len(losses), size)]
