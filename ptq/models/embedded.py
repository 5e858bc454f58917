"""The embedded models: two small digit classifiers whose trained weights ship with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ptq.data.root import resolve
from ptq.models.adapter import ModelAdapter, Preprocessing, load_state_strictly, read_checkpoint
from ptq.models.networks import DigitsResNetModule, DigitsViTModule

WEIGHTS_DIR = Path(__file__).resolve().parent / "weights"
DIGITS = [str(digit) for digit in range(10)]
# mean and deviation of the training images, in 0..1
DIGITS_PREPROCESSING = Preprocessing(mean=(0.305,), std=(0.376,), native=8)


def digits_adapter(name: str, module: nn.Module, checkpoint: str | None) -> ModelAdapter:
    """A digit classifier with the weights of `checkpoint`, or where it is None those that ship as `name`."""
    shipped = WEIGHTS_DIR / f"{name}.safetensors"
    source = shipped if checkpoint is None else resolve(checkpoint, f"checkpoint of {name}")
    load_state_strictly(module, read_checkpoint(source), source)
    return ModelAdapter(
        name=name,
        module=module.eval(),
        task="classification",
        forward=nn.Module.__call__,
        preprocessing=DIGITS_PREPROCESSING,
        class_names=DIGITS,
        num_classes=len(DIGITS),
        source=source,
    )


@dataclass(kw_only=True)
class DigitsResNet:
    """Residual network for 8×8 digits: one stage of basic blocks a width, each next at half the size."""

    widths: list[int]  # channels of each stage
    blocks: int  # basic blocks a stage
    checkpoint: str | None  # None = the weights that ship with ptq

    def network(self) -> DigitsResNetModule:
        """The untrained network; the global random state is restored."""
        with torch.random.fork_rng(devices=[]):
            return DigitsResNetModule(self.widths, self.blocks, num_classes=len(DIGITS))

    def load(self) -> ModelAdapter:
        """The trained model, eval mode, float32."""
        return digits_adapter("digits_resnet", self.network(), self.checkpoint)


@dataclass(kw_only=True)
class DigitsViT:
    """Vision transformer for 8×8 digits: patches, pre-norm blocks, mean over tokens."""

    patch: int  # pixels a side
    width: int  # features of a token
    depth: int  # blocks
    heads: int
    hidden: int  # features inside the block's MLP
    checkpoint: str | None  # None = the weights that ship with ptq

    def network(self) -> DigitsViTModule:
        """The untrained network; the global random state is restored."""
        with torch.random.fork_rng(devices=[]):
            return DigitsViTModule(
                self.patch, self.width, self.depth, self.heads, self.hidden, num_classes=len(DIGITS)
            )

    def load(self) -> ModelAdapter:
        """The trained model, eval mode, float32."""
        return digits_adapter("digits_vit", self.network(), self.checkpoint)
