"""The coder gives back what it got, in about as many bits as the entropy says, and refuses damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq import coding
from ptq.coding import Layout, decode, encode, entropy
from ptq.errors import InputError

RANDOM = np.random.default_rng(0)


def gaussian(*shape: int, scale: float = 1.0) -> np.ndarray:
    return np.rint(RANDOM.normal(size=shape) * scale).astype(np.int64)


def outlier() -> np.ndarray:
    codes = np.zeros((31, 17), np.int64)
    codes[7, 3] = -(2**23)
    return codes


CASES = {
    "one": np.array([[5]]),
    "one zero": np.array([[0]]),
    "one row": gaussian(1, 57),
    "one column": gaussian(57, 1),
    "all equal": np.full((40, 30), -7),
    "zeros": np.zeros((50, 70), np.int64),
    "one outlier": outlier(),
    "wide alphabet": RANDOM.integers(-(2**20), 2**20, (40, 30)),
    "empty rows": gaussian(64, 33) * (np.arange(64) % 3 == 0)[:, None],
    "depthwise": gaussian(96, 9),
    "skewed": RANDOM.geometric(0.3, (37, 41)),
    "heavy tails": np.rint(RANDOM.standard_t(1, (61, 67))).astype(np.int64),
    "pruned": gaussian(61, 67, scale=200) * (RANDOM.random((61, 67)) < 0.3),
    "eight bits": gaussian(61, 67, scale=60),
    "unequal": np.rint(RANDOM.normal(size=(67, 129)) * np.exp2(RANDOM.normal(size=129) * 2)).astype(np.int64),
}


@pytest.mark.parametrize("name", CASES)
def test_decoding_returns_the_codes(name: str) -> None:
    codes = CASES[name]
    extras = [gaussian(codes.shape[1], scale=5) + 11, np.array([-1000])]
    for further in ([], extras):
        again, extras_again = decode(encode(codes, further), codes.shape, [len(e) for e in further])
        assert np.array_equal(again, codes)
        for one, other in zip(extras_again, further, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("shape", [(64, 64), (16, 9), (40, 30), (1, 300)])
def test_equal_codes_of_any_value(shape: tuple[int, int]) -> None:
    """Their streams end in many equal bytes, those that are not written among them."""
    for value in range(-130, 131):
        codes = np.full(shape, value)
        assert np.array_equal(decode(encode(codes, []), shape, [])[0], codes), value


@pytest.mark.parametrize("scale", [0.15, 0.4, 1.0, 4.0, 60.0])
def test_length_is_close_to_the_entropy(scale: float) -> None:
    """At most 0.01 bit above the entropy of the source on 64 k codes, and 0.1 bit on 864."""
    large = np.rint(np.random.default_rng(1).normal(size=(256, 256)) * scale).astype(np.int64)
    assert 8 * len(encode(large, [])) / large.size < entropy(large) + (0.01 if scale < 50 else 0.03)
    small = large[:96, :9]
    shares = np.unique(large, return_counts=True)
    price = dict(zip(shares[0].tolist(), (-np.log2(shares[1] / large.size)).tolist(), strict=True))
    ideal = sum(price[z] for z in small.reshape(-1).tolist()) / small.size
    assert 8 * len(encode(small, [])) / small.size < ideal + 0.1


def test_scales_of_rows_and_columns_are_used() -> None:
    """Pooled frequencies would pay the entropy; classes pay little more than who knows every scale."""
    random = np.random.default_rng(2)
    scales = np.exp2(random.normal(size=(256, 1)) + random.normal(size=(1, 128)))
    codes = np.rint(random.normal(size=(256, 128)) * scales).astype(np.int64)
    taken = 8 * len(encode(codes, [])) / codes.size
    assert known_scales(codes, scales) - 0.01 < taken < known_scales(codes, scales) + 0.08
    assert taken < entropy(codes) - 0.3


def known_scales(codes: np.ndarray, scales: np.ndarray) -> float:
    """−log2 of the probability of rounded Gaussians of these scales, per code."""
    ends = [torch.from_numpy((codes + side) / (scales * 2**0.5)) for side in (-0.5, 0.5)]
    probability = 0.5 * (torch.erf(ends[1]) - torch.erf(ends[0]))
    return float(-probability.clamp_min(1e-12).log2().mean())


@pytest.mark.parametrize("shape", [(2, 150000), (1, 70000), (10, 25088), (500, 300), (70000, 2)], ids=str)
def test_a_layout_chosen_on_a_part_serves_the_whole(shape: tuple[int, int]) -> None:
    """More codes than a layout is chosen on, of one size: no levels, which would seem to pay on few rows."""
    codes = np.rint(np.random.default_rng(4).normal(size=shape)).astype(np.int64)
    stream = encode(codes, [])
    assert 8 * len(stream) / codes.size < entropy(codes) + 0.002
    assert np.array_equal(decode(stream, shape, [])[0], codes)


def test_levels_of_many_codes_are_used_where_they_differ() -> None:
    """As for few codes: by rows, by columns, and by columns where there are two rows."""
    random = np.random.default_rng(5)
    for shape, by in (((700, 300), (700, 1)), ((700, 300), (1, 300)), ((2, 150000), (2, 1))):
        scales = np.exp2(random.normal(size=by)) if 2 not in by else np.array([[0.5], [4.0]])
        codes = np.rint(random.normal(size=shape) * scales).astype(np.int64)
        assert 8 * len(encode(codes, [])) / codes.size < known_scales(codes, scales) + 0.025


def test_levels_of_rows_are_found_that_pay_only_when_fine() -> None:
    """Most rows are one and the same, like those of rare tokens: a level of their own sets them apart."""
    random = np.random.default_rng(1)
    codes = 1.5 * random.normal(size=(400, 64))
    codes *= np.exp2(0.2 * random.normal(size=(400, 1)) + 0.5 * random.normal(size=(1, 64)))
    codes = np.rint(codes).astype(np.int64)
    codes[:240] = np.rint(1.5 * random.normal(size=64) * 2**0.5)
    layouts = [Layout(r, c, k, s, 0) for r in (0, 1) for c in (0, 1) for k in (0, 1, 2) for s in (0, 1)]
    scales_of = coding._Scales.of(codes)
    assert len(encode(codes, [])) <= min(len(coding._encode(codes, [], one, scales_of)) for one in layouts)


def test_pruned_weights_pay_no_low_bits_for_their_zeros() -> None:
    random = np.random.default_rng(3)
    codes = np.rint(random.normal(size=(128, 128)) * 1000 * (random.random((128, 128)) < 0.3)).astype(
        np.int64
    )
    kept = np.count_nonzero(codes) / codes.size
    ideal = entropy((codes != 0).astype(np.int64)) + kept * np.log2(1000 * (2 * np.pi * np.e) ** 0.5)
    assert 8 * len(encode(codes, [])) / codes.size < ideal + 0.1


def test_damage_is_refused_or_noticed() -> None:
    """A stream has no redundancy to speak of: what can be read from a damaged one is not what was written."""
    codes = gaussian(40, 50)
    stream = encode(codes, [])
    with pytest.raises(InputError, match="too short"):
        decode(stream[:1], codes.shape, [])
    broken = bytearray(stream)
    broken[len(broken) // 2] ^= 0x55
    assert not np.array_equal(decode(bytes(broken), codes.shape, [])[0], codes)
