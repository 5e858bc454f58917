"""Folding and equalization: the function stays, ranges meet, and a saved model comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.testing import assert_close

import ptq
from ptq import checkpoint
from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter
from ptq.models.networks import CifarResNetModule, DigitsResNetModule, DigitsViTModule
from ptq.preparation import FoldedNorm, equalize, folded_graph, magnitudes, movable, rescale, spread_inputs


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with statistics and affine parameters away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.bias):
                tensor.data = torch.randn(tensor.shape, generator=generator)
            for tensor in (part.running_var, part.weight):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.3
    return module.eval()


def adapter_of(module: nn.Module) -> ModelAdapter:
    return ModelAdapter(name="net", module=module, task="any", forward=nn.Module.__call__)


MODELS = {
    "resnet": lambda: (DigitsResNetModule([4, 6], 1, 10), torch.randn(3, 1, 8, 8)),
    "padded": lambda: (CifarResNetModule(8, 10), torch.randn(2, 3, 16, 16)),
    "vit": lambda: (DigitsViTModule(2, 8, 2, 2, 12, 10), torch.randn(3, 1, 8, 8)),
    "mobile": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            BatchNormAct2d(6),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1, groups=2),
        ),
        torch.randn(2, 3, 9, 9),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_function_stays(choice, name: str) -> None:
    torch.manual_seed(0)
    module, batch = MODELS[name]()
    adapter = adapter_of(trained(module))
    before = module(batch)
    choice("preparation", "fold_batchnorm").apply(adapter, batch)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert_close(module(batch), before, rtol=1e-4, atol=1e-5)
    graph = folded_graph(adapter, batch)
    generator = torch.Generator().manual_seed(1)
    factors = torch.rand(graph.units, generator=generator) * 3 + 0.2
    factors[0] = 1
    weights = [p.clone() for p in module.parameters()]
    rescale(module, graph, factors)
    assert not all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
    assert_close(module(batch), before, rtol=1e-4, atol=1e-5)


def test_a_folded_norm_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1.0)).eval()
    conv, norm = module[0], module[1]
    conv.weight.data[:], conv.bias.data[:] = 3.0, 5.0
    norm.running_mean[:], norm.running_var[:] = 2.0, 3.0  # y = (x − 2) / √(3 + 1) · 4 + 7
    norm.weight.data[:], norm.bias.data[:] = 4.0, 7.0
    folded_graph(adapter_of(module), torch.ones(1, 1, 1, 1))
    assert isinstance(module[1], FoldedNorm)
    assert conv.weight.item() == 6.0
    assert conv.bias.item() == (5 - 2) * 2 + 7


@torch.no_grad()
def test_ranges_of_rows_and_columns_meet(choice) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
    module[0].weight *= torch.tensor([0.01, 1, 30, 1, 0])[:, None, None, None]  # and a dead channel
    adapter, batch = adapter_of(module.eval()), torch.randn(2, 2, 8, 8)
    before = module(batch)
    choice("preparation", "equalize").apply(adapter, batch)
    assert_close(module(batch), before, rtol=1e-4, atol=1e-5)
    for writer, reader, live in ((module[0], module[2], 4), (module[2], module[4], 4)):
        rows, columns = magnitudes(writer).amax(1)[:live], magnitudes(reader).amax(0)[:live]
        assert_close(rows, columns, rtol=1e-3, atol=0)


@torch.no_grad()
def test_tied_channels_balance_all_that_touch_them() -> None:
    torch.manual_seed(0)
    module = trained(DigitsResNetModule([4], 2, 10))
    adapter, batch = adapter_of(module), torch.randn(2, 1, 8, 8)
    graph = folded_graph(adapter, batch)
    equalize(module, graph, 50)
    wrote, reads = torch.zeros(graph.units).double(), torch.zeros(graph.units).double()
    for name, channels in graph.layers.items():
        layer = module.get_submodule(name)
        size = magnitudes(layer)
        wrote.scatter_reduce_(0, channels.outputs, size.amax(1), "amax")
        reads.scatter_reduce_(0, spread_inputs(layer, channels.inputs).flatten(), size.flatten(), "amax")
    own = movable(graph)
    assert own.sum() == graph.units - 1
    assert_close(wrote[own], reads[own], rtol=0.02, atol=0)


def test_preparation_goes_with_every_method_and_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = trained(DigitsResNetModule([4, 6], 1, 10))
    batches = [torch.randn(16, 1, 8, 8)]
    quantized, _ = ptq.quantize_model(module, batches, "gptq", bits=4, preparation="equalize")
    checkpoint.save(quantized, tmp_path / "saved")
    fresh = DigitsResNetModule([4, 6], 1, 10)
    restored = checkpoint.load(tmp_path / "saved", fresh)
    assert torch.equal(restored(batches[0]), quantized(batches[0]))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in restored.modules())


def test_wrong_use_is_explained(choice) -> None:
    with pytest.raises(InputError, match="equalization_rounds must not be negative; got -1"):
        choice("preparation", "equalize", equalization_rounds=-1)
    text = ModelAdapter(
        name="text", module=nn.Linear(2, 2), task="language_modeling", forward=nn.Module.__call__
    )
    with pytest.raises(InputError, match="'text' is a language model; say preparation=none"):
        choice("preparation", "equalize").check(text)
