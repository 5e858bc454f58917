"""decoupleQ against the authors' own results and against what theory promises."""

from __future__ import annotations

import pytest

from tests.conftest import Golden

GOLDEN = [
    (group_size, rounding, bits)
    for group_size, rounding in ((None, "level1"), (None, "level2"), (32, "level2"))
    for bits in (4, 3, 2)
]


def golden_key(group_size: int | None, rounding: str, bits: int) -> str:
    steps = ",M=50,K=50" if rounding == "level1" else ""
    return f"decoupleq|group_size={group_size or -1},rounding={rounding},rounds=4{steps}|{bits}"


@pytest.mark.parametrize(("group_size", "rounding", "bits"), GOLDEN)
def test_release_reaches_the_golden_error(
    choice, golden: Golden, group_size: int | None, rounding: str, bits: int
) -> None:
    name = "decoupleq_release_level1" if rounding == "level1" else "decoupleq_release"
    spec = choice("grid", "decoupleq_release", parameter_bits=32)
    codes, grid = choice("method", name).quantize_layer(golden.problem, spec, bits, group_size)
    stored = golden.results[golden_key(group_size, rounding, bits)]
    values = grid.values(codes)[0]
    assert golden.error(values) <= 1.005 * golden.error(stored)
    # the stored run was made in float32 and its accept/reject path hangs on the last bits: a few rows may differ
    equal_rows = ((values - stored).abs().amax(-1) < 1e-4 * stored.abs().amax(-1)).double().mean()
    assert equal_rows >= 0.9
