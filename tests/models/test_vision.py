"""Image models: embedded accuracies, strict checkpoints, blocks, and messages for wrong input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from ptq.config import build, choices, companion, load_choice
from ptq.errors import InputError
from ptq.models.adapter import QUANTIZABLE, ModelAdapter, read_checkpoint
from ptq.models.embedded import WEIGHTS_DIR

needs_data = pytest.mark.skipif("PTQ_DATA" not in os.environ, reason="PTQ_DATA is unset")
TARGETS = ("ptq.models.vision.", "ptq.models.embedded.")
IMAGE_MODELS = [
    name for name in choices("model") if load_choice("model", name)["_target_"].startswith(TARGETS)
]


def load(name: str, **overrides: object) -> ModelAdapter:
    return build(load_choice("model", name, **overrides), "model").load()


def random_weights(name: str) -> ModelAdapter:
    node = load_choice("model", name, checkpoint=None)
    return load(name, checkpoint=None, **({"pretrained": False} if "pretrained" in node else {}))


@torch.no_grad()
def top1(name: str) -> float:
    """Float top-1 in percent of a choice of conf/model on the test split of its data."""
    choice = build(load_choice("model", name), "model")
    data = build(load_choice("data", companion("model", name, "data")), "data")
    adapter = choice.load()
    data.check(adapter)
    right = total = 0
    for images, labels in DataLoader(data.dataset("test", adapter.preprocessing), batch_size=250):
        right += (adapter.forward(adapter.module, images).argmax(dim=1) == labels).sum().item()
        total += len(labels)
    return 100 * right / total


def nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Weight on 2^bits equal steps over each output channel's range, which holds 0 on a step."""
    rows = weight.flatten(1)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero_point = (-low / step).round()
    codes = ((rows / step).round() + zero_point).clamp(0, 2**bits - 1)
    return (step * (codes - zero_point)).view_as(weight)


@pytest.mark.parametrize(("name", "at_least"), [("digits_resnet", 98.0), ("digits_vit", 96.0)])
def test_embedded_accuracy_and_its_loss_at_two_bits(
    name: str, at_least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_top1 = top1(name)
    assert float_top1 >= at_least
    loaded = load(name)
    with torch.no_grad():
        for layer in loaded.quantizable().values():
            layer.weight.copy_(nearest(layer.weight, bits=2))
    target = build(load_choice("model", name), "model")
    monkeypatch.setattr(type(target), "load", lambda self: loaded)
    assert top1(name) <= float_top1 - 20


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit"])
def test_embedded_weights_are_small(name: str) -> None:
    assert (WEIGHTS_DIR / f"{name}.safetensors").stat().st_size <= 1_300_000


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_choice_builds_and_names_existing_data(name: str) -> None:
    assert build(load_choice("data", companion("model", name, "data")), "data").task == "classification"


@pytest.mark.parametrize(
    ("name", "size", "first", "last", "count"),
    [
        ("digits_resnet", 8, "stages.0.0", "stages.1.4", 10),
        ("digits_vit", 8, "blocks.0", "blocks.7", 8),
        ("cifar10_resnet20", 32, "layer1.0", "layer3.2", 9),
        ("cifar10_cct4", 32, "blocks.0", "blocks.3", 4),
        ("cifar10_cct2", 32, "classifier.blocks.0", "classifier.blocks.1", 2),
        ("mcunet_320kb", 64, "blocks.0.0", "blocks.17.0", 18),
        ("proxyless_w030", 64, "blocks.0.0", "blocks.19.0", 20),
        ("squeezenet1_1", 64, "features.3", "features.12", 8),
        ("resnet18", 64, "layer1.0", "layer4.1", 8),
        ("mobilenet_v2", 64, "features.1", "features.17", 17),
        ("deit_small", 224, "blocks.0", "blocks.11", 12),
        ("swin_tiny", 224, "layers.0.blocks.0", "layers.3.blocks.1", 12),
    ],
)
def test_blocks_and_forward(name: str, size: int, first: str, last: str, count: int) -> None:
    state = torch.random.get_rng_state()
    adapter = load(name) if name.startswith("digits") else random_weights(name)
    assert torch.equal(torch.random.get_rng_state(), state)
    blocks = adapter.blocks()
    assert blocks[0] == first
    assert blocks[-1] == last
    assert len(blocks) == count
    for block in blocks:
        assert sum(isinstance(m, QUANTIZABLE) for m in adapter.module.get_submodule(block).modules()) >= 2
    assert not any(module.training for module in adapter.module.modules())
    assert all(p.dtype == torch.float32 for p in adapter.module.parameters())
    assert adapter.preprocessing is not None
    assert adapter.class_names is not None
    assert len(adapter.class_names) == adapter.num_classes
    channels = len(adapter.preprocessing.mean)
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    with torch.no_grad():
        logits = adapter.forward(adapter.module, images)
    assert logits.shape == (2, adapter.num_classes)
    torch.testing.assert_close(images, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("digits_resnet", ["stages.0", "stages.1"]),
        ("cifar10_resnet20", ["layer1", "layer2", "layer3"]),
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("swin_tiny", [f"layers.{k}.blocks" for k in range(4)]),
        ("digits_vit", ["blocks"]),
    ],
)
def test_stages(name: str, stages: list[str]) -> None:
    adapter = load(name) if name.startswith("digits") else random_weights(name)
    assert adapter.stages() == stages


@pytest.mark.parametrize("name", ["digits_resnet", "cifar10_resnet20"])
def test_residual_block_leaves_its_input_alone(name: str) -> None:
    adapter = load(name) if name.startswith("digits") else random_weights(name)
    for name in adapter.blocks():
        block = adapter.module.get_submodule(name)
        x = torch.randn(1, block.conv1.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        before = x.clone()
        with torch.no_grad():
            block(x)
        torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_imagenet_models_know_the_synsets() -> None:
    for name in ("resnet18", "mcunet_320kb", "deit_small"):
        names = random_weights(name).class_names
        assert names is not None
        assert (names[0], names[207], names[999]) == ("n01440764", "n02099601", "n15075141")


def test_timm_preprocessing_and_overrides() -> None:
    own = random_weights("deit_small").preprocessing
    assert own is not None
    assert (own.resize, own.crop, own.interpolation) == (248, 224, "bicubic")
    mine = load("deit_small", pretrained=False, resize=256, mean=[0.5, 0.5, 0.5]).preprocessing
    assert mine is not None
    assert (mine.resize, mine.crop, mine.mean) == (256, 224, (0.5, 0.5, 0.5))


def test_torchvision_preprocessing() -> None:
    own = random_weights("resnet18").preprocessing
    assert own is not None
    assert (own.resize, own.crop, own.interpolation, own.mean[0]) == (256, 224, "bilinear", 0.485)


def test_unfit_checkpoint_names_every_tensor(tmp_path: Path) -> None:
    state = load_file(WEIGHTS_DIR / "digits_resnet.safetensors")
    state.pop("head.bias")
    state.pop("stem.weight")
    state["head.weight"] = state["head.weight"][:3].clone()
    state["tail.weight"] = torch.zeros(2)
    path = tmp_path / "unfit.safetensors"
    save_file(state, path)
    with pytest.raises(InputError) as caught:
        load("digits_resnet", checkpoint=str(path))
    message = str(caught.value)
    for part in ("missing: head.bias, stem.weight", "extra: tail.weight", "head.weight is [3, ", str(path)):
        assert part in message


def test_checkpoint_with_nan_is_refused(tmp_path: Path) -> None:
    state = load_file(WEIGHTS_DIR / "digits_vit.safetensors")
    state["head.bias"][0] = float("nan")
    path = tmp_path / "nan.safetensors"
    save_file(state, path)
    with pytest.raises(InputError, match=r"NaN or infinity in: head\.bias"):
        load("digits_vit", checkpoint=str(path))


class Payload(nn.Module):
    """Stands for any object that only a pickle can hold."""


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(Payload(), path)
    with pytest.raises(InputError, match="never unpickles"):
        read_checkpoint(path)
    with pytest.raises(InputError, match="never unpickles"):
        load("resnet18", checkpoint=str(path))


def test_pickle_of_plain_tensors_loads(tmp_path: Path) -> None:
    path = tmp_path / "digits.pth"
    torch.save({"state_dict": load_file(WEIGHTS_DIR / "digits_vit.safetensors")}, path)
    assert load("digits_vit", checkpoint=str(path)).source == path


def test_missing_checkpoint_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTQ_DATA", str(tmp_path))
    with pytest.raises(InputError, match=str(tmp_path / "weights" / "cifar10_resnet20.safetensors")):
        load("cifar10_resnet20")
    monkeypatch.delenv("PTQ_DATA")
    with pytest.raises(InputError, match=r"PTQ_DATA is unset.*checkpoint of cifar10_resnet20"):
        load("cifar10_resnet20")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("deit_small", {"architecture": "deit_smal_patch16_224"}, "did you mean 'deit_small_patch16_224'"),
        ("deit_small", {"architecture": "deit_small_patch16_224.fb_in2k"}, r"known: fb_in1k.*'fb_in1k'"),
        (
            "resnet18",
            {"architecture": "resnet19"},
            r"unknown torchvision classifier 'resnet19'; did you mean 'resnet",
        ),
        ("resnet18", {"weights": "IMAGENET1K_V9"}, "known: IMAGENET1K_V1, DEFAULT"),
        ("cifar10_resnet20", {"depth": 21}, "6n [+] 2.*got 21"),
        ("cifar10_cct4", {"heads": 3}, "heads=3, width=128"),
        ("cifar10_cct4", {"block": "postnorm"}, "model.block"),
    ],
)
def test_wrong_values(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(name, **overrides)


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(
        InputError, match=r"resnet18 are missing.*checkpoints.*no route.*model\.checkpoint=FILE"
    ):
        load("resnet18")
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(InputError, match=r"Hugging Face hub.*no route to host.*model\.checkpoint=FILE"):
        load("deit_small")


def test_denormal_weights_become_zero(tmp_path: Path) -> None:
    state = random_weights("cifar10_resnet20").module.state_dict()
    state["linear.bias"] = torch.tensor([1e-40, -1e-40, 1e-30] + [1.0] * 7)
    path = tmp_path / "denormal.safetensors"
    save_file(state, path)
    bias = load("cifar10_resnet20", checkpoint=str(path)).module.get_parameter("linear.bias")
    assert bias[:3].tolist() == [0, 0, pytest.approx(1e-30)]


@pytest.mark.data
@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [
        ("cifar10_resnet20", 91.73, 0.1),
        ("cifar10_cct4", 84.50, 0.1),
        ("mcunet_320kb", 70.2, 0.15),
        ("squeezenet1_1", 63.0, 0.15),
    ],
)
def test_float_accuracy(name: str, published: float, tolerance: float) -> None:
    assert top1(name) == pytest.approx(published, abs=tolerance)
