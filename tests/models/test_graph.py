"""The scale graph: which channels share a unit, which must stay as they are, and what can be folded."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter
from ptq.models.graph import REAL, ScaleGraph, scale_graph
from ptq.plan import trace


def graph_of(module: nn.Module, batch: Tensor) -> ScaleGraph:
    adapter = ModelAdapter(name="net", module=module.eval(), task="any", forward=nn.Module.__call__)
    return scale_graph(adapter, batch, trace(adapter, batch).layers())


class Joins(nn.Module):
    """A residual sum, a concatenation, a padded shortcut and a pooled gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.inner = nn.Conv2d(3, 3, 3, padding=1)
        self.wide = nn.Conv2d(3, 5, 1)
        self.gate = nn.Linear(5, 5)
        self.side = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.inner(x))
        x = self.wide(x) + F.pad(x, (0, 0, 0, 0, 1, 1))
        x = F.relu(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        x = torch.cat([F.max_pool2d(x, 2), F.max_pool2d(F.relu(self.side(x)), 2)], 1)
        return self.head(x.mean((2, 3)))


def test_sums_tie_concatenation_joins_and_gates_stay() -> None:
    graph = graph_of(Joins(), torch.randn(2, 2, 8, 8))
    layers = graph.layers
    trunk = layers["stem"].outputs
    assert torch.equal(layers["inner"].outputs, trunk)
    assert torch.equal(layers["inner"].inputs, trunk)
    assert torch.equal(layers["wide"].outputs[1:4], trunk)  # the shortcut's zeros fit every unit
    assert len({*trunk.tolist(), *layers["wide"].outputs.tolist()}) == 5
    assert torch.equal(layers["gate"].inputs, layers["wide"].outputs)  # the gate reads what it multiplies
    assert bool((layers["gate"].outputs == REAL).all())
    joined = torch.cat([layers["wide"].outputs, layers["side"].outputs])
    assert torch.equal(layers["head"].inputs, joined)
    assert bool((layers["stem"].inputs == REAL).all())
    assert bool((layers["head"].outputs == REAL).all())
    assert graph.tensors["inner"] != graph.tensors["wide"]
    assert graph.from_input == {"stem"}
    assert graph.head == "head"


@pytest.mark.parametrize(
    ("between", "free"),
    [
        (nn.ReLU(), True),
        (nn.Sequential(nn.Dropout(), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)), True),
        (nn.ReLU6(), False),
        (nn.GELU(), False),
        (nn.Hardswish(), False),
        (nn.BatchNorm2d(4, affine=False), False),
        (nn.Softmax(dim=1), False),
    ],
    ids=["relu", "linear", "relu6", "gelu", "hardswish", "norm", "softmax"],
)
def test_only_homogeneous_functions_let_units_through(between: nn.Module, free: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 2, 1))
    graph = graph_of(module, torch.randn(1, 3, 4, 4))
    first, last = graph.layers["0"], graph.layers["2"]
    assert bool((first.outputs != REAL).all()) == free
    assert bool((last.inputs != REAL).all()) == free
    assert torch.equal(first.outputs, last.inputs) or not free


def test_flattened_pictures_repeat_their_channels() -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    graph = graph_of(module, torch.randn(1, 1, 2, 2))
    assert torch.equal(graph.layers["3"].inputs, graph.layers["0"].outputs.repeat_interleave(4))


def test_shuffled_and_split_channels_keep_their_names() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(n, m, 1) for n, m in ((2, 6), (3, 3), (3, 2)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x.reshape(x.shape[0], 2, 3, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
            left, right = x.chunk(2, dim=1)
            return self.b(left).relu() + self.c(right).mean(1, keepdim=True)

    graph = graph_of(Shuffle(), torch.randn(1, 2, 4, 4))
    given = graph.layers["a"].outputs
    assert torch.equal(graph.layers["b"].inputs, given[[0, 3, 1]])
    assert torch.equal(graph.layers["c"].inputs, given[[4, 2, 5]])


def test_shared_layers_and_foldable_norms() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.again, self.shared = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.kept = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.conv(x)))
            x = self.shared(self.again(x)) + self.shared(self.kept(x))
            return self.kept(x)

    graph = graph_of(Twice(), torch.randn(1, 4, 3, 3))
    assert graph.foldable == [("conv", "norm")]  # `shared` serves two layers, and `kept` is called twice
    assert len({graph.tensors[n] for n in ("conv", "again", "kept")}) == 2


@pytest.mark.parametrize(
    ("module", "size", "free", "feature"),
    [
        (torchvision.models.resnet18(), 32, 20, "layer4"),
        (torchvision.models.mobilenet_v2(), 32, 17, "features"),
        (timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), 32, 7, "norm"),
    ],
    ids=["resnet18", "mobilenet_v2", "vit"],
)
def test_library_models(module: nn.Module, size: int, free: int, feature: str) -> None:
    graph = graph_of(module, torch.randn(1, 3, size, size))
    assert sum(bool((c.inputs != REAL).all()) for c in graph.layers.values()) == free
    assert graph.feature == feature


def test_what_cannot_be_traced_is_refused() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)

    with pytest.raises(InputError, match=r"torch\.export cannot trace model 'net'"):
        graph_of(Looks(), torch.ones(1, 2))
    adapter = ModelAdapter(
        name="text", module=nn.Linear(2, 2), task="language_modeling", forward=nn.Module.__call__
    )
    with pytest.raises(InputError, match="'text' takes more than an image tensor"):
        scale_graph(adapter, torch.ones(1, 2), ["layer"])
