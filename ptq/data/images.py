"""Image data sets: where the pictures are, which calibrate and which test, how pixels become model input.

Every item is (image [channels, height, width] float32, label int), preprocessed as the model wants it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from ptq.data.held_out import HELD_OUT, divide
from ptq.data.root import resolve
from ptq.errors import InputError, suggestion
from ptq.models.adapter import ModelAdapter, Preprocessing

INTERPOLATIONS = {mode.value: mode for mode in InterpolationMode}


class PixelTransform:
    """PIL image → [channels, height, width] float32: resize, centre crop, scale to 0..1 and normalise."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        name = preprocessing.interpolation
        if name not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            hint = suggestion(name, INTERPOLATIONS)
            raise InputError(f"unknown interpolation {name!r}; known: {known}{hint}")
        self.preprocessing = preprocessing
        self.interpolation = INTERPOLATIONS[name]

    def __call__(self, image: Image.Image) -> Tensor:
        p = self.preprocessing
        if p.resize is not None:
            image = T.resize(image, p.resize, self.interpolation)
        if p.crop is not None:
            image = T.center_crop(image, p.crop)
        return T.normalize(T.to_tensor(image), p.mean, p.std)


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """Images held in memory: uint8 [images, height, width, 3] and a label each."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: PixelTransform) -> None:
        self.images = images
        self.targets = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images that are model input already: [images, channels, height, width] and a label each."""

    def __init__(self, images: Tensor, labels: np.ndarray) -> None:
        self.images = images
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def draw(data: Dataset, available: int, num_samples: int | None, seed: int, source: str) -> Dataset:
    """`num_samples` of `data` at random by `seed`, or all of it in order where that is None.

    A larger draw with the same seed contains the smaller one. The global random state is left alone.
    """
    if num_samples is None:
        return data
    if not 1 <= num_samples <= available:
        raise InputError(
            f"num_samples must be between 1 and the {available} images of {source}; got {num_samples}"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return Subset(data, order[:num_samples].tolist())


def check_split(split: str, known: tuple[str, ...]) -> None:
    """Raise InputError unless `split` is known."""
    if split not in known:
        raise InputError(f"unknown split {split!r}; known: {', '.join(known)}{suggestion(split, known)}")


def check_images_model(adapter: ModelAdapter, source: str, channels: int, num_classes: int) -> Preprocessing:
    """The model's preprocessing; InputError unless it classifies such images into enough classes."""
    preprocessing = adapter.preprocessing
    if adapter.task != "classification" or preprocessing is None:
        raise InputError(
            f"{source} holds images to classify, but model {adapter.name} has task {adapter.task!r}"
            f"{'' if preprocessing else ' and no preprocessing'}; choose data for that task with data=NAME"
        )
    if not len(preprocessing.mean) == len(preprocessing.std) == channels:
        raise InputError(
            f"{source} has {channels} channels, but the preprocessing of {adapter.name} has "
            f"{len(preprocessing.mean)} means and {len(preprocessing.std)} deviations; "
            f"choose a matching data=NAME"
        )
    if adapter.num_classes is not None and adapter.num_classes < num_classes:
        raise InputError(
            f"{source} has {num_classes} classes, but model {adapter.name} only {adapter.num_classes}; "
            f"choose a model trained on these classes, or other data with data=NAME"
        )
    PixelTransform(preprocessing)
    return preprocessing


@dataclass(kw_only=True)
class Digits:
    """The 1797 handwritten 8×8 digits of scikit-learn: 1200 for training and calibration, 597 to test."""

    task: ClassVar[str] = "classification"
    tests_on_calibration: ClassVar[bool] = False
    train_size: ClassVar[int] = 1200

    def check(self, adapter: ModelAdapter) -> None:
        """Raise InputError unless the model classifies 8×8 images of one channel into ten classes."""
        preprocessing = check_images_model(adapter, "digits", channels=1, num_classes=10)
        if preprocessing.resize is not None or preprocessing.crop is not None:
            raise InputError(
                f"digits are 8×8 pixels and are neither resized nor cropped, but {adapter.name} asks for "
                f"resize={preprocessing.resize}, crop={preprocessing.crop}; choose other data with data=NAME"
            )

    def dataset(
        self, split: str, preprocessing: Preprocessing, seed: int = 0, num_samples: int | None = None
    ) -> Dataset:
        """Items (image [1, 8, 8], label) of split "calibration", "train" (the same images), "test",
        "validation" or "remainder" (see held_out).
        """
        check_split(split, ("calibration", "train", "test", *HELD_OUT))
        digits = load_digits()
        # the legacy stream is frozen for good, so the split never changes
        order = np.random.RandomState(0).permutation(len(digits.target))
        chosen = order[self.train_size :] if split == "test" else order[: self.train_size]
        images = torch.from_numpy(digits.images[chosen] / 16).float()[:, None]  # [images, 1, 8, 8] in 0..1
        whole = TensorImages(
            T.normalize(images, preprocessing.mean, preprocessing.std), digits.target[chosen]
        )
        data = divide(whole, len(whole), split)
        return draw(data, len(data), num_samples, seed, f"digits, split {split}")  # type: ignore[arg-type]  # sized

    def describe(self) -> dict[str, Any]:
        """Name, source and number of images of each split."""
        return {"name": "digits", "path": "sklearn.datasets.load_digits", "calibration": 1200, "test": 597}


@dataclass(kw_only=True)
class Cifar10:
    """CIFAR-10 as two npz files with arrays `images` uint8 [images, 32, 32, 3], `labels` and `classes`."""

    path: str  # folder, under PTQ_DATA unless absolute
    calibration_file: str  # in that folder
    test_file: str  # in that folder

    task: ClassVar[str] = "classification"
    tests_on_calibration: ClassVar[bool] = False

    def file(self, split: str) -> Path:
        """The existing npz file of a split."""
        check_split(split, ("calibration", "test", *HELD_OUT))
        name = self.test_file if split == "test" else self.calibration_file
        return resolve(Path(self.path) / name, f"CIFAR-10 {split} images")

    def check(self, adapter: ModelAdapter) -> None:
        """Raise InputError unless both files are sound and the model has their classes in their order."""
        check_images_model(adapter, "CIFAR-10", channels=3, num_classes=10)
        for split in ("calibration", "test"):
            path = self.file(split)
            classes = [str(name) for name in self._array(path, "classes")]
            if adapter.class_names is not None and adapter.class_names != classes:
                raise InputError(
                    f"{path} has classes {', '.join(classes)}, but model {adapter.name} has "
                    f"{', '.join(adapter.class_names[:10])}; choose a model trained on CIFAR-10"
                )

    def dataset(
        self, split: str, preprocessing: Preprocessing, seed: int = 0, num_samples: int | None = None
    ) -> Dataset:
        """Items (image [3, 32, 32], label) of split "calibration", "test", "validation" or "remainder" (see
        held_out).
        """
        path = self.file(split)
        images, labels = self._array(path, "images"), self._array(path, "labels")
        pixels = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
        if not pixels or len(images) != len(labels):
            raise InputError(
                f"{path} must hold images uint8 [images, height, width, 3] and a label each; got images "
                f"{images.dtype} {list(images.shape)} and labels {list(labels.shape)}; write the file anew"
            )
        whole = ArrayImages(images, labels, PixelTransform(preprocessing))
        data = divide(whole, len(whole), split)
        return draw(data, len(data), num_samples, seed, str(path))  # type: ignore[arg-type]  # sized

    def describe(self) -> dict[str, Any]:
        """Name, folder and number of images of each split."""
        counts = {split: len(self._array(self.file(split), "labels")) for split in ("calibration", "test")}
        return {"name": "cifar10", "path": str(self.file("test").parent), **counts}

    @staticmethod
    def _array(path: Path, key: str) -> np.ndarray:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[key]
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise InputError(
                f"cannot read array {key!r} of {path}: {error}; "
                f"it must be an npz file without pickled objects"
            ) from error


class ClassFolders(datasets.ImageFolder):
    """Pictures under one folder a class, with the model's class index as label."""

    def __init__(self, root: Path, labels: dict[str, int], transform: PixelTransform) -> None:
        self.labels = labels
        super().__init__(str(root), transform=transform, loader=read_picture)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Folder names and the label of each; torchvision's hook."""
        return list(self.labels), self.labels


def read_picture(path: str) -> Image.Image:
    """The picture in RGB; InputError naming the file where it cannot be decoded."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"cannot decode picture {path}: {error}; replace or remove the file") from error


def pictures(folder: Path) -> Iterator[str]:
    """Names of the pictures in `folder` and below, in no order."""
    for _, _, files in os.walk(folder, followlinks=True):
        yield from (name for name in files if name.lower().endswith(datasets.folder.IMG_EXTENSIONS))


def class_labels(root: Path, class_names: list[str] | None, num_classes: int | None) -> dict[str, int]:
    """Folder name → class index: by name where the model knows its classes, else by sorted order.

    Raises InputError where a folder is empty or unknown, or the folders do not number the model's classes.
    """
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not names:
        raise InputError(f"{root} has no class folders; put the pictures in one folder a class")
    if num_classes is not None and len(names) > num_classes:
        raise InputError(
            f"{root} has {len(names)} class folders, but the model only {num_classes} classes; "
            f"point to the data set that the model was trained on"
        )
    for name in names:
        if next(pictures(root / name), None) is None:
            raise InputError(f"class folder {root / name} holds no pictures; add some or remove the folder")
    if class_names is None:
        if num_classes is not None and len(names) != num_classes:
            raise InputError(
                f"{root} has {len(names)} class folders, and without class names the model needs exactly "
                f"{num_classes}, in sorted order; point to the data set that the model was trained on"
            )
        return {name: index for index, name in enumerate(names)}
    index_of = {name: index for index, name in enumerate(class_names)}
    unknown = [name for name in names if name not in index_of]
    if unknown:
        raise InputError(
            f"class folder {root / unknown[0]} is no class of the model ({len(unknown)} such folders); "
            f"its classes are {', '.join(class_names[:3])}, …; name the folders so, or remove them"
            f"{suggestion(unknown[0], class_names)}"
        )
    return {name: index_of[name] for name in names}


@dataclass(kw_only=True)
class ImageFolder:
    """Folders of pictures, one folder a class, as ImageNet has; `check` ties them to a model."""

    train_dir: str  # calibration pictures; under PTQ_DATA unless absolute
    test_dir: str  # test pictures; may be the same folder

    task: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        self._labels: dict[str, dict[str, int]] = {}  # split → folder name → class index, by `check`

    @property
    def tests_on_calibration(self) -> bool:
        """Whether both folders are one."""
        return self.folder("calibration").samefile(self.folder("test"))

    def folder(self, split: str) -> Path:
        """The existing folder of a split."""
        check_split(split, ("calibration", "test", *HELD_OUT))
        path = self.test_dir if split == "test" else self.train_dir
        return resolve(path, f"folder of {split} pictures")

    def check(self, adapter: ModelAdapter) -> None:
        """Raise InputError unless both folders exist, hold pictures, and name classes of the model."""
        check_images_model(adapter, "an image folder", channels=3, num_classes=1)
        for split in ("calibration", "test"):
            self._labels[split] = class_labels(self.folder(split), adapter.class_names, adapter.num_classes)

    def dataset(
        self, split: str, preprocessing: Preprocessing, seed: int = 0, num_samples: int | None = None
    ) -> Dataset:
        """Items (image [3, height, width], label) of split "calibration", "test", "validation" or "remainder"
        (see held_out).

        Labels are the class indices of the model last given to `check`, which has to be called first.
        """
        folder = self.folder(split)
        labels = self._labels.get("test" if split == "test" else "calibration")
        if labels is None:
            raise InputError(f"the classes of {folder} are not tied to a model; call check(adapter) first")
        whole = ClassFolders(folder, labels, PixelTransform(preprocessing))
        data = divide(whole, len(whole), split)
        return draw(data, len(data), num_samples, seed, str(folder))  # type: ignore[arg-type]  # sized

    def describe(self) -> dict[str, Any]:
        """Name, folders and number of pictures of each split; a note where both are the same."""
        calibration, test = self.folder("calibration"), self.folder("test")
        facts: dict[str, Any] = {
            "name": "image_folder",
            "path": str(test),
            "calibration_path": str(calibration),
            "calibration": sum(1 for _ in pictures(calibration)),
            "test": sum(1 for _ in pictures(test)),
        }
        if self.tests_on_calibration:
            facts["note"] = "the calibration images are in the test set"
        return facts
