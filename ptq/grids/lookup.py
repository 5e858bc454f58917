"""The nearest of a sorted table of levels: what every non-uniform grid rounds with.

Shapes: levels [..., L], increasing along the last dimension (equal neighbours are allowed).
"""

from __future__ import annotations

import torch
from torch import Tensor

COMPARED = 16  # tables up to this size are compared level by level, larger ones searched by halving


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each x [..., n] in levels [..., L]: [..., n] int64; a tie takes the upper
    level.

    The leading dimensions of `levels` broadcast to those of x.
    """
    middles = (levels[..., 1:] + levels[..., :-1]) / 2  # [..., L − 1]
    if levels.shape[-1] > COMPARED:
        middles = middles.expand(*x.shape[:-1], -1).contiguous()
        return torch.searchsorted(middles, x.contiguous(), right=True)
    index = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for k in range(middles.shape[-1]):
        index += x >= middles[..., k, None]
    return index
