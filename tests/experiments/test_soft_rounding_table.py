"""The table of learned rounding on H: equal errors to sampled inputs, and lower ones from a good start."""

from __future__ import annotations

import pytest

from experiments.soft_rounding import table


@pytest.mark.parametrize("bits", [4, 2])
def test_the_gram_gives_what_sampled_inputs_give(bits: int) -> None:
    """64 × 64, 40 steps."""
    rows = table(64, 256, bits, iterations=40, batch_tokens=128).set_index("way")
    error = rows["error"]
    assert error["Gram"] == pytest.approx(error["sampled inputs"], rel=0.03)
    assert error["sampled inputs"] < 0.9 * error["nearest"]
    assert error["Gram, from COMQ"] < 0.8 * error["sampled inputs"]
    assert set(rows["bits"]) == {bits}
    assert rows.loc["sampled inputs", "times faster"] == 1
