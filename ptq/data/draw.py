"""The calibration draw: a fixed number of samples of a source, batched, the same for every layer and every
method. Images may be drawn evenly over the classes, and augmented: by the seed, the same at each reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ptq.calibration import Calibration, NoCalibration
from ptq.data.augmented import AugmentedImages
from ptq.data.balanced import draw_balanced
from ptq.data.text import draw_segments
from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter

TRACE_SAMPLES = 2  # without calibration one small batch still shows the order of the layers


def calibration_batches(
    source: Any, adapter: ModelAdapter, calibration: Calibration | NoCalibration, seed: int
) -> list[Tensor]:
    """Model inputs: [batch, channels, height, width] images or [batch, tokens] ids, `num_samples` in all.

    Raises InputError when the source holds fewer samples, when its kind is not the model's, or when what is
    not images is to be balanced or augmented.
    """
    if source.task != adapter.task:
        raise InputError(
            f"model {adapter.name!r} does {adapter.task}, but the data is for {source.task}; "
            "choose other data"
        )
    number = calibration.num_samples if isinstance(calibration, Calibration) else TRACE_SAMPLES
    batch_size = calibration.batch_size if isinstance(calibration, Calibration) else TRACE_SAMPLES
    if adapter.task == "classification":
        dataset = drawn_images(source, adapter, calibration, number, seed)
        return [
            images for images, _ in DataLoader(dataset, batch_size=batch_size, generator=torch.Generator())
        ]
    if isinstance(calibration, Calibration):
        check_plain(calibration, f"model {adapter.name!r} reads text")
    length = calibration.sequence_length if isinstance(calibration, Calibration) else None
    if length is None:
        assert adapter.context_length is not None
        length = adapter.context_length
    elif length < 1 or (adapter.context_length is not None and length > adapter.context_length):
        raise InputError(
            "calibration.sequence_length must be from 1 to the model's context of "
            f"{adapter.context_length} tokens; got {length}"
        )
    segments = draw_segments(source.tokens("calibration", adapter.tokenizer), number, length, seed)
    return list(segments.split(batch_size))


def drawn_images(
    source: Any, adapter: ModelAdapter, calibration: Calibration | NoCalibration, number: int, seed: int
) -> Dataset[tuple[Tensor, int]]:
    """`number` images of the calibration split as model inputs, as `calibration` wants them drawn."""
    if not isinstance(calibration, Calibration) or not calibration.balance:
        images = source.dataset("calibration", adapter.preprocessing, seed=seed, num_samples=number)
    else:
        images = draw_balanced(source.dataset("calibration", adapter.preprocessing), number, seed)
    if isinstance(calibration, Calibration) and calibration.image_augmentation:
        assert adapter.preprocessing is not None
        return AugmentedImages(images, calibration, adapter.preprocessing, seed)
    return images


def check_plain(calibration: Calibration, reason: str) -> None:
    """Raise InputError where `calibration` asks for a draw that only images of a source can have."""
    if calibration.balance:
        raise InputError(
            f"calibration.balance=true draws images evenly over their classes, and {reason}; set it to false"
        )
    if calibration.image_augmentation:
        names = ",".join(each.value for each in calibration.image_augmentation)
        raise InputError(
            f"calibration.image_augmentation=[{names}] changes images as they are drawn, and {reason}; "
            "set it to []"
        )


class Samples:
    """Labelled samples of a source's calibration split, read batch by batch in an order that is new in each
    pass.

    Images come with their class, [batch]; text, whose labels are its own next tokens, with None.
    """

    def __init__(
        self,
        source: Any,
        adapter: ModelAdapter,
        calibration: Calibration,
        *,
        num_samples: int | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.images = None
        if adapter.task == "classification":
            number = num_samples or calibration.num_samples
            self.images = drawn_images(source, adapter, calibration, number, seed)
        else:
            wanted = replace(
                calibration, num_samples=num_samples or calibration.num_samples, batch_size=batch_size
            )
            self.segments = calibration_batches(source, adapter, wanted, seed)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        if self.images is None:
            for index in torch.randperm(len(self.segments), generator=self.generator).tolist():
                yield self.segments[index], None
        else:
            yield from DataLoader(
                self.images, batch_size=self.batch_size, shuffle=True, generator=self.generator
            )
