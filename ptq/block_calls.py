"""The recorded calls of a block, as training reads them: cut into pieces of some samples, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ptq.layers import QuantizedLayer
from ptq.plan import Call, first_tensor, map_tensors


def slices(calls: list[Call], targets: list[Tensor], size: int, cut: bool) -> Iterator[tuple[Call, Tensor]]:
    """Calls and targets, cut to `size` samples where `cut` is true."""
    for call, target in zip(calls, targets, strict=True):
        if not cut:
            yield call, target
            continue
        for start in range(0, call.samples(), size):
            rows = slice(start, start + size)
            yield call.rows(rows), target[rows]


@torch.no_grad()
def separable(original: nn.Module, calls: list[Call], targets: list[Tensor], size: int) -> bool:
    """Whether calls of more than `size` samples may be cut: the first samples alone give the first outputs,
    so that no argument is cut that is not per sample.

    `original` is the float block: quantized inputs would flip where sums depend on the number of samples.
    """
    call, whole = calls[0], calls[0].samples()
    if whole <= size or len(targets[0]) != whole:
        return False
    device = next((t.device for t in [*original.parameters(), *original.buffers()]), torch.device("cpu"))

    def run(part: Call) -> Tensor | None:
        there = part.to(device).cloned()
        try:
            return first_tensor(original(*float32(there.args), **float32(there.kwargs)))
        except RuntimeError:
            return None

    alone, together = run(call.rows(slice(0, size))), run(call)
    if alone is None or together is None or alone.shape != together[:size].shape:
        return False
    difference = float((alone - together[:size]).abs().max())
    return difference <= 1e-3 * float(together.abs().max())


class Float32:
    """A half-precision module in float32 for the while: small steps would be lost in its rounding."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        half = {torch.float16, torch.bfloat16}
        tensors = [*module.named_parameters(), *module.named_buffers()]
        self.types = {n: t.dtype for n, t in tensors if t.dtype in half}
        layers = [(n, m.row_type) for n, m in module.named_modules() if isinstance(m, QuantizedLayer)]
        self.row_types = {n: dtype for n, dtype in layers if dtype in half}  # of embeddings

    def __enter__(self) -> None:
        if self.types or self.row_types:
            self.module.float()

    def __exit__(self, *_: object) -> None:
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if name in self.types:
                tensor.data = tensor.data.to(self.types[name])
        for name, dtype in self.row_types.items():
            self.module.get_submodule(name).to(dtype)


def float32(value: Any) -> Any:
    return map_tensors(value, lambda t: t.float() if t.is_floating_point() else t)
