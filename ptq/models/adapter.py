"""What a model is to ptq: a forward pass, blocks, and the layers that can be quantized, all found by type,
not by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import InputError

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:  # transformers is needed for language models only

    class Conv1D(nn.Module):  # type: ignore[no-redef]  # stands in for a class that no model can then contain
        """Never instantiated."""


QUANTIZABLE = (nn.Linear, nn.Conv2d, Conv1D)
FORWARDS = tuple(kind.forward for kind in QUANTIZABLE)
CONTAINERS = (nn.Sequential, nn.ModuleList)


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a Linear, Conv2d or Conv1D that computes just what its base class computes.

    A subclass with a forward of its own (dynamic padding, standardised weights) is not, and stays float.
    """
    return isinstance(module, QUANTIZABLE) and type(module).forward in FORWARDS


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is an Embedding that looks rows up and does no more: no scaling, offset, max_norm."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
    )


@dataclass(kw_only=True)
class Preprocessing:
    """How pixels become model input: resize the short side, crop the centre, scale to 0..1, normalise per
    channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None  # short side, pixels; None = images arrive at their final size
    crop: int | None = None  # centre crop, pixels; None = no crop
    interpolation: str = "bilinear"
    native: int | None = None  # side of images that arrive at their final size, pixels; None = not known

    @property
    def side(self) -> int | None:
        """Pixels a side of what the model gets, where that is known."""
        return self.native if self.crop is None else self.crop


@dataclass(kw_only=True)
class ModelAdapter:
    """A float model with what the pipeline, the data and the evaluation have to know about it.

    `forward(batch)` returns logits: [images, classes] for classification, [sequences, tokens, vocabulary] for
    language modelling, where a batch is [images, channels, height, width] floats or [sequences, tokens] ids.
    """

    name: str
    module: nn.Module
    task: str  # "classification" | "language_modeling" | "any" (no evaluation)
    forward: Callable[[nn.Module, Any], Tensor]
    # layer name → reason it stays float
    skip: dict[str, str] = field(default_factory=dict)
    head: str | None = None  # the layer that gives the output, when it is known by name
    embeddings: bool = False  # embeddings are layers to quantize; else they stay float
    copied: int = 0  # weights of a shared matrix that was copied, so that one of its two may stay float
    preprocessing: Preprocessing | None = None  # images only
    class_names: list[str] | None = None  # images only: synset or class name per index, when known
    num_classes: int | None = None
    tokenizer: Any = None  # text only
    context_length: int | None = None  # text only, tokens
    source: Path | str | None = None  # where the weights came from

    def quantizable(self) -> dict[str, nn.Module]:
        """Name → layer for every Linear, Conv2d and Conv1D of the model, and where asked for every Embedding,
        in definition order.
        """
        return {
            n: m
            for n, m in self.module.named_modules()
            if is_quantizable(m) or (self.embeddings and is_embedding(m))
        }

    def blocks(self) -> list[str]:
        """Names of the blocks: the innermost repeated parts that hold at least two quantizable layers."""
        return find_blocks(self.module)

    def stages(self) -> list[str]:
        """Names of the stages, as ResNets have them: the innermost Sequentials of at least two blocks."""
        blocks = self.blocks()
        several = [
            name
            for name, module in self.module.named_modules()
            if name
            and isinstance(module, nn.Sequential)
            and sum(block.startswith(f"{name}.") for block in blocks) >= 2
        ]
        return [name for name in several if not any(other.startswith(f"{name}.") for other in several)]


def find_blocks(module: nn.Module, prefix: str = "") -> list[str]:
    """Names of sub-modules that sit in a Sequential or ModuleList, hold ≥ 2 quantizable layers and no such
    part inside.

    Finds residual blocks, Fire modules, inverted residuals, encoder and decoder layers without knowing any
    architecture.
    """
    blocks: list[str] = []
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        layers = sum(is_quantizable(m) for m in child.modules())
        if layers == 0 or is_quantizable(child):
            continue
        inner = find_blocks(child, f"{name}.")
        if inner:
            blocks += inner
        elif isinstance(module, CONTAINERS) and not isinstance(child, CONTAINERS) and layers >= 2:
            blocks.append(name)
    return blocks


def load_state_strictly(module: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """Load `state` into `module`; raise one InputError that names every missing, extra or wrongly shaped
    tensor.
    """
    expected = module.state_dict()
    # an older file may lack BatchNorm's batch counter, which no forward pass in eval mode reads
    missing = sorted(k for k in expected.keys() - state.keys() if not k.endswith("num_batches_tracked"))
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{k} is {list(state[k].shape)}, expected {list(expected[k].shape)}"
        for k in sorted(expected.keys() & state.keys())
        if state[k].shape != expected[k].shape
    ]
    if missing or extra or shapes:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"extra: {', '.join(extra)}"] if extra else []
        parts += [f"wrong shape: {'; '.join(shapes)}"] if shapes else []
        raise InputError(f"checkpoint {source} does not fit {type(module).__name__}: " + " | ".join(parts))
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise InputError(
            f"checkpoint {source} holds NaN or infinity in: {', '.join(bad)}; use a sound checkpoint"
        )
    module.load_state_dict(state, strict=False)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a PyTorch file that holds plain tensors only (never
    unpickled).
    """
    if not path.is_file():
        raise InputError(f"checkpoint not found: {path}; give the path of a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"checkpoint {path} is a pickle that holds more than plain tensors, and ptq never unpickles; "
            f"save its state_dict() as .safetensors first ({str(error).splitlines()[0]})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"checkpoint {path} is not a dictionary of tensors; save the model's state_dict()")
    return {k.removeprefix("module."): v for k, v in content.items()}
