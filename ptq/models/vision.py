"""Image classifiers: any timm or torchvision name, timm EfficientNets by definition, CIFAR-10 networks.

Every `load()` gives a ModelAdapter, its module in eval mode and float32, and keeps the global random state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import timm
import timm.data
import torch
import torchvision
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from torchvision.models import Weights

from ptq.data.root import resolve
from ptq.errors import InputError, suggestion
from ptq.models.adapter import ModelAdapter, Preprocessing, load_state_strictly, read_checkpoint
from ptq.models.networks import CifarResNetModule, PreNormCompactTransformer, ReorderedCompactTransformer

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# their pretrained forward rescales its input and drops classifiers that the plain architecture has
RESHAPED_BY_WEIGHTS = {"googlenet", "inception_v3"}


def load_checkpoint(module: nn.Module, checkpoint: str, name: str) -> Path:
    """Load the file that `checkpoint` means (see `resolve`) into `module`, and return its path.

    Denormal numbers become 0: weight decay leaves them in dead layers, and they slow a CPU down tenfold.
    """
    path = resolve(checkpoint, f"checkpoint of {name}")
    state = read_checkpoint(path)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor[tensor.abs() < torch.finfo(torch.float32).tiny] = 0
    load_state_strictly(module, state, path)
    return path


def imagenet_classes(num_classes: int) -> list[str] | None:
    """The 1000 ImageNet synsets in index order, for a model with 1000 classes."""
    return list(timm.data.ImageNetInfo().label_names()) if num_classes == 1000 else None


def image_adapter(
    name: str,
    module: nn.Module,
    preprocessing: Preprocessing,
    class_names: list[str] | None,
    num_classes: int,
    source: Path | str | None,
) -> ModelAdapter:
    """An image classifier in eval mode and float32."""
    return ModelAdapter(
        name=name,
        module=module.eval().float(),
        task="classification",
        forward=nn.Module.__call__,
        preprocessing=preprocessing,
        class_names=class_names,
        num_classes=num_classes,
        source=source,
    )


def no_download(name: str, looked_at: str, error: Exception) -> InputError:
    """The error for pretrained weights that could not be had."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"pretrained weights of {name} are missing; looked at {looked_at} "
        f"({type(error).__name__}: {reason}); "
        f"run once where the network is reachable and bring that cache here, or pass model.checkpoint=FILE "
        f"with the model's state_dict as .safetensors or .pth"
    )


@dataclass(kw_only=True)
class TimmModel:
    """Any classifier that timm builds by name."""

    architecture: str  # timm name, with the tag of its weights: NAME.TAG
    pretrained: bool  # weights of that tag from the Hugging Face hub or its cache; else random
    checkpoint: str | None  # file that replaces the pretrained weights; under PTQ_DATA unless absolute
    resize: int | None  # short side, pixels; null here and below = as the weights' own configuration says
    crop: int | None  # centre crop, pixels
    mean: list[float] | None
    std: list[float] | None
    interpolation: str | None

    def load(self) -> ModelAdapter:
        """The model, eval mode, float32. InputError for an unknown name or weights that cannot be had."""
        if not timm.is_model(self.architecture):
            hint = suggestion(self.architecture.split(".")[0], timm.list_models())
            raise InputError(
                f"unknown timm architecture {self.architecture!r}{hint}; timm.list_models() lists them all"
            )
        _, _, tag = self.architecture.partition(".")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(self.architecture.split(".")[0])]
        if tag and tag not in tags:
            raise InputError(
                f"unknown weights {tag!r} of {self.architecture!r}; known: {', '.join(tags) or 'none'}"
                f"{suggestion(tag, tags)}"
            )
        download = self.pretrained and self.checkpoint is None
        with torch.random.fork_rng(devices=[]):
            try:
                module = timm.create_model(self.architecture, pretrained=download)
            except Exception as error:
                if not download:
                    raise
                from huggingface_hub.constants import HF_HUB_CACHE

                raise no_download(
                    self.architecture, f"the Hugging Face hub and its cache {HF_HUB_CACHE}", error
                ) from error
        source: Path | str | None = f"timm {self.architecture}" if download else None
        if self.checkpoint is not None:
            source = load_checkpoint(module, self.checkpoint, self.architecture)
        num_classes = module.num_classes
        assert isinstance(num_classes, int)
        return image_adapter(
            name=self.architecture,
            module=module,
            preprocessing=self._preprocessing(module),
            class_names=imagenet_classes(num_classes),
            num_classes=num_classes,
            source=source,
        )

    def _preprocessing(self, module: nn.Module) -> Preprocessing:
        own = timm.data.resolve_model_data_config(module)
        _, height, width = own["input_size"]
        if self.resize is None and (height != width or own["crop_mode"] != "center"):
            raise InputError(
                f"{self.architecture} was trained on {height}×{width} pixels with crop mode "
                f"{own['crop_mode']!r}, and ptq only crops the centre to a square; "
                f"set model.resize and model.crop to accept that"
            )
        return Preprocessing(
            mean=tuple(self.mean or own["mean"]),
            std=tuple(self.std or own["std"]),
            resize=self.resize or int(height / own["crop_pct"]),
            crop=self.crop or height,
            interpolation=self.interpolation or own["interpolation"],
        )


@dataclass(kw_only=True)
class TorchvisionModel:
    """Any classifier of torchvision.models."""

    architecture: str
    pretrained: bool  # download the weights named below, or take them from torch.hub's cache; else random
    weights: str  # name in the architecture's weights enumeration, such as DEFAULT or IMAGENET1K_V1
    checkpoint: str | None  # file that replaces the pretrained weights; under PTQ_DATA unless absolute
    resize: int | None  # short side, pixels; null here and below = as those weights were evaluated
    crop: int | None  # centre crop, pixels
    mean: list[float] | None
    std: list[float] | None
    interpolation: str | None

    def load(self) -> ModelAdapter:
        """The model, eval mode, float32. InputError for an unknown name or weights that cannot be had."""
        known = sorted(set(torchvision.models.list_models(module=torchvision.models)) - RESHAPED_BY_WEIGHTS)
        if self.architecture not in known:
            raise InputError(
                f"unknown torchvision classifier {self.architecture!r}"
                f"{suggestion(self.architecture, known)}; known: {', '.join(known)}"
            )
        weights = self._weights()
        with torch.random.fork_rng(devices=[]):
            module = torchvision.models.get_model(self.architecture, weights=None)
        source: Path | str | None = None
        if self.checkpoint is not None:
            source = load_checkpoint(module, self.checkpoint, self.architecture)
        elif self.pretrained:
            source = weights.url
            load_state_strictly(module, self._download(weights), source)
        transform = weights.transforms()
        num_classes = len(weights.meta["categories"])
        return image_adapter(
            name=self.architecture,
            module=module,
            preprocessing=Preprocessing(
                mean=tuple(self.mean or transform.mean),
                std=tuple(self.std or transform.std),
                resize=self.resize or transform.resize_size[0],
                crop=self.crop or transform.crop_size[0],
                interpolation=self.interpolation or transform.interpolation.value,
            ),
            class_names=imagenet_classes(num_classes),
            num_classes=num_classes,
            source=source,
        )

    def _weights(self) -> Weights:
        choices = torchvision.models.get_model_weights(self.architecture)
        if self.weights not in choices.__members__:
            known = ", ".join(choices.__members__)
            raise InputError(f"unknown weights {self.weights!r} of {self.architecture}; known: {known}")
        return choices[self.weights].value

    def _download(self, weights: Weights) -> dict[str, Tensor]:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        try:
            return torch.hub.load_state_dict_from_url(
                weights.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except Exception as error:
            raise no_download(self.architecture, f"{weights.url} and the cache {cache}", error) from error


@dataclass(kw_only=True)
class TimmEfficientNet:
    """A timm EfficientNet from its block definition: as MCUNet and ProxylessNAS are (ReLU6, BatchNorm)."""

    arch_def: list[str]  # timm's block strings, one stage each
    num_features: int  # channels of the last 1×1 convolution; 0 = none
    stem_size: int  # channels of the first convolution
    bn_eps: float  # BatchNorm epsilon, part of the trained weights
    num_classes: int
    checkpoint: str | None  # under PTQ_DATA unless absolute; null = random weights
    resize: int | None  # short side, pixels
    crop: int | None  # centre crop, pixels
    mean: list[float]
    std: list[float]
    interpolation: str

    def load(self) -> ModelAdapter:
        """The model, eval mode, float32. InputError where the checkpoint does not fit it."""
        with torch.random.fork_rng(devices=[]):
            module = EfficientNet(
                decode_arch_def([[stage] for stage in self.arch_def]),
                num_classes=self.num_classes,
                num_features=self.num_features,
                stem_size=self.stem_size,
                fix_stem=True,
                act_layer=nn.ReLU6,
                norm_layer=partial(nn.BatchNorm2d, eps=self.bn_eps),
            )
        name = "efficientnet" if self.checkpoint is None else Path(self.checkpoint).stem
        source = None if self.checkpoint is None else load_checkpoint(module, self.checkpoint, name)
        preprocessing = Preprocessing(
            mean=tuple(self.mean),
            std=tuple(self.std),
            resize=self.resize,
            crop=self.crop,
            interpolation=self.interpolation,
        )
        return image_adapter(
            name, module, preprocessing, imagenet_classes(self.num_classes), self.num_classes, source
        )


def cifar10_adapter(
    name: str, module: nn.Module, checkpoint: str | None, mean: list[float], std: list[float]
) -> ModelAdapter:
    """A CIFAR-10 classifier with the weights of `checkpoint`, or random ones where it is None."""
    source = None if checkpoint is None else load_checkpoint(module, checkpoint, name)
    preprocessing = Preprocessing(mean=tuple(mean), std=tuple(std), native=32)
    return image_adapter(name, module, preprocessing, CIFAR10_CLASSES, len(CIFAR10_CLASSES), source)


@dataclass(kw_only=True)
class CifarResNet:
    """ResNet for CIFAR-10 with 6n + 2 layers, shortcuts without parameters (He et al., 2015, section 4.2)."""

    depth: int  # layers: 20, 32, 44, 56, 110, …
    checkpoint: str | None  # under PTQ_DATA unless absolute; null = random weights
    mean: list[float]
    std: list[float]

    def load(self) -> ModelAdapter:
        """The model, eval mode, float32. InputError for an impossible depth or checkpoint."""
        if self.depth < 8 or (self.depth - 2) % 6:
            raise InputError(f"depth of a CIFAR ResNet must be 6n + 2 (20, 32, 56); got {self.depth}")
        with torch.random.fork_rng(devices=[]):
            module = CifarResNetModule(self.depth, len(CIFAR10_CLASSES))
        return cifar10_adapter(f"cifar10_resnet{self.depth}", module, self.checkpoint, self.mean, self.std)


class CompactBlock(Enum):
    """Which published form of the compact transformer a checkpoint has."""

    pre_norm = "one tokenizer convolution, standard pre-norm blocks"
    reordered = "two tokenizer convolutions, the attention branch normalised after its sum"


@dataclass(kw_only=True)
class CompactTransformer:
    """Compact convolutional transformer for CIFAR-10 (Hassani et al., 2021)."""

    block: CompactBlock
    width: int  # features of a token
    depth: int  # blocks
    heads: int
    hidden: int  # features inside the block's MLP
    checkpoint: str | None  # under PTQ_DATA unless absolute; null = random weights
    mean: list[float]
    std: list[float]

    def load(self) -> ModelAdapter:
        """The model, eval mode, float32. InputError for impossible heads or checkpoint."""
        if self.heads < 1 or self.width % self.heads:
            raise InputError(f"heads must divide width; got heads={self.heads}, width={self.width}")
        networks = {
            CompactBlock.pre_norm: PreNormCompactTransformer,
            CompactBlock.reordered: ReorderedCompactTransformer,
        }
        with torch.random.fork_rng(devices=[]):
            module = networks[self.block](
                self.width, self.depth, self.heads, self.hidden, len(CIFAR10_CLASSES)
            )
        return cifar10_adapter(f"cifar10_cct{self.depth}", module, self.checkpoint, self.mean, self.std)
