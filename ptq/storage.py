"""Packing: integer codes as a dense bit stream, scales as float16 with one power of two per tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 stream of ⌈count · bits / 8⌉ bytes holding non-negative codes below 2^bits, least significant bit
    first.
    """
    flat = codes.reshape(-1).to(torch.int64)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise ValueError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit in {bits} bits")
    if bits > 8:  # low bytes, then the rest
        return torch.cat([pack_codes(flat & 255, 8), pack_codes(flat >> 8, bits - 8)])
    count = flat.numel()
    eights = torch.nn.functional.pad(flat, (0, -count % 8)).reshape(-1, 8)
    # 8 codes = `bits` bytes of a 64-bit word
    word = (eights << (bits * torch.arange(8, device=flat.device))).sum(-1)
    data = (word[:, None] >> (8 * torch.arange(bits, device=flat.device))) & 255
    return data.to(torch.uint8).reshape(-1)[: math.ceil(count * bits / 8)].contiguous()


def unpack_codes(data: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes of `pack_codes` as int32, reshaped to `shape`."""
    count = math.prod(shape)
    if bits > 8:
        low = unpack_codes(data[:count], 8, (count,))
        return (low + (unpack_codes(data[count:], bits - 8, (count,)) << 8)).reshape(shape)
    if bits == 8:
        return data[:count].to(torch.int32).reshape(shape)
    words = math.ceil(count / 8)
    eights = (
        torch.nn.functional.pad(data, (0, words * bits - data.numel())).reshape(words, bits).to(torch.int64)
    )
    word = (eights << (8 * torch.arange(bits, device=data.device))).sum(-1)
    codes = (word[:, None] >> (bits * torch.arange(8, device=data.device))) & (2**bits - 1)
    return codes.reshape(-1)[:count].to(torch.int32).reshape(shape)


def pack_parameter(parameter: Tensor, bits: int) -> tuple[Tensor, int]:
    """A real tensor as stored, with the exponent e of the power of two that was divided out (0 at 32 bits).

    The largest magnitude becomes about 2¹⁴, so float16 keeps 11 significant bits over nine decades below it.
    """
    if bits == 32:
        return parameter.to(torch.float32), 0
    largest = float(parameter.abs().max())
    exponent = math.frexp(largest)[1] - 14 if largest > 0 else 0
    return torch.ldexp(parameter.double(), torch.tensor(-exponent)).to(torch.float16), exponent


def unpack_parameter(stored: Tensor, exponent: int) -> Tensor:
    """The float32 values that `pack_parameter` stored."""
    return torch.ldexp(stored.float(), torch.tensor(exponent))
