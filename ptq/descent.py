"""Gradient descent as a choice: which optimizer, at which rates, along which schedule, for how many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptq.errors import InputError


class Optimizer(Enum):
    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"
    adamax = "adamax"
    radam = "radam"
    sign = "sign"  # a step is the rate times the gradient's sign


class Schedule(Enum):
    constant = "constant"
    linear = "linear"  # to zero at the end
    cosine = "cosine"  # likewise


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How to descend; rates are given with the variables."""

    optimizer: Optimizer
    betas: tuple[float, float]  # of the Adam family
    momentum: float  # of sgd
    weight_decay: float
    iterations: int

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise InputError(f"iterations must not be negative; got {self.iterations}")
        if not all(0 <= b < 1 for b in self.betas) or not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise InputError(
                "betas and momentum must be in [0, 1) and weight_decay not negative; "
                f"got {list(self.betas)}, {self.momentum} and {self.weight_decay}"
            )

        if self.optimizer is Optimizer.sign and self.weight_decay:
            raise InputError(f"optimizer=sign takes no weight_decay; got {self.weight_decay}; leave it at 0")
        if self.momentum and self.optimizer is not Optimizer.sgd:
            raise InputError(
                f"momentum is of optimizer=sgd; got {self.momentum} with {self.optimizer.value}; "
                "leave it at 0"
            )

    def start(self, groups: Sequence[tuple[list[Tensor], float, Schedule]]) -> Stepper:
        """An optimizer over groups of (variables, rate, schedule); empty groups are left out."""
        kept = [(variables, rate, schedule) for variables, rate, schedule in groups if variables]
        options: list[dict[str, Any]] = [{"params": variables, "lr": rate} for variables, rate, _ in kept]
        return Stepper(self._build(options), [schedule for _, _, schedule in kept], self.iterations)

    def _build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        decay = self.weight_decay
        if self.optimizer is Optimizer.sgd:
            return torch.optim.SGD(groups, momentum=self.momentum, weight_decay=decay)
        if self.optimizer is Optimizer.sign:
            return SignDescent(groups)
        kinds: dict[Optimizer, Any] = {
            Optimizer.adam: partial(torch.optim.Adam, fused=True),
            Optimizer.adamw: partial(torch.optim.AdamW, fused=True),
            Optimizer.adamax: torch.optim.Adamax,
            Optimizer.radam: torch.optim.RAdam,
        }
        optimizer: torch.optim.Optimizer = kinds[self.optimizer](groups, betas=self.betas, weight_decay=decay)
        return optimizer


class Stepper:
    """An optimizer with its schedules."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedules: list[Schedule], iterations: int) -> None:
        self.optimizer, self.schedules, self.iterations = optimizer, schedules, iterations
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, index: int) -> None:
        """The step number `index`, counted from 0."""
        for group, rate, schedule in zip(
            self.optimizer.param_groups, self.rates, self.schedules, strict=True
        ):
            group["lr"] = rate * factor(schedule, index / max(1, self.iterations))
        self.optimizer.step()


class SignDescent(torch.optim.Optimizer):
    """Every variable moves by its rate against the sign of its gradient."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nothing here takes a closure
        """One step for every variable that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def factor(schedule: Schedule, progress: float) -> float:
    """What the rate is multiplied by at this fraction of the steps."""
    if schedule is Schedule.linear:
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2 if schedule is Schedule.cosine else 1.0
