"""Calibration images flipped, cropped or changed in colour: each once, by a seed of its own.

Shapes: images [channels, height, width], as the model gets them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ptq.calibration import Calibration, ImageAugmentation
from ptq.data.images import INTERPOLATIONS
from ptq.models.adapter import Preprocessing


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Images of another data set, augmented as `calibration` says.

    What happens to an image depends on `seed` and its place only, so it is the same in whatever order and
    however often images are read; the global random state is left alone. Augmented is what the model would
    get, put back to pixels from 0 to 1: training pipelines cut crops from the stored picture instead.
    """

    def __init__(
        self,
        images: Dataset[tuple[Tensor, int]],
        calibration: Calibration,
        preprocessing: Preprocessing,
        seed: int,
    ) -> None:
        self.images, self.calibration, self.preprocessing = images, calibration, preprocessing
        self.mean = torch.tensor(preprocessing.mean)[:, None, None]
        self.std = torch.tensor(preprocessing.std)[:, None, None]
        generator = torch.Generator().manual_seed(seed)
        self.seeds = torch.randint(2**62, (len(images),), generator=generator).tolist()  # type: ignore[arg-type]  # sized

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        pixels = image * self.std + self.mean
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seeds[index])  # of the CPU alone
            for kind in self.calibration.image_augmentation:
                pixels = self._transform(kind, pixels.shape[-2:])(pixels)
        return (pixels - self.mean) / self.std, label

    def _transform(self, kind: ImageAugmentation, size: torch.Size) -> Any:
        c = self.calibration
        if kind is ImageAugmentation.flip:
            return v2.RandomHorizontalFlip()
        if kind is ImageAugmentation.crop:
            return v2.RandomResizedCrop(
                list(size),
                scale=(c.crop_scale[0], c.crop_scale[1]),
                ratio=(c.crop_ratio[0], c.crop_ratio[1]),
                interpolation=INTERPOLATIONS[self.preprocessing.interpolation],
            )
        return v2.ColorJitter(brightness=c.jitter, contrast=c.jitter, saturation=c.jitter)
