"""A part of the calibration data kept for choosing between candidates by the task.

Every source divides its calibration data for good, whatever the seed: "validation" is a fifth of it and
"remainder" the rest, so that what chooses was neither calibrated on nor is tested on. Jobs that choose
nothing draw from the whole, "calibration". The test split is the source's own, but for a source that tests
on its calibration images: there a job that chooses tests on the remainder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ptq.models.adapter import ModelAdapter, Preprocessing

HELD_OUT = ("validation", "remainder")
PARTS = 5  # one of them is held out


def divide(data: Dataset, available: int, split: str) -> Dataset:
    """The part of `data` that `split` names, always the same; all of it for other names."""
    if split not in HELD_OUT:
        return data
    order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
    count = available // PARTS
    chosen = order[:count] if split == "validation" else order[count:]
    return Subset(data, chosen.sort().values.tolist())


def divide_sequence(content: Any, split: str) -> Any:
    """The same for text or a list of texts: the last fifth is held out."""
    if split not in HELD_OUT:
        return content
    border = len(content) - len(content) // PARTS
    return content[border:] if split == "validation" else content[:border]


class HeldOut:
    """A source as a job sees it that chooses between candidates: splits "calibration", "test" and
    "validation".
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.task: str = source.task
        self.changes_test: bool = source.tests_on_calibration
        self.splits = {"calibration": "remainder", "test": "remainder" if self.changes_test else "test"}

    @property
    def per_document(self) -> bool:
        """As the source says; text only."""
        return bool(self.source.per_document)

    def check(self, adapter: ModelAdapter) -> None:
        """The source's own check."""
        self.source.check(adapter)

    def dataset(
        self, split: str, preprocessing: Preprocessing, seed: int = 0, num_samples: int | None = None
    ) -> Dataset:
        """Images of a split; of validation at most `num_samples`, as many as there are."""
        name = self.splits.get(split, split)
        whole: Any = self.source.dataset(name, preprocessing)
        if name == "validation" and num_samples is not None and num_samples >= len(whole):
            return whole
        images: Dataset = self.source.dataset(name, preprocessing, seed=seed, num_samples=num_samples)
        return images

    def tokens(self, split: str, tokenizer: Any) -> list[Tensor]:
        """Streams of token ids of a split."""
        streams: list[Tensor] = self.source.tokens(self.splits.get(split, split), tokenizer)
        return streams

    def validation(self) -> HeldOut:
        """The same source with the validation split in place of the test split, for an evaluation."""
        view = HeldOut(self.source)
        view.splits["test"] = "validation"
        return view
