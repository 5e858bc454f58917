"""Calibration without data: Gaussian pictures and random tokens, to see what real samples are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter, Preprocessing

CALIBRATES = ("calibration", "remainder")  # splits that noise has, one like the other
NO_LABEL = -1


def check_job(data: Any, source: Any, supervised: bool) -> None:
    """Raise InputError where a job would test on noise, or learn its labels."""
    if isinstance(data, (GaussianImages, RandomTokens)):
        check_noise_split("test", data.name)
    if supervised and isinstance(source, (GaussianImages, RandomTokens)):
        raise InputError(
            f"tuning.loss=cross_entropy learns labels, and calibration.source={source.name} has none; "
            "choose another loss, or samples with labels"
        )


def check_noise_split(split: str, name: str) -> None:
    """Raise InputError unless the split calibrates."""
    if split not in CALIBRATES:
        raise InputError(
            f"{name} has no {split!r} split, it only calibrates: leave data=NAME to the model and say "
            f"calibration.source={name}"
        )


class NoiseImages(Dataset[tuple[Tensor, int]]):
    """Normal numbers [channels, side, side], each image from a seed of its own; without labels."""

    def __init__(self, channels: int, side: int, num_samples: int, seed: int) -> None:
        self.shape = (channels, side, side)
        generator = torch.Generator().manual_seed(seed)
        self.seeds = torch.randint(2**62, (num_samples,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seeds[index])
        return torch.randn(self.shape, generator=generator), NO_LABEL


@dataclass(kw_only=True)
class GaussianImages:
    """Pictures of independent Gaussian pixels with the mean and deviation of the model's preprocessing.

    Normalised, as the model gets them, they have mean 0 and deviation 1 whatever these are. Pixels are not
    cut to the range of real ones.
    """

    name: ClassVar[str] = "noise"  # in conf/data
    task: ClassVar[str] = "classification"
    tests_on_calibration: ClassVar[bool] = False

    def check(self, adapter: ModelAdapter) -> None:
        """Raise InputError unless the model classifies images whose size is known."""
        preprocessing = adapter.preprocessing
        if adapter.task != self.task or preprocessing is None:
            raise InputError(
                f"noise is images, but model {adapter.name} has task {adapter.task!r}; for text choose "
                "random_tokens"
            )
        self._side(preprocessing)

    def dataset(
        self, split: str, preprocessing: Preprocessing, seed: int = 0, num_samples: int | None = None
    ) -> Dataset[tuple[Tensor, int]]:
        """Items (image [channels, side, side], −1) of split "calibration" or "remainder"; one image where
        `num_samples` is None, since there is no whole to give.

        A larger draw with the same seed contains the smaller one. The global random state is left alone.
        """
        check_noise_split(split, self.name)
        count = 1 if num_samples is None else num_samples
        return NoiseImages(len(preprocessing.mean), self._side(preprocessing), count, seed)

    def describe(self) -> dict[str, Any]:
        """Name and source."""
        return {"name": self.name, "path": "torch.randn"}

    @staticmethod
    def _side(preprocessing: Preprocessing) -> int:
        if preprocessing.side is None:
            raise InputError(
                "noise has the size of the model's input, which its preprocessing does not tell: got crop="
                f"{preprocessing.crop}, native={preprocessing.native}; set model.crop, or choose other data"
            )
        return preprocessing.side


@dataclass(kw_only=True)
class RandomTokens:
    """A stream of token ids, each as likely as any other of the tokenizer's vocabulary."""

    num_tokens: int  # of the stream that segments are cut from

    name: ClassVar[str] = "random_tokens"  # in conf/data
    task: ClassVar[str] = "language_modeling"
    tests_on_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise InputError(f"num_tokens must be at least 1; got {self.num_tokens}")

    def check(self, adapter: ModelAdapter) -> None:
        """Raise InputError unless the model reads text."""
        if adapter.task != self.task or adapter.tokenizer is None:
            raise InputError(
                f"random_tokens is text, but model {adapter.name} has task {adapter.task!r}; for images "
                "choose noise"
            )

    def tokens(self, split: str, tokenizer: Any) -> list[Tensor]:
        """One stream, int64 [num_tokens], always the same, of split "calibration" or "remainder"."""
        check_noise_split(split, self.name)
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(tokenizer.vocab_size, (self.num_tokens,), generator=generator)]

    def describe(self) -> dict[str, Any]:
        """Name and source."""
        return {"name": self.name, "source": "torch.randint", "tokens": self.num_tokens}
