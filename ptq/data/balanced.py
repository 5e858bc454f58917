"""A draw of images that holds as equal numbers of each class as there can be."""

from __future__ import annotations

from collections import Counter
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ptq.errors import InputError


@runtime_checkable
class Labelled(Protocol):
    """Images whose classes are known without reading them; torchvision's name."""

    targets: list[int]


def labels_of(images: Dataset[tuple[Tensor, int]]) -> list[int] | None:
    """The class of each image, none of which is read; None where they have none."""
    if isinstance(images, Subset):
        labels = labels_of(images.dataset)
        return None if labels is None else [labels[index] for index in images.indices]
    return images.targets if isinstance(images, Labelled) else None


def draw_balanced(
    images: Dataset[tuple[Tensor, int]], num_samples: int, seed: int
) -> Dataset[tuple[Tensor, int]]:
    """`num_samples` of `images`, class after class in rounds, each image and each round's order at random.

    Numbers of two classes differ by one at most, more only where one has no further images. A larger draw
    with the same seed contains the smaller one. The global random state is left alone.
    """
    labels = labels_of(images)
    if labels is None:
        raise InputError(
            "calibration.balance=true draws images evenly over their classes, and these have no labels; "
            "set it to false, or choose another calibration.source"
        )
    if not 1 <= num_samples <= len(labels):
        raise InputError(
            f"num_samples must be between 1 and the {len(labels)} images there are; got {num_samples}"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: Counter[int] = Counter()
    rounds = {}  # image → how many of its class come before it
    for index in order:
        rounds[index] = seen[labels[index]]
        seen[labels[index]] += 1
    return Subset(images, sorted(order, key=rounds.__getitem__)[:num_samples])
