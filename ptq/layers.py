"""The modules that replace Linear, Conv2d, Conv1D and Embedding: packed codes and grid parameters,
dequantized on the fly.

A layer's weight is seen by ptq as W [groups, out, in]: `groups` are a convolution's groups (1 elsewhere),
`in` counts the inputs of one output, so for a convolution in_channels / groups · kernel height · kernel
width.
An embedding's W is its table [1, rows, dim]. What it gives for an id is one row as it stands, so the error of
a row is that of its own weights whatever the inputs: H is the identity over dim, and all rows weigh the same.
Its input, an id, is never rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor, nn
from torch.nn import functional as F

from ptq.activations import ActivationQuantizer
from ptq.grids.grid import Grid
from ptq.models.adapter import is_embedding, is_quantizable
from ptq.precision import in_bfloat16


def weight_matrix(layer: nn.Module) -> Tensor:
    """W [groups, out, in] of a Linear, Conv2d, Conv1D or Embedding, without gradient."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        return weight[None]
    if isinstance(layer, nn.Conv2d):
        return weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)
    return weight.t()[None]  # Conv1D keeps [in, out]


def layer_bias(layer: nn.Module) -> Tensor | None:
    """The bias of a Linear, Conv2d or Conv1D; None where there is none, as in every Embedding."""
    bias = None if isinstance(layer, nn.Embedding) else layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def input_matrix(layer: nn.Module, x: Tensor, choose: Callable[[int], Tensor | None] | None = None) -> Tensor:
    """The inputs that W [groups, out, in] multiplies: [groups, tokens, in]; for a convolution, one token a
    position. An embedding, which multiplies nothing, has none.

    Conv2d: stride, padding (all modes), dilation and groups as the layer has them; `choose(positions)` may
    name the positions of each image to keep. A convolution's inputs come in the order (kernel row, kernel
    column, channel), which copies whole channel vectors; `weight_order` says which columns of W these are.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    if x.dim() == 3:
        x = x[None]
    # [images, H, W, channels]
    x = pad_input(x, layer.padding_mode, _padding(layer)).permute(0, 2, 3, 1).contiguous()
    images, height, width, channels = x.shape
    (kernel_y, kernel_x), (stride_y, stride_x), (dilation_y, dilation_x) = (
        layer.kernel_size,
        layer.stride,
        layer.dilation,
    )
    rows = (height - dilation_y * (kernel_y - 1) - 1) // stride_y + 1
    columns = (width - dilation_x * (kernel_x - 1) - 1) // stride_x + 1
    kept = choose(rows * columns) if choose is not None else None
    positions = rows * columns if kept is None else len(kept)
    image, row, pixel, _ = x.stride()
    X = x.as_strided(  # overlapping windows
        (images, rows, columns, kernel_y, kernel_x, channels),
        (image, stride_y * row, stride_x * pixel, dilation_y * row, dilation_x * pixel, 1),
    )
    if kept is not None:
        kept = kept.to(x.device)
        X = X[:, kept // columns, kept % columns]
    # [tokens, taps, groups, channels of a group]
    X = X.reshape(images * positions, kernel_y * kernel_x, layer.groups, -1)
    return X.permute(2, 0, 1, 3).reshape(layer.groups, images * positions, -1)


def weight_order(layer: nn.Module) -> Tensor | None:
    """For a convolution, position in `input_matrix`'s order of each input of W [groups, out, in]; None where
    it is the same.
    """
    if not isinstance(layer, nn.Conv2d):
        return None
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    channels = layer.in_channels // layer.groups
    if taps == 1 or channels == 1:
        return None
    return torch.arange(taps * channels).reshape(taps, channels).T.flatten()


def _padding(layer: nn.Conv2d) -> list[int]:
    """Padding in F.pad's order: left, right, top, bottom."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    assert not isinstance(layer.padding, str)
    vertical, horizontal = layer.padding
    return [int(horizontal), int(horizontal), int(vertical), int(vertical)]


def pad_input(x: Tensor, mode: str, padding: list[int]) -> Tensor:
    """x padded as a convolution with that padding mode pads it."""
    return F.pad(x, padding, mode="constant" if mode == "zeros" else mode) if any(padding) else x


class QuantizedLayer(nn.Module):
    """A layer whose weight is kept as packed codes and grid parameters; `weight` dequantizes them.

    `input_quantizer`, where there is one, rounds what the layer receives.
    """

    input_quantizer: ActivationQuantizer | None

    def __init__(
        self,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        bias: Tensor | None,
        input_quantizer: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.facts = facts  # JSON: the grid's facts and the layer's geometry
        self.packed_names = sorted(tensors)
        for name in self.packed_names:
            self.register_buffer(name, tensors[name])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.input_quantizer = input_quantizer
        self._decoded: tuple[Grid, Tensor] | None = None  # kept where decoding is slow
        geometry = facts["geometry"]
        if geometry["kind"] == "conv2d":
            self.in_channels, self.out_channels = geometry["in_channels"], geometry["out_channels"]
            self.kernel_size, self.stride = tuple(geometry["kernel_size"]), tuple(geometry["stride"])
        elif geometry["kind"] == "embedding":
            self.num_embeddings, self.embedding_dim = geometry["rows"], geometry["dim"]
            self.padding_idx = geometry["padding_idx"]
        else:
            self.in_features, self.out_features = geometry["in_features"], geometry["out_features"]

    @property
    def packed(self) -> dict[str, Tensor]:
        """The tensors a file keeps for this layer, the bias left out."""
        return {name: self.get_buffer(name) for name in self.packed_names}

    def grid_and_codes(self) -> tuple[Grid, Tensor]:
        """The fitted grid and the codes [groups, out, in]; entropy-coded ones are decoded once."""
        if self._decoded is not None:
            return self._decoded
        grid_class: Any = get_class(self.facts["grid"])
        grid, codes = grid_class.from_storage(self.packed, self.facts)
        if "decode_once" in self.facts:
            self._decoded = (grid, codes)
        return grid, codes

    @property
    def weight(self) -> Tensor:
        """Ŵ in the shape of the float layer's weight, float32."""
        grid, codes = self.grid_and_codes()
        return shaped(grid.values(codes), self.facts["geometry"])

    @property
    def row_type(self) -> torch.dtype | None:
        """The type of the rows that an embedding gives; None for other layers, which follow their input."""
        return row_type(self.facts["geometry"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Packed tensors follow the module to a device, not to another type: `.half()` spares the scales. The
        rows that an embedding gives do follow.
        """
        before, self._decoded = self.packed, None
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            self._buffers[name] = tensor.to(self.get_buffer(name).device)
        if self.row_type is not None:
            dtype = fn(torch.empty(0, dtype=self.row_type)).dtype
            self.facts = {**self.facts, "geometry": {**self.facts["geometry"], "dtype": type_name(dtype)}}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return apply_weight(x, self.weight, self.bias, self.facts["geometry"])

    def extra_repr(self) -> str:
        return f"{self.facts['geometry']}, {self.facts['grid'].rpartition('.')[2]}, bits={self.facts['bits']}"


class TrainableLayer(nn.Module):
    """A quantized layer whose codes are frozen; the grid's parameters and the input's scale are free."""

    input_quantizer: ActivationQuantizer | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.grid, codes = layer.grid_and_codes()
        self.register_buffer("codes", codes, persistent=False)
        self.geometry = layer.facts["geometry"]
        self.free = nn.ParameterDict(
            {name: nn.Parameter(value.detach().clone()) for name, value in self.grid.parameters().items()}
        )
        self.bias = layer.bias
        self.input_quantizer = layer.input_quantizer
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """Ŵ in the shape of the float layer's weight, differentiable in the grid's parameters."""
        grid = self.grid.with_parameters(dict(self.free.items()))
        return shaped(grid.values(self.get_buffer("codes")), self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return apply_weight(x, self.weight, self.bias, self.geometry)

    def frozen(self) -> QuantizedLayer:
        """The layer with its parameters as a file would return them."""
        values = {name: value.detach() for name, value in self.free.items()}
        grid = self.grid.with_parameters(values).as_stored()
        tensors, facts = grid.storage(self.get_buffer("codes"))
        facts["geometry"] = self.geometry
        quantized = QuantizedLayer(tensors, facts, self.bias, self.input_quantizer)
        return quantized.to(self.get_buffer("codes").device).train(self.training)


def shaped(values: Tensor, geometry: dict[str, Any]) -> Tensor:
    """Ŵ [groups, out, in] in the shape of the float layer's weight."""
    if geometry["kind"] == "conv2d":
        return values.reshape(geometry["out_channels"], -1, *geometry["kernel_size"])
    return values[0].t() if geometry["kind"] == "conv1d" else values[0]


def apply_weight(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: dict[str, Any]) -> Tensor:
    """The layer's output for a weight in the float layer's shape; x holds ids where it is an embedding."""
    dtype = row_type(geometry)
    if dtype is not None:
        return F.embedding(x, weight.to(dtype))
    if x.dtype is torch.float32 and in_bfloat16():
        return _product(x.bfloat16(), weight, bias, geometry).float()
    return _product(x, weight, bias, geometry)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: dict[str, Any]) -> Tensor:
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if geometry["kind"] == "linear":
        return F.linear(x, weight, bias)
    if geometry["kind"] == "conv1d":
        return F.linear(x, weight.t(), bias)
    left, right, top, bottom = geometry["padding"]
    within = (0, 0)
    if geometry["padding_mode"] == "zeros" and left == right and top == bottom:
        within = (top, left)  # spares the copy of x, and that of its gradient
    else:
        x = pad_input(x, geometry["padding_mode"], geometry["padding"])
    stride = tuple(geometry["stride"])
    return F.conv2d(x, weight, bias, stride, within, geometry["dilation"], geometry["groups"])


def row_type(geometry: dict[str, Any]) -> torch.dtype | None:
    """The type of the rows that an embedding gives; None for other layers."""
    if geometry["kind"] != "embedding":
        return None
    dtype = getattr(torch, geometry["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def type_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def quantized_layer(
    layer: nn.Module,
    grid: Grid,
    codes: Tensor,
    input_quantizer: ActivationQuantizer | None = None,
    bias_change: Tensor | None = None,
) -> QuantizedLayer:
    """The replacement of a float layer for codes [groups, out, in] on a grid. `bias_change` [groups, out] is
    added to the bias, which a layer without one gets.
    """
    tensors, facts = grid.storage(codes)
    facts["geometry"] = geometry(layer)
    bias = layer_bias(layer)
    if bias_change is not None:
        change = bias_change.flatten().to(weight_matrix(layer).dtype)
        bias = change if bias is None else bias.detach() + change
    quantized = QuantizedLayer(tensors, facts, bias, input_quantizer)
    return quantized.train(layer.training)


def geometry(layer: nn.Module) -> dict[str, Any]:
    """What a layer is besides its weight and bias, as JSON."""
    if not (is_quantizable(layer) or is_embedding(layer)):
        raise TypeError(f"{type(layer).__name__} is not a layer that can be quantized")
    if isinstance(layer, nn.Conv2d):
        return {
            "kind": "conv2d",
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "kernel_size": list(layer.kernel_size),
            "stride": list(layer.stride),
            "dilation": list(layer.dilation),
            "groups": layer.groups,
            "padding": _padding(layer),
            "padding_mode": layer.padding_mode,
        }
    if isinstance(layer, nn.Embedding):
        return {
            "kind": "embedding",
            "rows": layer.num_embeddings,
            "dim": layer.embedding_dim,
            "padding_idx": layer.padding_idx,
            "dtype": type_name(layer.weight.dtype),
        }
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        return {"kind": "linear", "in_features": weight.shape[1], "out_features": weight.shape[0]}
    return {"kind": "conv1d", "in_features": weight.shape[0], "out_features": weight.shape[1]}


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` (dotted) points in `root`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def names_of(root: nn.Module, module: nn.Module) -> list[str]:
    """Every dotted name under which `root` holds `module`: a shared layer has several."""
    return [name for name, m in root.named_modules(remove_duplicate=False) if m is module]
