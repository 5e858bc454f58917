"""The loss of a block or of the network on one piece of the calibration set, with its inputs augmented.

Every loss but l2 is multiplied by one constant that makes it as large as l2 for the hard codes at the start,
so that a regulariser weighs the same against each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ptq.block_calls import float32, separable, slices
from ptq.block_problem import BlockProblem
from ptq.losses import Fisher, Loss, largest_directions, unit_mean
from ptq.models.adapter import ModelAdapter
from ptq.plan import Call, first_tensor, map_tensors
from ptq.seeding import coin_flips


class Augmentation(Enum):
    """What is done to a block's first input in each training step."""

    none = "none"
    qdrop = "qdrop"  # each element is the float network's with some probability (QDrop)
    noise = "noise"  # Gaussian, as large as a multiple of what quantization has done to the input
    mixup = "mixup"  # samples mixed with one another, the float block's output being the target


@dataclass(kw_only=True)
class Piece:
    """Some samples: the block's arguments, the float network's first input, the wanted output."""

    call: Call
    float_input: Tensor | None
    target: Tensor
    fisher: Fisher | None


class BlockLoss:
    """The loss of a block, piece by piece."""

    def __init__(
        self,
        problem: BlockProblem,
        targets: list[Tensor],
        *,
        kind: Loss,
        p: float,
        batch_size: int,
        augmentation: Augmentation,
        probability: float,
        strength: float,
        float_target: bool,
        fisher_rank: int,
        low_rank_fraction: float,
        device: torch.device,
        seed: int,
    ) -> None:
        self.block, self.original, self.kind, self.p = problem.block, problem.original, kind, p
        self.augmentation, self.probability, self.strength = augmentation, probability, strength
        self.float_target, self.device = float_target, device
        self.channels_last = _channels_last(self.original)
        cut = separable(self.original, problem.calls, targets, batch_size)
        self.generator = torch.Generator().manual_seed(seed)
        self.size = 1.0
        self.pieces = [
            Piece(call=call, float_input=None, target=target, fisher=None)
            for call, target in slices(problem.calls, targets, batch_size, cut)
        ]
        if problem.float_calls is not None and augmentation is not Augmentation.none:
            for piece, (call, _) in zip(
                self.pieces, slices(problem.float_calls, targets, batch_size, cut), strict=True
            ):
                piece.float_input = first_tensor(call.args)
        if problem.output_gradients is not None:
            squares = unit_mean([g.square() for g in problem.output_gradients])
            directions = None
            if kind is Loss.fisher_low_rank:
                gradients = [
                    s.sqrt() * g.sign() for s, g in zip(squares, problem.output_gradients, strict=True)
                ]
                directions = largest_directions(gradients, fisher_rank).to(device)
            for piece, (_, square) in zip(
                self.pieces, slices(problem.calls, squares, batch_size, cut), strict=True
            ):
                piece.fisher = Fisher(
                    diagonal=square, directions=directions, low_rank_fraction=low_rank_fraction
                )
        if kind is not Loss.l2:
            self.size = like_l2(
                [self._compared(piece) for piece in self.pieces[:4]],
                kind,
                p,
                channels_last=self.channels_last,
            )

    def plain(self, piece: Piece) -> Tensor:
        """The loss on the inputs as they are."""
        return self._loss(*self._compared(piece))

    def training(self, piece: Piece) -> Tensor:
        """The loss on augmented inputs; an embedding's ids stay as they are."""
        if self.augmentation is Augmentation.none or piece.float_input is None:
            return self.plain(piece)
        if not piece.float_input.is_floating_point():
            return self.plain(piece)
        call = piece.call.to(self.device)
        x, x_float = call.args[0].float(), piece.float_input.to(self.device).float()
        target, fisher = piece.target.to(self.device).float(), self._fisher(piece)
        if self.augmentation is Augmentation.qdrop:
            drop = coin_flips(x.shape, self.probability, x.device, self.generator)
            x = torch.lerp(x, x_float, drop.to(x.dtype))  # either of them; faster than where
        elif self.augmentation is Augmentation.noise:
            spread = (x - x_float).square().mean().sqrt() * self.strength
            x = x + spread * torch.randn(x.shape, generator=self.generator).to(x.device)
        else:
            order = torch.randperm(len(x), generator=self.generator).to(x.device)
            share = float(torch.rand((), generator=self.generator)) * self.strength / 2
            x, x_float = torch.lerp(x, x[order], share), torch.lerp(x_float, x_float[order], share)
            if fisher is not None:
                mixed = torch.lerp(fisher.diagonal, fisher.diagonal[order], share)
                fisher = replace(fisher, diagonal=mixed)
            with torch.no_grad():
                target = self._output(self.original, call.with_first(x_float if self.float_target else x))
        return self._loss(self._output(self.block, call.with_first(x)), target, fisher)

    def _loss(self, output: Tensor, target: Tensor, fisher: Fisher | None) -> Tensor:
        return self.kind.of(output, target, self.p, fisher, channels_last=self.channels_last) * self.size

    def _fisher(self, piece: Piece) -> Fisher | None:
        return None if piece.fisher is None else piece.fisher.to(self.device)

    def _compared(self, piece: Piece) -> tuple[Tensor, Tensor, Fisher | None]:
        output = self._output(self.block, piece.call.to(self.device))
        return output, piece.target.to(self.device).float(), self._fisher(piece)

    def _output(self, module: nn.Module, call: Call) -> Tensor:
        there = call.cloned()
        output = first_tensor(module(*float32(there.args), **float32(there.kwargs)))
        assert output is not None
        return output


class NetworkLoss:
    """The loss of the network's logits, batch by batch."""

    def __init__(
        self,
        adapter: ModelAdapter,
        teacher: nn.Module,
        samples: Iterable[tuple[Any, Tensor | None]],
        *,
        kind: Loss,
        p: float,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.adapter, self.kind, self.p, self.device, self.size = adapter, kind, p, device, 1.0
        self.pieces: list[tuple[Any, Tensor]] = []
        with torch.no_grad():
            for batch, _ in samples:
                parts = batch.split(batch_size) if isinstance(batch, Tensor) else [batch]
                for part in parts:
                    wanted = adapter.forward(teacher, self._there(part)).float()
                    self.pieces.append((part, wanted.cpu()))
            if kind is not Loss.l2:
                self.size = like_l2([(*self._compared(piece), None) for piece in self.pieces[:4]], kind, p)

    def training(self, piece: tuple[Any, Tensor]) -> Tensor:
        """The loss on one batch."""
        return self.kind.of(*self._compared(piece), self.p) * self.size

    def _compared(self, piece: tuple[Any, Tensor]) -> tuple[Tensor, Tensor]:
        output = self.adapter.forward(self.adapter.module, self._there(piece[0])).float()
        return output, piece[1].to(self.device)

    def _there(self, batch: Any) -> Any:
        return map_tensors(batch, lambda t: t.to(self.device))


def _channels_last(original: nn.Module) -> bool:
    """Whether a block's four-dimensional output has its channels last: one of linear layers alone has, since
    they read and write the last dimension (Swin's blocks: [samples, height, width, channels]).
    """
    parts = list(original.modules())
    convolves = any(isinstance(m, nn.Conv2d) for m in parts)
    return not convolves and any(isinstance(m, nn.Linear) for m in parts)


@torch.no_grad()
def like_l2(
    compared: list[tuple[Tensor, Tensor, Fisher | None]],
    kind: Loss,
    p: float,
    *,
    channels_last: bool = False,
) -> float:
    """What makes `kind` as large as l2 on these outputs and targets; 1 where either is 0."""
    last = channels_last
    plain = sum(float(Loss.l2.of(output, target, channels_last=last)) for output, target, _ in compared)
    other = sum(
        float(kind.of(output, target, p, fisher, channels_last=last)) for output, target, fisher in compared
    )
    return plain / other if plain > 0 and other > 0 else 1.0
