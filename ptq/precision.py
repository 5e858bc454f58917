"""How float32 products are computed: in full, or with fewer bits where a job asks for it.

On CUDA, PyTorch by itself computes convolutions in TF32 (10-bit mantissas) and matrix products in full. Here
both are full unless a job asks for TF32, and what solves layers is always full: an error of 2⁻¹¹ in a
product is far below the noise of a calibration draw, but not below the differences between codes that a
solver weighs.

While codes, steps or a network are learned, the products of the layers that are learned can be in bfloat16
(7-bit mantissas, sums in float32): an error of 2⁻⁸ in a gradient is noise beside that of a batch. Everything
else stays in float32: parameters, norms, input quantizers, the float network's outputs, and every loss that
decides what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_bfloat16 = ContextVar("bfloat16", default=False)  # asked for by the job
_learning = ContextVar("learning", default=False)


@contextmanager
def products(*, tf32: bool, bfloat16: bool = False) -> Iterator[None]:
    """Set both for the while; as before at the end. `tf32` is without effect on a CPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    token = _bfloat16.set(bfloat16)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        _bfloat16.reset(token)


@contextmanager
def learning() -> Iterator[None]:
    """Around a loss that is descended."""
    token = _learning.set(True)
    try:
        yield
    finally:
        _learning.reset(token)


def in_bfloat16() -> bool:
    """Whether a quantized layer multiplies in bfloat16 now."""
    return _learning.get() and _bfloat16.get()
