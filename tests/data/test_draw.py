"""The calibration draw: balanced, augmented, of noise; the same at each reading."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset

import ptq
from ptq.data.augmented import AugmentedImages
from ptq.data.balanced import draw_balanced, labels_of
from ptq.data.draw import Samples, calibration_batches
from ptq.data.images import Digits, TensorImages
from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter, Preprocessing
from ptq.models.embedded import DIGITS_PREPROCESSING

KINDS = ["flip", "crop", "jitter"]


@pytest.fixture
def digits(choice) -> ModelAdapter:
    return choice("model", "digits_resnet").load()


@pytest.fixture
def drawn(choice, digits):
    """drawn(source, seed, key=value, …) are all images of a draw, [images, channels, height, width]."""

    def images(source: str = "digits", seed: int = 0, **overrides: object) -> Tensor:
        calibration = choice("calibration", "default", **{"num_samples": 60, "batch_size": 25, **overrides})
        return torch.cat(calibration_batches(choice("data", source), digits, calibration, seed))

    return images


def test_a_balanced_draw_has_as_many_of_each_class_as_there_are() -> None:
    labels = [0] * 50 + [1] * 3 + [2] * 40 + [7] * 20
    images = TensorImages(torch.arange(len(labels))[:, None, None, None], torch.tensor(labels).numpy())
    part = Subset(images, list(range(len(labels))))
    small, large = (labels_of(draw_balanced(part, number, seed=1)) for number in (11, 33))
    assert small is not None
    assert large is not None
    assert set(Counter(small).values()) == {2, 3}
    assert Counter(large) == {0: 10, 1: 3, 2: 10, 7: 10}
    assert large[:11] == small
    one, same, other = ([int(x) for x, _ in draw_balanced(part, 33, seed)] for seed in (1, 1, 2))
    assert one == same != other
    assert len(set(one)) == 33
    with pytest.raises(InputError, match="the 113 images there are; got 114"):
        draw_balanced(part, 114, seed=0)


def test_balance_is_a_switch_of_the_calibration(choice, digits) -> None:
    for balance in (False, True):
        calibration = choice("calibration", "default", balance=balance)
        samples = Samples(Digits(), digits, calibration, num_samples=505, batch_size=64, seed=0)
        counts = Counter(int(label) for _, labels in samples for label in labels)
        assert (max(counts.values()) - min(counts.values()) == 1) is balance


def test_augmented_images_are_the_same_at_each_reading(choice, drawn, digits) -> None:
    state = torch.random.get_rng_state()
    plain, first = drawn(), drawn(image_augmentation=KINDS)
    assert torch.equal(first, drawn(image_augmentation=KINDS))
    assert not torch.equal(first, drawn(image_augmentation=KINDS, crop_scale=[0.9, 1.0]))
    torch.testing.assert_close(drawn(image_augmentation=KINDS, num_samples=80)[:60], first, rtol=0, atol=0)
    assert plain.shape == first.shape
    assert all(not torch.equal(x, y) for x, y in zip(plain, first, strict=True))
    calibration = choice("calibration", "default", image_augmentation=KINDS, num_samples=60)
    samples = Samples(Digits(), digits, calibration, num_samples=None, batch_size=25, seed=0)
    for _ in range(2):  # in another order each time
        read = {image.numpy().tobytes() for images, _ in samples for image in images}
        assert read == {image.numpy().tobytes() for image in first}
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_each_augmentation_does(drawn) -> None:
    plain, mean = drawn(), DIGITS_PREPROCESSING.mean[0] / DIGITS_PREPROCESSING.std[0]
    flipped = drawn(image_augmentation=["flip"])
    mirrored = [torch.allclose(y, x.flip(-1), atol=1e-5) for x, y in zip(plain, flipped, strict=True)]
    kept = [torch.allclose(y, x, atol=1e-5) for x, y in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 15 < sum(mirrored) < 45
    whole = drawn(image_augmentation=["crop"], crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0])
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-5)
    jittered = drawn(image_augmentation=["jitter"])
    pixels = (jittered + mean) * DIGITS_PREPROCESSING.std[0]
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    brightness = (jittered + mean).mean((1, 2, 3)) / (plain + mean).mean((1, 2, 3))
    assert brightness.std() > 0.1


def test_colour_images_are_augmented_too(choice) -> None:
    rgb = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    calibration = choice("calibration", "default", image_augmentation=KINDS)
    images = TensorImages(torch.randn(4, 3, 9, 12), torch.arange(4).numpy())
    augmented = AugmentedImages(images, calibration, rgb, seed=0)
    assert [image.shape for image, _ in augmented] == [(3, 9, 12)] * 4
    assert [label for _, label in augmented] == [0, 1, 2, 3]


def test_noise_has_the_models_size_mean_and_deviation(choice, drawn) -> None:
    noise = drawn("noise", num_samples=500)
    assert noise.shape == (500, 1, 8, 8)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert torch.equal(drawn("noise", num_samples=700)[:500], noise)
    assert not torch.equal(drawn("noise", seed=1, num_samples=500), noise)
    unknown = ModelAdapter(
        name="toy",
        module=torch.nn.Identity(),
        task="classification",
        forward=torch.nn.Module.__call__,
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    )
    with pytest.raises(InputError, match="crop=None, native=None"):
        choice("data", "noise").check(unknown)


def test_random_tokens_are_of_the_vocabulary(choice) -> None:
    adapter = choice("model", "topics_llama").load()
    source = choice("data", "random_tokens")
    source.check(adapter)
    calibration = choice("calibration", "text")
    [first, *_] = calibration_batches(source, adapter, calibration, seed=0)
    assert first.shape == (8, adapter.context_length)
    counts = torch.bincount(source.tokens("calibration", adapter.tokenizer)[0])
    assert len(counts) == 256
    assert counts.min() > 0.8 * counts.max()
    with pytest.raises(InputError, match="for text choose random_tokens"):
        choice("data", "noise").check(adapter)


@pytest.mark.parametrize("overrides", [{"balance": True}, {"image_augmentation": ["flip"]}], ids=str)
def test_only_images_of_a_source_are_drawn_in_some_way(choice, overrides: dict[str, object]) -> None:
    adapter = choice("model", "topics_llama").load()
    calibration = choice("calibration", "text", **overrides)
    with pytest.raises(InputError, match=r"calibration.*'topics_llama' reads text; set it to"):
        calibration_batches(choice("data", "topics"), adapter, calibration, seed=0)
    with pytest.raises(InputError, match="these batches are drawn already"):
        ptq.quantize_model(torch.nn.Linear(3, 3), [torch.randn(2, 3)], settings=calibration)
