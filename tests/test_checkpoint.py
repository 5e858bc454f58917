"""Quantized modules and their files: the same outputs to the bit, and a size that agrees with the
accounting.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import ptq
from ptq import packed_file
from ptq.checkpoint import file_bytes, quantized_bytes
from ptq.layers import quantized_layer, weight_matrix


class Mixed(nn.Module):
    """Every kind of layer there is, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.depthwise = nn.Conv2d(7, 7, 3, groups=7, stride=2, padding="valid")
        self.linear = nn.Linear(7, 5, bias=False)
        self.conv1d = Conv1D(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(torch.relu(self.norm(self.conv(x))))
        return self.conv1d(torch.tanh(self.linear(x.mean((2, 3)))))


@pytest.fixture
def mixed() -> Mixed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed().eval()


X = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", ["affine", "affine_float", "symmetric", "affine_release"])
@pytest.mark.parametrize("bits", [2, 3, 11, 16])
@pytest.mark.parametrize("group_size", [None, 4], ids=["row", "four"])
def test_saved_model_gives_identical_outputs(
    mixed, tmp_path, grid: str, bits: int, group_size: int | None
) -> None:
    quantized, report = ptq.quantize_model(mixed, [X], "gptq", grid, bits, group_size=group_size)
    ptq.save(quantized, tmp_path / "model")
    loaded = ptq.load(tmp_path / "model", Mixed())
    assert torch.equal(loaded(X), quantized(X))
    if bits > 8:
        torch.testing.assert_close(quantized(X), mixed(X), rtol=0.02, atol=2e-3)
    weights = sum(torch.Size(layer.shape).numel() for layer in report.layers)
    assert weights == sum(m.weight.numel() for n, m in mixed.named_children() if n != "norm")
    tensors = sum(len(layer.packed) for layer in quantized.children() if hasattr(layer, "packed"))
    counted = report.bits_per_coefficient()["total"] * weights / 8
    assert counted - 1e-6 <= quantized_bytes(tmp_path / "model") <= counted + tensors
    size = (tmp_path / "model" / "quantized.safetensors").stat().st_size
    assert size == file_bytes(quantized) <= counted + 200 + 60 * tensors


def test_quantized_modules_compute_with_the_dequantized_weight(mixed, choice) -> None:
    for layer in (mixed.conv, mixed.depthwise, mixed.linear, mixed.conv1d):
        W = weight_matrix(layer)
        grid = choice("grid", "affine").fit(W, 4)
        quantized = quantized_layer(layer, grid, grid.round(W))
        assert quantized.weight.shape == layer.weight.shape
        x = X if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 else torch.randn(2, 7, 9, 9)
        if not isinstance(layer, nn.Conv2d):
            x = torch.randn(4, weight_matrix(layer).shape[-1])
        layer.weight.data = quantized.weight.reshape(layer.weight.shape)
        torch.testing.assert_close(quantized(x), layer(x))


def test_bits_by_hand() -> None:
    """A 10 × 6 layer at 3 bits: codes 180, a float16 scale and a 3-bit zero point per row."""
    layer = nn.Linear(6, 10)
    quantized, report = ptq.quantize_model(nn.Sequential(layer), [torch.randn(8, 6)], "rtn", "affine", 3)
    bits = report.bits_per_coefficient()
    assert bits == {"codes": 3.0, "parameters": 10 * 19 / 60, "total": 3 + 10 * 19 / 60}
    assert report.model_bits_per_coefficient(quantized) == pytest.approx((180 + 190 + 10 * 32) / 70)


def test_what_cannot_be_loaded_is_named(mixed, tmp_path) -> None:
    quantized, _ = ptq.quantize_model(mixed, [X], "rtn", bits=4)
    folder = ptq.save(quantized, tmp_path / "model")
    with pytest.raises(ptq.InputError, match="does not say how to build"):
        ptq.load(folder)
    with pytest.raises(ptq.InputError, match="layers that the model lacks: conv, conv1d"):
        ptq.load(folder, nn.Sequential(nn.Linear(2, 2)))
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ptq.InputError, match="format 99"):
        ptq.load(folder, Mixed())
    (folder / "float.safetensors").unlink()
    with pytest.raises(ptq.InputError, match=r"float\.safetensors is missing"):
        ptq.load(folder, Mixed())


@pytest.mark.parametrize("grid", ["affine", "entropy"])
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("quantized.safetensors", "flip"),
        ("float.safetensors", "flip"),
        ("quantized.safetensors", "cut"),
        ("model.json", "cut"),
        ("model.json", "fact"),
    ],
)
def test_damaged_files_are_refused(mixed, tmp_path, grid: str, name: str, harm: str) -> None:
    quantized, _ = ptq.quantize_model(mixed, [X], "rtn", grid, bits=4)
    path = ptq.save(quantized, tmp_path / "model") / name
    content = path.read_bytes()
    if harm == "flip":
        content = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    elif harm == "cut":
        content = content[: len(content) // 2]
    else:
        said = json.loads(content)
        said["folded_norms"] = {"norm": "conv"}
        content = json.dumps(said).encode()
    path.write_bytes(content)
    with pytest.raises(ptq.InputError, match=f"{name}.* (damaged|no longer matches).*save the model again"):
        ptq.load(path.parent, Mixed())


def test_every_flipped_bit_is_found(tmp_path) -> None:
    """A bit of each byte of model.json, and of some bytes of the others; cuts too."""
    model = nn.Sequential(nn.Linear(6, 5))
    quantized, _ = ptq.quantize_model(model, [torch.randn(16, 6)], "gptq", "entropy", 3)
    folder = ptq.save(quantized, tmp_path / "model")
    for path in folder.iterdir():
        content = path.read_bytes()
        for k in range(0, len(content), 1 if path.name == "model.json" else 13):
            flipped = bytearray(content)
            flipped[k] ^= 1 << k % 8
            for harmed in (bytes(flipped), content[:k]):
                path.write_bytes(harmed)
                if not _same_json(harmed, content):
                    with pytest.raises(ptq.InputError):
                        ptq.load(folder, nn.Sequential(nn.Linear(6, 5)))
        path.write_bytes(content)
    ptq.load(folder, nn.Sequential(nn.Linear(6, 5)))


def _same_json(one: bytes, other: bytes) -> bool:
    """Whether both say the same: a bit of white space may be another white space."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_a_file_whose_directory_disagrees_is_refused(mixed, tmp_path) -> None:
    quantized, _ = ptq.quantize_model(mixed, [X], "rtn", bits=4)
    path = ptq.save(quantized, tmp_path / "model") / "quantized.safetensors"
    facts, packed = packed_file.read(path)
    whole = load_file(path)["layers"]
    for name, harmed in (
        ("short", {"layers": whole[:-7].clone()}),
        ("long", {"layers": torch.cat([whole, whole[-7:]])}),
        ("directory", {"layers": torch.cat([whole[:4], torch.zeros_like(whole[4:])])}),
        ("length", {"layers": torch.cat([torch.full((4,), 255, dtype=torch.uint8), whole[4:]])}),
        ("missing", {"other": whole}),
    ):
        save_file(harmed, tmp_path / name)
        with pytest.raises(ptq.InputError, match=f"{name} is damaged.*save the model again"):
            packed_file.read(tmp_path / name)
    packed_file.write(tmp_path / "again", facts, packed)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_casting_the_model_spares_packed_tensors(mixed) -> None:
    quantized, _ = ptq.quantize_model(mixed, [X], "rtn", bits=4)
    before = {k: t.clone() for k, t in quantized.linear.packed.items()}
    quantized.bfloat16()
    assert quantized.norm.weight.dtype is torch.bfloat16
    for name, tensor in quantized.linear.packed.items():
        assert tensor.dtype is before[name].dtype
        assert torch.equal(tensor, before[name])


def test_dequantized_weights_in_half_precision(mixed) -> None:
    quantized, _ = ptq.quantize_model(mixed, [X], "rtn", bits=8)
    y = F.linear(torch.ones(1, 7), quantized.linear.weight)
    torch.testing.assert_close(quantized.linear(torch.ones(1, 7).bfloat16()).float(), y, rtol=0.02, atol=0.02)
