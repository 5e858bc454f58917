"""Image data: draws, splits, labels, and every message for data that is not as it should be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ptq.config import build, load_choice
from ptq.data.images import Cifar10, Digits, ImageFolder
from ptq.data.root import data_root, resolve
from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter, Preprocessing

GREY = Preprocessing(mean=(0.0,), std=(1.0,))
RGB = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def adapter(
    class_names: list[str] | None, num_classes: int, preprocessing: Preprocessing = RGB
) -> ModelAdapter:
    return ModelAdapter(
        name="toy",
        module=nn.Identity(),
        task="classification",
        forward=nn.Module.__call__,
        preprocessing=preprocessing,
        class_names=class_names,
        num_classes=num_classes,
    )


def picture(path: Path, colour: tuple[int, int, int] = (255, 0, 51), size: tuple[int, int] = (12, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("ant", "bee", "cat"):
        for index in range(2):
            picture(tmp_path / name / f"{index}.png")
    return tmp_path


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("calib.npz", 7), ("test.npz", 5)):
        np.savez(
            tmp_path / name,
            images=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
            labels=rng.integers(0, 10, count, dtype=np.uint8),
            classes=np.array(list("abcdefghij")),
        )
    return tmp_path


def cifar_data(path: Path) -> Cifar10:
    return Cifar10(path=str(path), calibration_file="calib.npz", test_file="test.npz")


def test_data_root_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTQ_DATA", raising=False)
    with pytest.raises(InputError, match=r"PTQ_DATA is unset.*cifar10.*export PTQ_DATA="):
        resolve("cifar10", "CIFAR-10 images")


def test_data_root_is_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTQ_DATA", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"PTQ_DATA=.*gone is not a folder"):
        data_root()


def test_resolve_names_the_full_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTQ_DATA", str(tmp_path))
    (tmp_path / "there").mkdir()
    assert resolve("there", "test") == tmp_path / "there"
    with pytest.raises(InputError, match=str(tmp_path / "a" / "b")):
        resolve("a/b", "test")


def test_resolve_absolute_needs_no_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PTQ_DATA", raising=False)
    assert resolve(tmp_path, "test") == tmp_path
    with pytest.raises(InputError, match="does not exist"):
        resolve(tmp_path / "gone", "test")


def test_digits_splits_are_disjoint_and_whole() -> None:
    train, test = (Digits().dataset(split, GREY) for split in ("calibration", "test"))
    assert (len(train), len(test)) == (1200, 597)
    assert [label for _, label in train] == [label for _, label in Digits().dataset("train", GREY)]
    image, label = test[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert isinstance(label, int)
    pixels = torch.stack([image for data in (train, test) for image, _ in data]).flatten(1)
    assert len(pixels.unique(dim=0)) == 1797  # no image twice
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_draw_is_seeded_nested_and_leaves_the_global_rng_alone() -> None:
    state = torch.random.get_rng_state()
    small = torch.stack([image for image, _ in Digits().dataset("calibration", GREY, seed=3, num_samples=11)])
    large = torch.stack([image for image, _ in Digits().dataset("calibration", GREY, seed=3, num_samples=29)])
    other = torch.stack([image for image, _ in Digits().dataset("calibration", GREY, seed=4, num_samples=11)])
    torch.testing.assert_close(large[:11], small, rtol=0, atol=0)
    assert not torch.equal(other, small)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("num_samples", [0, -1, 1201])
def test_num_samples_out_of_range(num_samples: int) -> None:
    with pytest.raises(InputError, match=rf"1200 images.*got {num_samples}"):
        Digits().dataset("calibration", GREY, num_samples=num_samples)


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="did you mean 'test'"):
        Digits().dataset("tests", GREY)


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        pytest.param(adapter(None, 10, RGB), "1 channels", id="colour"),
        pytest.param(adapter(None, 5, GREY), "10 classes", id="classes"),
        pytest.param(adapter(None, 10, Preprocessing(mean=(0.0,), std=(1.0,), crop=4)), "crop=4", id="crop"),
        pytest.param(
            adapter(None, 10, Preprocessing(mean=(0.0,), std=(1.0,), interpolation="bilinar")),
            "did you mean 'bilinear'",
            id="interpolation",
        ),
        pytest.param(
            ModelAdapter(
                name="t", module=nn.Identity(), task="language_modeling", forward=nn.Module.__call__
            ),
            "task 'language_modeling'",
            id="task",
        ),
    ],
)
def test_digits_refuse_models_that_do_not_fit(model: ModelAdapter, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        Digits().check(model)


def test_cifar_items_and_counts(cifar: Path) -> None:
    data = cifar_data(cifar)
    data.check(adapter(list("abcdefghij"), 10))
    with np.load(cifar / "test.npz", allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    items = list(data.dataset("test", preprocessing))
    assert [label for _, label in items] == labels.tolist()
    expected = (
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    )
    expected = expected / torch.tensor([0.5, 0.25, 2.0])[:, None, None]
    torch.testing.assert_close(torch.stack([image for image, _ in items]), expected)
    assert data.describe() == {"name": "cifar10", "path": str(cifar), "calibration": 7, "test": 5}


def test_cifar_classes_in_another_order(cifar: Path) -> None:
    with pytest.raises(InputError, match=r"has classes a, b.*has b, a"):
        cifar_data(cifar).check(adapter(list("bacdefghij"), 10))


def test_cifar_file_missing(cifar: Path) -> None:
    (cifar / "test.npz").unlink()
    with pytest.raises(InputError, match=str(cifar / "test.npz")):
        cifar_data(cifar).check(adapter(None, 10))


def test_cifar_refuses_pickled_objects(cifar: Path) -> None:
    np.savez(
        cifar / "test.npz", images=np.array([{}]), labels=np.zeros(1), classes=np.array(list("abcdefghij"))
    )
    with pytest.raises(InputError, match="cannot read array 'images'"):
        cifar_data(cifar).dataset("test", RGB)


def test_cifar_refuses_float_images(cifar: Path) -> None:
    np.savez(cifar / "test.npz", images=np.zeros((2, 32, 32, 3)), labels=np.zeros(2), classes=np.array(["a"]))
    with pytest.raises(InputError, match="float64"):
        cifar_data(cifar).dataset("test", RGB)


def test_folder_labels_come_from_the_model(folders: Path) -> None:
    data = ImageFolder(train_dir=str(folders), test_dir=str(folders))
    data.check(adapter(["dog", "cat", "bee", "ant"], 4))
    assert [label for _, label in data.dataset("test", RGB)] == [3, 3, 2, 2, 1, 1]
    assert data.describe()["test"] == 6
    assert "calibration images are in the test set" in data.describe()["note"]


def test_folder_sorted_order_without_class_names(folders: Path) -> None:
    data = ImageFolder(train_dir=str(folders), test_dir=str(folders))
    data.check(adapter(None, 3))
    assert [label for _, label in data.dataset("test", RGB)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match="exactly 4"):
        data.check(adapter(None, 4))


def test_folder_preprocessing(folders: Path) -> None:
    data = ImageFolder(train_dir=str(folders), test_dir=str(folders))
    data.check(adapter(None, 3))
    wanted = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=8, crop=6)
    image, _ = data.dataset("test", wanted)[0]
    assert image.shape == (3, 6, 6)
    torch.testing.assert_close(image[:, 2, 3], torch.tensor([1.0, -1.0, -0.6]))


def test_folder_unknown_class(folders: Path) -> None:
    with pytest.raises(InputError, match=r"cat is no class of the model.*did you mean 'cats'"):
        ImageFolder(train_dir=str(folders), test_dir=str(folders)).check(adapter(["ant", "bee", "cats"], 3))


def test_folder_with_too_many_classes(folders: Path) -> None:
    with pytest.raises(InputError, match=r"3 class folders.*only 2 classes"):
        ImageFolder(train_dir=str(folders), test_dir=str(folders)).check(adapter(None, 2))


def test_folder_without_pictures(folders: Path) -> None:
    (folders / "dog").mkdir()
    (folders / "dog" / "readme.txt").write_text("no picture")
    with pytest.raises(InputError, match="dog holds no pictures"):
        ImageFolder(train_dir=str(folders), test_dir=str(folders)).check(adapter(None, 4))


def test_folder_empty_or_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no class folders"):
        ImageFolder(train_dir=str(tmp_path), test_dir=str(tmp_path)).check(adapter(None, 4))
    with pytest.raises(InputError, match=r"gone does not exist"):
        ImageFolder(train_dir=str(tmp_path / "gone"), test_dir=str(tmp_path)).check(adapter(None, 4))


def test_folder_dataset_needs_check(folders: Path) -> None:
    with pytest.raises(InputError, match="call check"):
        ImageFolder(train_dir=str(folders), test_dir=str(folders)).dataset("test", RGB)


def test_folder_names_the_broken_picture(folders: Path) -> None:
    (folders / "ant" / "0.png").write_bytes(b"not a picture")
    data = ImageFolder(train_dir=str(folders), test_dir=str(folders))
    data.check(adapter(None, 3))
    with pytest.raises(InputError, match=r"0\.png"):
        data.dataset("test", RGB)[0]


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenet_samples", "imagenet"])
def test_choices_build(name: str) -> None:
    assert build(load_choice("data", name), "data").task == "classification"


@pytest.mark.data
@pytest.mark.skipif("PTQ_DATA" not in os.environ, reason="PTQ_DATA is unset")
def test_local_data_counts() -> None:
    cifar10 = build(load_choice("data", "cifar10"), "data").describe()
    assert (cifar10["calibration"], cifar10["test"]) == (5000, 10000)
    assert build(load_choice("data", "imagenet_samples"), "data").describe()["test"] == 1000
