"""The block problem: make a block of quantized layers give what the float block gives.

The counterpart of LayerProblem for methods that train a whole block (residual unit, transformer block, a
stage of them, or a layer outside all of these) through its quantized layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ptq.plan import Call
from ptq.resume import Resume


@dataclass(kw_only=True)
class BlockProblem:
    """One block, its inputs and the outputs wanted of it. Calls and targets lie on the host."""

    name: str
    block: nn.Module  # quantized layers among others; changed in place
    original: nn.Module  # the float block, as it was
    calls: list[Call]  # what the quantized network delivers to the block, one call a batch
    float_calls: list[Call] | None  # what the float network delivers; None where nothing asked for it
    targets: list[Tensor]  # wanted first output of each call, [samples, …]
    # of the float network's log-likelihood with respect to its block's output, as targets; None likewise
    output_gradients: list[Tensor] | None
    seed: int
    progress: bool
    resume: Resume  # where the training of the block keeps its state
