"""How float32 products are computed on CUDA: in full, or with the 10-bit mantissas of TF32.

PyTorch by itself computes convolutions in TF32 and matrix products in full. Here both are full unless a job
asks for TF32, and what solves layers is always full: an error of 2⁻¹¹ in a product is far below the noise of
a calibration draw, but not below the differences between codes that a solver weighs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(*, tf32: bool) -> Iterator[None]:
    """Set it for the while; as before at the end. Without effect on a CPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
