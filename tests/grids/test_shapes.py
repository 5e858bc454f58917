"""The pool of shapes and the published tables."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ptq.grids.shapes import (
    SHAPES,
    Function,
    Layout,
    Spacing,
    normal_float,
    positions,
    powers_of_two,
    t_values,
    table,
)

MEMBERS = list(SHAPES)
INVERSES = [
    (Function.sinh, Function.arcsinh),
    (Function.artanh, Function.tanh),
    (Function.tan, Function.arctan),
    (Function.arcsin, Function.sin),
]


@pytest.mark.parametrize("function", MEMBERS, ids=lambda f: f.value)
@pytest.mark.parametrize("layout", [Layout.odd, Layout.full, Layout.midrise], ids=lambda f: f.value)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_members_increase_from_minus_one_to_one(function: Function, layout: Layout, bits: int) -> None:
    levels = table(function, bits, layout, 16)
    assert levels.shape[-1] == 2**bits - (layout is Layout.odd)
    assert bool((levels.diff(dim=-1) > 0).all())
    assert_close(levels[:, 0], -torch.ones(len(levels), dtype=torch.float64))
    if layout is not Layout.full:
        assert_close(levels[:, -1], torch.ones(len(levels), dtype=torch.float64))
        if function is not Function.exp_skew:
            assert_close(levels, -levels.flip(-1), rtol=0, atol=1e-12)
        else:  # t of the other sign mirrors it
            assert_close(levels, -levels.flip(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", MEMBERS, ids=lambda f: f.value)
def test_members_become_affine_in_their_limit(function: Function) -> None:
    shape = SHAPES[function]
    v = positions(6, Layout.odd)
    distances = []
    for step in (1e-1, 1e-2, 1e-3):
        t = torch.tensor(shape.affine_at + step, dtype=torch.float64)
        distances.append(float((shape.g(v, t) - v).abs().max()))
    assert distances[2] <= 1e-3
    assert function is Function.affine or distances[2] < distances[1] < distances[0]


@pytest.mark.parametrize("pair", INVERSES, ids=lambda p: p[0].value)
def test_inverse_members_undo_each_other(pair: tuple[Function, Function]) -> None:
    v = positions(7, Layout.odd)
    for t in t_values(pair[0], 9)[:-1]:  # at the very end arcsin has no slope
        there = SHAPES[pair[0]].g(v, t)
        assert_close(SHAPES[pair[1]].g(there, t), v, rtol=1e-6, atol=1e-9)
        assert float((there[64:] - v[64:]).max()) < 1e-9  # compressive: more levels near zero
    assert_close(t_values(pair[0], 9), t_values(pair[1], 9))


@pytest.mark.parametrize("function", [f for f in MEMBERS if f is not Function.affine], ids=lambda f: f.value)
def test_t_covers_its_range(function: Function) -> None:
    shape, t = SHAPES[function], t_values(function, 16)
    assert_close(t[[0, -1]], torch.tensor([shape.least, shape.most], dtype=torch.float64))
    steps = t.log().diff() if shape.spacing is Spacing.geometric else t.diff()
    assert_close(steps, steps[:1].expand(15))


def test_positions_by_hand() -> None:
    assert positions(2, Layout.odd).tolist() == [-1, 0, 1]
    assert positions(2, Layout.full).tolist() == [-1, -0.5, 0, 0.5]
    assert_close(positions(2, Layout.midrise), torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64))


def test_four_bits_of_normal_float_are_nf4() -> None:
    nf4 = [
        *(-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1),
    ]
    assert_close(normal_float(4), torch.tensor(nf4, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_published_tables_have_all_their_levels_and_a_zero(bits: int) -> None:
    for levels, size in ((normal_float(bits), 2**bits), (powers_of_two(bits), 2**bits - 1)):
        assert len(levels) == size
        assert bool((levels.diff() > 0).all())
        assert levels.abs().min() == 0
        assert levels[[0, -1]].tolist() == [-1, 1]


def test_powers_of_two_by_hand() -> None:
    # three bits: 0, 1/8, 1/4, 1/2 over 1/2; four: {0, 1/2, 1/4, 1/16} + {0, 1/8} over 5/8;
    # five: {0, 1/2, 1/8, 1/32} + {0, 1/4, 1/16, 1/64} over 3/4
    assert powers_of_two(3)[3:].tolist() == [0, 0.25, 0.5, 1]
    assert_close(powers_of_two(4)[7:] * 10, torch.tensor([0.0, 1, 2, 3, 4, 6, 8, 10], dtype=torch.float64))
    sums = {a + b for a in (0, 32, 8, 2) for b in (0, 16, 4, 1)}
    assert_close(powers_of_two(5)[15:] * 48, torch.tensor(sorted(sums), dtype=torch.float64))
