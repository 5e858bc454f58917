"""The warning where learned rounding leaves weights between two codes."""

from __future__ import annotations

import pytest

from tests.methods.test_gradient_ptq import net, run

__all__ = ["net"]  # a fixture


@pytest.mark.parametrize("name", ["brecq", "adaround"])
def test_one_line_warns_of_weights_between_two_codes(net, caplog, name: str) -> None:
    decided = {"rounding_rate": 0.1, "regularisation": 0.1, "schedule": "constant"}
    run(net, name, iterations=200, **decided)
    run(net, name, iterations=5, relaxation="full_range")
    assert not caplog.records
    _, report = run(net, name, iterations=5)
    [line] = caplog.messages
    fractions = {t.unit: 100 * t.undecided for t in report.tuning if t.undecided is not None}
    worst = max(fractions, key=lambda unit: fractions[unit])
    mean = sum(fractions.values()) / len(fractions)
    assert f"up to {fractions[worst]:.0f} % of" in line
    assert f"(unit {worst}; mean over {len(fractions)} units: {mean:.0f} %)" in line
    assert "take more method.iterations, or a larger method.rounding_rate or method.regularisation" in line
