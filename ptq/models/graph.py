"""The network as a graph of tensor operations: which channels may be measured in units of their own.

A channel of a tensor can be measured in another unit (its values divided by a positive factor) where all that
writes it and all that reads it can take the factor up: rows and columns of weights, affine parameters of
norms. The graph comes from torch.export; a walk over it carries, for each tensor, an integer tensor of the
same shape that names the unit of every element. ReLU, max-pooling and linear pooling keep units; views move
them; sums and pooled windows tie them; what is not positively homogeneous (GELU, softmax, ReLU6, the input of
a norm) ties them to REAL, the unit that must stay.
Attention passes the units of its values on, query and key are REAL.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter

REAL = 0  # the unit that no factor changes
ANY = -1  # of a zero that padding wrote: fits every unit

VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "flatten", "unflatten", "squeeze",
    "unsqueeze", "select", "slice", "unbind", "chunk", "split", "split_with_sizes", "expand", "contiguous",
    "clone", "alias", "detach", "roll", "flip", "movedim", "narrow", "repeat", "pixel_shuffle",
    "channel_shuffle",
}  # fmt: skip
KEEPING = {"relu", "leaky_relu", "prelu", "dropout", "feature_dropout", "to", "_to_copy", "abs", "neg"}
POOLS = {
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
    "upsample_bilinear2d",
}  # fmt: skip
REDUCTIONS = {"mean", "sum", "amax"}
PADS = {"pad", "constant_pad_nd"}
NORMS = {"layer_norm", "group_norm", "batch_norm"}
POOLING = {*POOLS, *REDUCTIONS, *VIEWS, "dropout", "getitem"}  # between the feature map and the classifier


@dataclass(kw_only=True)
class Channels:
    """Units of a layer's channels."""

    inputs: Tensor  # [in channels], of the whole layer where it has groups
    outputs: Tensor  # [out channels]


@dataclass(kw_only=True)
class ScaleGraph:
    """What may be rescaled in a network without changing its function, and who shares what."""

    units: int  # how many there are; number 0 is REAL
    layers: dict[str, Channels]  # by the layer's name
    norms: dict[str, Tensor]  # units of each feature that a norm with weights gives, by the norm's name
    tensors: dict[str, int]  # number of the tensor that a layer reads
    from_input: set[str]  # layers that read the model's input
    foldable: list[tuple[str, str]]  # layer and the BatchNorm that alone reads it
    head: str  # the layer that runs last
    feature: str | None  # the module that gives the feature map before global pooling; None = no module does


def scale_graph(adapter: ModelAdapter, batch: Tensor, reached: list[str]) -> ScaleGraph:
    """The graph of `adapter.module`, traced on the first sample of `batch`; `reached` are the layers that its
    forward pass calls, in order.

    Raises InputError where the network cannot be traced: language models, and control flow on values.
    """
    if adapter.task == "language_modeling" or not isinstance(batch, Tensor):
        raise InputError(
            f"model {adapter.name!r} takes more than an image tensor and cannot be traced into a graph of "
            "channels; use a layer-wise method (comq, gptq, decoupleq)"
        )
    module = adapter.module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(module, (batch[:1],), strict=False)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")[:200]
            raise InputError(
                f"torch.export cannot trace model {adapter.name!r} ({type(error).__name__}: {reason}); "
                "use a layer-wise method (comq, gptq, decoupleq)"
            ) from error
    owners = {id(p): n for n, p in module.named_parameters()}
    names = {
        placeholder: owners[id(module.get_parameter(name))]
        for placeholder, name in program.graph_signature.inputs_to_parameters.items()
    }
    head = adapter.head if adapter.head in reached else reached[-1]
    return _Walk(program=program, parameters=names, reached=set(reached), head=head).run()


@dataclass(kw_only=True)
class _Walk:
    """State of one pass over the operations."""

    program: ExportedProgram
    parameters: dict[str, str]  # placeholder → name of the parameter
    reached: set[str]
    head: str
    count: int = 1  # units given out; 0 is REAL
    edges: list[Tensor] = field(default_factory=list)  # [2, n] pairs of units that are one
    layers: dict[str, Channels] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, list[Node]] = field(default_factory=dict)  # node that each call of a layer reads

    def run(self) -> ScaleGraph:
        given = set(self.program.graph_signature.user_inputs)
        units: dict[Node, Any] = {}
        nodes = list(self.program.graph.nodes)
        with torch.no_grad():
            for node in nodes:
                if node.op == "output":
                    for value in node.all_input_nodes:
                        self._fix(units[value])
                elif node.op == "call_function":
                    units[node] = self._apply(node, units)
                else:
                    value = node.meta.get("val")
                    units[node] = _real(value) if isinstance(value, Tensor) else None
        classes = self._classes()
        tensors = self._tensors()
        return ScaleGraph(
            units=int(classes.max()) + 1,
            layers={
                n: Channels(inputs=classes[c.inputs], outputs=classes[c.outputs])
                for n, c in self.layers.items()
            },
            norms={n: classes[ids] for n, ids in self.norms.items()},
            tensors=tensors,
            from_input={n for n, read in self.sources.items() if any(r.name in given for r in read)},
            foldable=self._foldable(nodes),
            head=self.head,
            feature=self._feature(nodes),
        )

    def _apply(self, node: Node, units: dict[Node, Any]) -> Any:
        kind = _kind(node)
        given = [units[a] if isinstance(a, Node) else None for a in node.args]
        if kind == "getitem":
            return units[node.args[0]][node.args[1]]  # type: ignore[index]  # a tuple's item, by its node
        x = given[0] if given and isinstance(given[0], Tensor) else None
        if kind in ("conv2d", "linear") and x is not None:
            return self._layer(node, x)
        if kind in NORMS and x is not None:
            return self._norm(node, kind, x)
        if kind in ("cat", "stack"):
            return _run(node, units)
        if x is not None:
            if kind in VIEWS and not any(isinstance(a, Node) for a in node.args[1:]):
                return _run(node, units)
            if kind in KEEPING:
                return x
            if kind in POOLS:
                return self._tied(x, list(range(2, x.dim())), keep=True).expand(node.meta["val"].shape)
            if kind in REDUCTIONS:
                return self._reduced(node, x)
            if kind in PADS and _pads_with_zero(node):
                return torch.nn.functional.pad(x, list(node.args[1]), value=ANY)  # type: ignore[arg-type]  # sizes
            if kind in ("add", "sub") and len(given) > 1 and isinstance(given[1], Tensor):
                return self._tie(x, given[1])
            if kind in ("mul", "div"):
                return self._product(kind, x, given[1] if isinstance(node.args[1], Node) else None)
        second = given[1] if len(given) > 1 else None
        if kind in ("matmul", "bmm") and x is not None and second is not None:
            return self._matmul(x, second).expand(node.meta["val"].shape)
        if kind == "scaled_dot_product_attention":
            query, key, value = (units[n] for n in node.args[:3])  # type: ignore[index]  # by their nodes
            self._fix(query)
            self._fix(key)
            values, shape = self._tied(value, [-2], keep=True), node.meta["val"].shape
            if values.shape[:-2] == shape[:-2]:
                return values.expand(shape)
            self._fix(values)
            return _real(node.meta["val"])
        for source in node.all_input_nodes:
            self._fix(units[source])
        out = node.meta.get("val")
        return [_real(v) for v in out] if isinstance(out, (tuple, list)) else _real(out)

    def _layer(self, node: Node, x: Tensor) -> Tensor:
        """A convolution or linear layer: reads its input's channels, gives new ones."""
        owner, _, leaf = self.parameters.get(getattr(node.args[1], "name", ""), "").rpartition(".")
        if owner not in self.reached or leaf != "weight":
            self._fix(x)
            return _real(node.meta["val"])
        axis = 1 if _kind(node) == "conv2d" else x.dim() - 1
        inputs = self._tied(x, [d for d in range(x.dim()) if d != axis], keep=False)
        missing = inputs == ANY
        inputs[missing] = self._fresh(int(missing.sum()))
        shape = node.meta["val"].shape
        if owner in self.layers:
            self._tie(inputs, self.layers[owner].inputs)
        else:
            self.layers[owner] = Channels(inputs=inputs, outputs=self._fresh(shape[axis]))
        assert isinstance(node.args[0], Node)
        self.sources.setdefault(owner, []).append(node.args[0])
        return self._spread(self.layers[owner].outputs, shape, axis)

    def _norm(self, node: Node, kind: str, x: Tensor) -> Tensor:
        """A norm: its input is REAL; its affine parameters take up any unit of the output."""
        self._fix(x)
        position = {"layer_norm": 2, "group_norm": 2, "batch_norm": 1}[kind]
        weight = node.args[position] if len(node.args) > position else node.kwargs.get("weight")
        owner, _, leaf = self.parameters.get(getattr(weight, "name", ""), "").rpartition(".")
        value = node.meta["val"]
        axis = value.dim() - 1 if kind == "layer_norm" else 1
        if leaf != "weight" or (kind == "layer_norm" and len(node.args[1]) != 1):  # type: ignore[arg-type]  # a shape
            return _real(value)
        if owner not in self.norms:
            self.norms[owner] = self._fresh(value.shape[axis])
        return self._spread(self.norms[owner], value.shape, axis)

    def _reduced(self, node: Node, x: Tensor) -> Tensor:
        value = node.meta["val"]
        dims = node.args[1] if len(node.args) > 1 else None
        wanted = [dims] if isinstance(dims, int) else dims or list(range(x.dim()))
        assert isinstance(wanted, list)
        return self._tied(x, wanted, keep=value.dim() == x.dim()).reshape(value.shape)

    def _product(self, kind: str, a: Tensor, b: Tensor | None) -> Tensor:
        """A product's unit is that of one factor where the other is REAL: of the larger one."""
        if b is None:
            return a
        shape = torch.broadcast_shapes(a.shape, b.shape)
        if kind == "mul" and (bool((a == REAL).all()) or (a.numel() < b.numel() and bool((b != REAL).any()))):
            a, b = b, a
        self._fix(b)
        return a.expand(shape)

    def _matmul(self, a: Tensor, b: Tensor) -> Tensor:
        if bool((b == REAL).all()):
            return self._tied(a, [-1], keep=True)
        self._fix(a)
        return self._tied(b, [-2], keep=True)

    def _fresh(self, count: int) -> Tensor:
        ids = torch.arange(self.count, self.count + count)
        self.count += count
        return ids

    @staticmethod
    def _spread(ids: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
        return ids.reshape([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)

    def _fix(self, units: Any) -> None:
        if isinstance(units, Tensor):
            self._tie(units, torch.tensor(REAL))
        elif isinstance(units, (tuple, list)):
            for part in units:
                self._fix(part)

    def _tie(self, a: Tensor, b: Tensor) -> Tensor:
        """Make the units of two tensors one, element by element; the units of their sum."""
        a, b = torch.broadcast_tensors(a, b)
        different = (a != b) & (a != ANY) & (b != ANY)
        if bool(different.any()):
            self.edges.append(torch.stack([a[different], b[different]]).unique(dim=1))
        return torch.where(a == ANY, b, a)

    def _tied(self, units: Tensor, dims: list[int], *, keep: bool) -> Tensor:
        """One unit along `dims`."""
        if not dims:
            return units.clone()
        kept = units.amax(dims, keepdim=True)  # any of them, but ANY
        self._tie(units, kept)
        return kept if keep else kept.squeeze(dims)

    def _classes(self) -> Tensor:
        """Class of each unit given out: tied units share one, REAL's is 0."""
        pairs = torch.cat([torch.zeros(2, 1, dtype=torch.int64), *self.edges], dim=1).numpy()
        graph = coo_matrix((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(self.count, self.count))
        labels = torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))
        # scipy numbers components by their first member
        assert int(labels[REAL]) == REAL
        return labels

    def _tensors(self) -> dict[str, int]:
        """Number of the tensor each layer reads, one for all tensors that a layer called twice reads."""
        number: dict[Node, int] = {}
        for nodes in self.sources.values():
            roots = [_value(n) for n in nodes]
            known = [number[r] for r in roots if r in number]
            chosen = min(known, default=len(number))
            merged = {*known, chosen}
            number = {n: chosen if k in merged else k for n, k in number.items()}
            number |= dict.fromkeys(roots, chosen)
        return {name: number[_value(nodes[0])] for name, nodes in self.sources.items()}

    def _foldable(self, nodes: list[Node]) -> list[tuple[str, str]]:
        pairs: list[tuple[str, str]] = []
        norms: list[str] = []
        for node in nodes:
            if node.op != "call_function" or _kind(node) != "batch_norm":
                continue
            statistics = self.program.graph_signature.inputs_to_buffers.get(getattr(node.args[3], "name", ""))
            if statistics is None:
                continue
            norm, before = statistics.rpartition(".")[0], node.args[0]
            norms.append(norm)
            if not isinstance(before, Node) or before.op != "call_function" or len(before.users) != 1:
                continue
            if _kind(before) in ("conv2d", "linear"):
                layer = self.parameters.get(getattr(before.args[1], "name", ""), "").rpartition(".")[0]
                if layer in self.layers and len(self.sources[layer]) == 1:
                    pairs.append((layer, norm))
        return [(layer, norm) for layer, norm in pairs if norms.count(norm) == 1]

    def _feature(self, nodes: list[Node]) -> str | None:
        """The outermost module that ends where global pooling begins."""
        if self.head not in self.sources:
            return None
        node = self.sources[self.head][-1]
        while node.op == "call_function" and _kind(node) in POOLING:
            before = node.args[0]
            assert isinstance(before, Node)
            node = before
        last = {path: n for n in nodes for path in _stack(n) if path}
        ends = [path for path in _stack(node) if path and last[path] is node]
        return ends[0] if ends else None


def _kind(node: Node) -> str:
    """An operation's name without namespace, overload, and the mark of working in place."""
    target: Any = node.target
    name = target.__name__.partition(".")[0] if hasattr(target, "overloadpacket") else target.__name__
    return name if name.startswith("_") else name.removesuffix("_")


def _value(node: Node) -> Node:
    """The node that computed what `node` merely passes on."""
    while node.op == "call_function" and _kind(node) in {"dropout", "contiguous", "clone", "alias", "detach"}:
        before = node.args[0]
        assert isinstance(before, Node)
        node = before
    return node


def _stack(node: Node) -> list[str]:
    """Names of the modules whose forward pass the node belongs to, the outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _real(value: Any) -> Any:
    return torch.zeros((), dtype=torch.int64).expand(value.shape) if isinstance(value, Tensor) else None


def _run(node: Node, units: dict[Node, Any]) -> Any:
    """The operation itself, on units."""
    function: Callable[..., Any] = node.target  # type: ignore[assignment]  # no name, as call_function nodes hold the function
    args = torch.fx.map_arg(node.args, lambda n: units[n])
    kwargs = torch.fx.map_arg(node.kwargs, lambda n: units[n])
    return function(*args, **kwargs)


def _pads_with_zero(node: Node) -> bool:
    args: list[Any] = list(node.args)
    if _kind(node) == "constant_pad_nd":
        return len(args) < 3 or bool(args[2] == 0)
    mode = args[2] if len(args) > 2 else node.kwargs.get("mode", "constant")
    value = args[3] if len(args) > 3 else node.kwargs.get("value")
    return bool(mode == "constant" and value in (None, 0, 0.0))
