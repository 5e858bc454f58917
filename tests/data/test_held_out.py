"""The validation split: disjoint from what calibrates and from what tests, the same for every seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from ptq.data.held_out import HeldOut
from ptq.data.images import Digits, ImageFolder
from ptq.data.text import PydocTopics, TextFiles
from ptq.models.adapter import ModelAdapter, Preprocessing

GREY = Preprocessing(mean=(0.0,), std=(1.0,))
RGB = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def images(data: object, split: str, preprocessing: Preprocessing = GREY, **draw: int | None) -> list[bytes]:
    return [image.numpy().tobytes() for image, _ in data.dataset(split, preprocessing, **draw)]


def test_digits_are_divided_for_good() -> None:
    digits = Digits()
    validation, remainder = images(digits, "validation"), images(digits, "remainder")
    assert sorted(validation + remainder) == sorted(images(digits, "calibration"))
    assert len(validation) == 240
    test = set(images(digits, "test"))
    assert not test & set(validation)
    assert not set(remainder) & set(validation)
    view = HeldOut(digits)
    assert not view.changes_test
    for seed in (0, 1):
        drawn = set(images(view, "calibration", seed=seed, num_samples=900))
        assert len(drawn) == 900
        assert not drawn & set(validation)
    assert images(view, "test") == images(digits, "test")
    assert images(view.validation(), "test") == validation
    assert images(view.validation(), "test", num_samples=500) == validation  # as many as there are
    few = images(view.validation(), "test", num_samples=30)
    assert len(few) == 30
    assert set(few) <= set(validation)


def test_one_folder_for_both_is_tested_on_what_is_not_held_out(tmp_path: Path) -> None:
    for k in range(10):
        path = tmp_path / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (k, 2 * k, 0)).save(path)
    source = ImageFolder(train_dir=str(tmp_path), test_dir=str(tmp_path))
    view = HeldOut(source)
    view.check(
        ModelAdapter(
            name="toy",
            module=nn.Identity(),
            task="classification",
            forward=nn.Module.__call__,
            preprocessing=RGB,
            class_names=["class0", "class1"],
            num_classes=2,
        )
    )
    assert view.changes_test
    validation = set(images(view.validation(), "test", RGB))
    assert len(validation) == 2
    assert len(images(view, "test", RGB)) == 8
    assert not validation & set(images(view, "test", RGB))
    assert not validation & set(images(view, "calibration", RGB, num_samples=8))
    assert len(images(source, "test", RGB)) == 10  # untouched for jobs that choose nothing


def test_text_splits_share_nothing(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + k) for k in range(1000))  # every character once
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    files = TextFiles(
        calibration_file=str(tmp_path / "text.txt"),
        calibration_start=100,
        test_file=str(tmp_path / "text.txt"),
        max_characters=100,
        per_document=False,
        document_separator=None,
        min_document_characters=0,
        join_paragraphs=False,
    )
    parts = {s: set(files.documents(s)[0]) for s in ("calibration", "remainder", "validation", "test")}
    assert len(parts["validation"]) == 180
    assert parts["remainder"] | parts["validation"] == parts["calibration"]
    assert not parts["remainder"] & parts["validation"]
    assert not parts["test"] & parts["validation"]


def test_topics_keep_their_calibration_and_hold_out_a_part_of_train() -> None:
    topics = PydocTopics(per_document=False)
    validation = set(topics.documents("validation"))
    assert validation < set(topics.documents("train"))
    assert topics.documents("remainder") == topics.documents("calibration")
    assert not validation & {*topics.documents("calibration"), *topics.documents("test")}


@pytest.mark.data
def test_cifar_images_are_disjoint(choice) -> None:
    data = choice("data", "cifar10")
    size = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    validation = data.dataset("validation", Preprocessing(**size))
    remainder = data.dataset("remainder", Preprocessing(**size))
    assert (len(validation), len(remainder)) == (1000, 4000)
    assert not set(validation.indices) & set(remainder.indices)
    assert torch.equal(validation[0][0], data.dataset("calibration", RGB)[validation.indices[0]][0])
