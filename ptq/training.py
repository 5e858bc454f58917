"""The bookkeeping of a loop of gradient descent: a bar with loss and time left, the curve of losses, and its
state, kept so that an interrupted loop goes on where it was last saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ptq.resume import Resume

POINTS = 100  # of a curve, at most
KEY = "training"


class Stateful(Protocol):
    """An optimizer, a schedule, or whatever else changes as a loop runs. States are as Resume wants them."""

    def state_dict(self) -> Any:
        """What `load_state_dict` takes."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Be as when `state` was asked for."""


class TrainingRun:
    """One loop of `steps` steps.

        run = TrainingRun("tune block 3", 1000, resume=problem.resume, progress=problem.progress,
                          tensors=free, parts=[optimizer], generators=[generator])
        for epoch in run.rounds(10):
            for piece in pieces:
                value = loss(piece)
                if not run.record(value):
                    return
                ...

    A round is what is either done or not: an epoch, or a single step. `tensors` are changed in place by the
    loop; with `parts` and `generators` they must be all that a round leaves to the next.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        *,
        resume: Resume,
        progress: bool,
        tensors: Sequence[Tensor],
        parts: Sequence[Stateful] = (),
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.title, self.steps, self.resume, self.progress = title, steps, resume, progress
        self.tensors, self.parts, self.generators = list(tensors), list(parts), list(generators)
        self.step = 0  # steps done
        self._sums, self._counts = [0.0] * min(POINTS, steps), [0] * min(POINTS, steps)
        self._bar: tqdm[Any] | None = None

    @property
    def losses(self) -> list[float]:
        """Mean loss in each of up to a hundred equal stretches of the run."""
        return [total / n for total, n in zip(self._sums, self._counts, strict=True) if n]

    def rounds(self, number: int) -> Iterator[int]:
        """0, 1, … number − 1, less those that an interrupted run has done."""
        first = self._restore()
        with tqdm(
            total=self.steps,
            initial=self.step,
            desc=self.title,
            unit="step",
            disable=not self.progress,
            delay=1,
            leave=False,
        ) as self._bar:
            for index in range(first, number):
                yield index
                self.resume.save(KEY, partial(self._state, index + 1))

    def record(self, loss: Tensor | float) -> bool:
        """Enter the loss of one step; False, and nothing entered, where it is not finite."""
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(value):
            return False
        point = min(self.step * len(self._sums) // self.steps, len(self._sums) - 1)
        self._sums[point] += value
        self._counts[point] += 1
        self.step += 1
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            self._bar.update()
        return True

    def _state(self, rounds: int) -> dict[str, Any]:
        return {
            "rounds": rounds,
            "step": self.step,
            "curve": (self._sums, self._counts),
            "tensors": [tensor.detach().clone() for tensor in self.tensors],
            "parts": [part.state_dict() for part in self.parts],
            "generators": [generator.get_state() for generator in self.generators],
        }

    def _restore(self) -> int:
        """Rounds that were done."""
        state = self.resume.load(KEY)
        if state is None:
            return 0
        with torch.no_grad():
            for tensor, value in zip(self.tensors, state["tensors"], strict=True):
                tensor.copy_(value)
        for part, value in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(value)
        for generator, value in zip(self.generators, state["generators"], strict=True):
            generator.set_state(value)
        self.step = state["step"]
        self._sums, self._counts = map(list, state["curve"])
        return int(state["rounds"])
