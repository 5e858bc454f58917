"""Calibration: which inputs, seen through which network, and their Gram matrices.

H = X Xᵀ / tokens and C = X_float Xᵀ / tokens are accumulated batch by batch: float32 products of at most
CHUNK tokens, added up in float64. No layer input outlives its batch, and memory per layer is O(in²).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from ptq.errors import InputError
from ptq.layers import input_matrix, weight_matrix, weight_order
from ptq.models.adapter import is_embedding

CHUNK = 4096  # tokens per float32 product: its rounding error stays near 1e-7 of the result
UNFOLD_ELEMENTS = 2**25  # unfolded convolution inputs held at once


class Inputs(Enum):
    """Which inputs a layer sees during calibration."""

    float = "float"  # those of the float model
    quantized = "quantized"  # those that the already quantized part of the model delivers


class ImageAugmentation(Enum):
    """What is done to each calibration image once, when it is drawn."""

    flip = "flip"  # left and right changed places, in half of the images
    crop = "crop"  # a random part, resized to the size of the whole
    jitter = "jitter"  # brightness, contrast and, in colour, saturation multiplied by random factors


class Target(Enum):
    """What the quantized layer shall reproduce."""

    layer = "layer"  # the float layer on the inputs the quantized layer sees
    float_path = "float_path"  # the float layer on the float model's inputs (needs inputs=quantized)


@dataclass(kw_only=True)
class Calibration:
    """A calibration set and how its statistics are taken. `num_samples` counts images or text segments."""

    source: str | None  # a choice of conf/data to draw from; null = the job's own data
    num_samples: int
    sequence_length: int | None  # tokens per text segment; null = the model's context; ignored for images
    batch_size: int
    inputs: Inputs
    target: Target
    sequential: bool  # inside a block, later layers see the earlier ones already quantized (inputs=quantized)
    # random positions of each image kept for a convolution's Gram; null = all
    positions_per_image: int | None
    target_damping: float  # ridge of the float-path target, as a fraction of H's mean diagonal
    fresh_per_layer: bool  # samples drawn anew for each layer, as the released COMQ does (inputs=float)
    reestimate_batchnorm: bool  # at the end, on the calibration set
    # add to each layer's bias what its mean output lost, E[W x] − E[Ŵ x̂]; x as `target` says, x̂ as it arrives
    bias_correction: bool
    balance: bool  # images: as equal numbers of each class as there can be, instead of any images
    image_augmentation: list[ImageAugmentation]  # in this order; the set is the same at each reading
    crop_scale: list[float]  # of crop: smallest and largest part of the image's area
    crop_ratio: list[float]  # of crop: smallest and largest width over height
    jitter: float  # of jitter: factors from 1 − this to 1 + this

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise InputError(f"calibration.num_samples must be at least 1; got {self.num_samples}")
        if self.batch_size < 1:
            raise InputError(f"calibration.batch_size must be at least 1; got {self.batch_size}")
        if self.positions_per_image is not None and self.positions_per_image < 1:
            raise InputError(
                "calibration.positions_per_image must be at least 1, or null for all; "
                f"got {self.positions_per_image}"
            )
        if self.target_damping < 0:
            raise InputError(f"calibration.target_damping must not be negative; got {self.target_damping}")
        if self.fresh_per_layer and self.inputs is not Inputs.float:
            raise InputError(
                "calibration.fresh_per_layer=true needs calibration.inputs=float: layers on quantized inputs "
                "follow one set through the network"
            )
        if self.target is Target.float_path and self.inputs is Inputs.float:
            raise InputError(
                "calibration.target=float_path needs calibration.inputs=quantized: "
                "on float inputs both targets are one"
            )
        self._check_augmentation()

    def _check_augmentation(self) -> None:
        names = [each.value for each in self.image_augmentation]
        if len(set(names)) < len(names):
            raise InputError(f"calibration.image_augmentation must name each only once; got {names}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(
                "calibration.crop_scale must be two fractions in (0, 1], the smaller one first; "
                f"got {self.crop_scale}"
            )
        if len(self.crop_ratio) != 2 or not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise InputError(
                "calibration.crop_ratio must be two positive numbers, the smaller one first; "
                f"got {self.crop_ratio}"
            )
        if not 0 < self.jitter <= 1:
            raise InputError(f"calibration.jitter must be a fraction in (0, 1]; got {self.jitter}")


class _Positions:
    """A random choice of at most `limit` positions, the same each time it is asked."""

    def __init__(self, limit: int | None, generator: torch.Generator) -> None:
        self.limit, self.generator = limit, generator
        self.chosen: Tensor | None = None

    def __call__(self, positions: int) -> Tensor | None:
        if self.limit is None or positions <= self.limit:
            return None
        if self.chosen is None:
            self.chosen = torch.randperm(positions, generator=self.generator)[: self.limit].sort().values
        return self.chosen


@dataclass(kw_only=True)
class Statistics:
    """What a layer's inputs amount to; means [groups, in] only where bias correction wants them."""

    H: Tensor  # X Xᵀ / tokens, [groups, in, in]
    C: Tensor | None = None  # X_float Xᵀ / tokens
    mean: Tensor | None = None  # of X
    wanted_mean: Tensor | None = None  # of the inputs whose float output is wanted

    def bias_change(self, W: Tensor, W_hat: Tensor) -> Tensor | None:
        """E[W x_wanted] − E[Ŵ x], [groups, out], of W, Ŵ [groups, out, in]; None without means."""
        if self.mean is None or self.wanted_mean is None:
            return None
        change = W.double() @ self.wanted_mean[..., None] - W_hat.double() @ self.mean[..., None]
        return change[..., 0].to(W.dtype)


class GramAccumulator:
    """Gram matrix, and cross matrix where float inputs are given too, of one layer's inputs; of an embedding
    (see ptq/layers.py) the identity, no cross matrix and no means.
    """

    def __init__(
        self, layer: nn.Module, positions_per_image: int | None = None, seed: int = 0, means: bool = False
    ) -> None:
        self.layer = layer
        self.positions_per_image = positions_per_image
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = 0
        self._sum: Tensor | None = None  # [groups, in, in] float64
        self._cross: Tensor | None = None
        self.means = means
        self._mean_sums: Tensor | None = None  # of X and of what is wanted, [2, groups, in] float64

    def add(self, x: Tensor, x_float: Tensor | None = None, wanted: Tensor | None = None) -> None:
        """Add the inputs of one batch as the layer uses them, with the float model's inputs for the cross
        matrix. `wanted` are the inputs whose float output is wanted on average, where these are others still.
        """
        if is_embedding(self.layer):
            dim = weight_matrix(self.layer).shape[-1]
            self._sum, self.tokens = torch.eye(dim, dtype=torch.float64, device=x.device)[None], 1
            return
        x = x.detach()
        step = x.shape[0]
        if isinstance(self.layer, nn.Conv2d) and x.dim() == 4:
            positions = x.shape[2] * x.shape[3] / (self.layer.stride[0] * self.layer.stride[1])
            per_image = positions * x.shape[1] * self.layer.kernel_size[0] * self.layer.kernel_size[1]
            step = max(1, int(UNFOLD_ELEMENTS / per_image))
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step) if x.dim() > 1 else slice(None)
            choose = _Positions(self.positions_per_image, self.generator)  # one choice for both networks
            X = input_matrix(self.layer, x[part].float(), choose)
            X_float = (
                None if x_float is None else input_matrix(self.layer, x_float[part].detach().float(), choose)
            )
            self._add_tokens(X, X_float)
            if self.means:
                Y = X if X_float is None else X_float
                if wanted is not None:
                    Y = input_matrix(self.layer, wanted[part].detach().float(), choose)
                sums = torch.stack([X.double().sum(1), Y.double().sum(1)])
                self._mean_sums = sums if self._mean_sums is None else self._mean_sums + sums

    def _add_tokens(self, X: Tensor, X_float: Tensor | None) -> None:
        groups, tokens, in_features = X.shape
        if self._sum is None:
            self._sum = torch.zeros(groups, in_features, in_features, dtype=torch.float64, device=X.device)
        if X_float is not None and self._cross is None:
            self._cross = torch.zeros_like(self._sum)
        for start in range(0, tokens, CHUNK):
            piece = X[:, start : start + CHUNK]
            self._sum += piece.mT @ piece
            if X_float is not None:
                assert self._cross is not None
                self._cross += X_float[:, start : start + CHUNK].mT @ piece
        self.tokens += tokens

    def gram(self) -> Tensor:
        """H = X Xᵀ / tokens, [groups, in, in] float64. Raises InputError when no input was added."""
        if self._sum is None:
            raise InputError("no calibration input reached the layer; check the calibration data")
        return self._ordered(self._sum)

    def cross(self) -> Tensor | None:
        """C = X_float Xᵀ / tokens, [groups, in, in] float64, or None."""
        return None if self._cross is None else self._ordered(self._cross)

    def statistics(self) -> Statistics:
        """H, C and the means."""
        if self._mean_sums is None:
            return Statistics(H=self.gram(), C=self.cross())
        order = weight_order(self.layer)
        means = self._mean_sums / self.tokens
        mean, wanted = means if order is None else means[..., order]
        return Statistics(H=self.gram(), C=self.cross(), mean=mean, wanted_mean=wanted)

    def _ordered(self, total: Tensor) -> Tensor:
        """The mean over tokens with rows and columns in the order of the layer's weights."""
        order = weight_order(self.layer)
        mean = total / self.tokens
        return mean if order is None else mean[:, order][:, :, order]


@dataclass(kw_only=True)
class NoCalibration:
    """No data at all: H is the identity. Only methods that do not read H accept it."""
