"""Randomness that stays where it belongs: seeded inside, the caller's generators untouched outside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def isolated_seed(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators, and put their states back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def random_state() -> dict[str, Any]:
    """Where the global generators of Python, NumPy and torch are: numbers and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global generators where `random_state` found them; GPUs that are not here are passed over."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state["torch"])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, generator in enumerate(state["cuda"][:here]):
        torch.cuda.set_rng_state(generator, index)


def coin_flips(
    shape: torch.Size,
    probability: float,
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A mask whose elements are true with `probability` (to 2⁻¹⁶), drawn where the generator is.

    Each element takes 16 random bits, four of them to a number, a quarter of the time that floats take.
    """
    threshold = round(probability * 2**16) - 2**15
    if abs(threshold) == 2**15:  # never or always
        return torch.full(shape, threshold > 0, device=device)
    drawn_on = device if generator is None else generator.device
    numbers = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=drawn_on)
    bits = numbers.random_(-(2**63), None, generator=generator).view(torch.int16)
    return (bits[: shape.numel()].reshape(shape) < threshold).to(device)
