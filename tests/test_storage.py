"""Packing: bit streams and float16 parameters come back as they went in."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ptq.storage import pack_codes, pack_parameter, unpack_codes, unpack_parameter


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1003])
def test_codes_come_back(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    codes[0] = 2**bits - 1
    data = pack_codes(codes, bits)
    assert data.dtype == torch.uint8
    assert data.numel() * 8 - count * bits < 8 + (8 if bits > 8 else 0)
    assert torch.equal(unpack_codes(data, bits, (count,)).long(), codes)


def test_packing_by_hand() -> None:
    # 3-bit codes 1, 2, 7 → bits (least significant first) 100 010 111 → bytes 0b11010001, 0b00000001
    assert pack_codes(torch.tensor([1, 2, 7]), 3).tolist() == [0b11010001, 0b00000001]


@pytest.mark.parametrize("magnitude", [1e-12, 1e-5, 1.0, 3e4, 1e9])
def test_float16_parameters_keep_eleven_bits_at_any_magnitude(magnitude: float) -> None:
    x = magnitude * torch.tensor([1.0, -0.37, 0.001, 0.0])
    stored, exponent = pack_parameter(x, 16)
    assert stored.dtype == torch.float16
    assert_close(unpack_parameter(stored, exponent), x, rtol=2**-11, atol=0)
    again, exponent_again = pack_parameter(unpack_parameter(stored, exponent), 16)
    assert torch.equal(unpack_parameter(again, exponent_again), unpack_parameter(stored, exponent))
