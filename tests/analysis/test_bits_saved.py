from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from record_factory import record, write

from analysis.bits_saved import Bounds, Curve, average_saved, bits_saved
from analysis.collect import collect
from analysis.names import METRICS
from analysis.report import main, write_report

TOP1, PERPLEXITY = METRICS["top1"], METRICS["perplexity"]


def saved(folder: Path, *records: dict, baseline: str | None = None) -> pd.DataFrame:
    return bits_saved(collect([write(folder, *records)]), baseline).set_index("line")


def shifted(shift: float, **options: object) -> list[dict]:
    """Two methods whose curves are the same but for `shift` stored bits."""
    results = ((2, 60.0), (3, 90.0), (4, 97.0))
    rtn = [record(method="rtn", bits=b, result=r, stored=b + 0.1, **options) for b, r in results]
    comq = [record(method="comq", bits=b, result=r, stored=b + 0.1 - shift, **options) for b, r in results]
    return rtn + comq


def test_a_shifted_curve_saves_its_shift(tmp_path: Path) -> None:
    row = saved(tmp_path, *shifted(0.7)).loc["comq"]
    assert row["baseline"] == "rtn"
    assert row["saved"] == pytest.approx(0.7)
    assert (row["range_low"], row["range_high"]) == (60, 97)
    assert row["saved_low"] < 0.7 < row["saved_high"]
    assert row["interval"] == "360 samples"


def test_the_saving_changes_sign_with_the_baseline(tmp_path: Path) -> None:
    found = saved(tmp_path, *shifted(0.7), baseline="comq")
    assert found.loc["rtn", "saved"] == pytest.approx(-0.7)
    assert math.isnan(found.loc["comq", "saved"])


def test_straight_curves_by_hand() -> None:
    # Bits at quality q: 2 + q / 10 and 2 + q / 20, over the common 0 to 10: means 2.5 and 2.25.
    average = average_saved(Curve([2, 3], [0, 10]), Curve([2, 3], [0, 20]), TOP1)
    assert average.saved == pytest.approx(0.25)
    assert (average.low, average.high) == (0, 10)


def test_perplexity_is_compared_on_its_logarithm(tmp_path: Path) -> None:
    options = {"model": "topics_llama", "metric": "perplexity", "before": math.e}
    records = [
        record(method=m, bits=b, stored=float(b), result=math.exp(r), **options)
        for m, points in (("rtn", ((2, 4), (4, 2))), ("comq", ((2, 3), (4, 1))))
        for b, r in points
    ]
    row = saved(tmp_path, *records).loc["comq"]
    # −log perplexity rises by 1 a bit on both lines, comq being 1 better throughout: 1 bit less.
    assert row["saved"] == pytest.approx(1.0)
    assert (row["range_low"], row["range_high"]) == (pytest.approx(math.e**2), pytest.approx(math.e**3))
    assert row["interval"] == "n/a: one seed"
    assert math.isnan(row["saved_low"])
    assert row["drop_3"] == "+10 %"
    assert row["needed_3_low"] == row["needed_3_high"] == pytest.approx(4 - math.log(1.1))
    assert (row["saved_3_low"], row["saved_3_high"]) == (pytest.approx(math.log(1.1)), math.inf)


def test_no_common_range_is_refused_with_its_reason(tmp_path: Path) -> None:
    low = [record(method="rtn", bits=b, result=r) for b, r in ((2, 10.0), (3, 20.0))]
    high = [record(method="comq", bits=b, result=r) for b, r in ((2, 60.0), (3, 97.0))]
    row = saved(tmp_path, *low, *high).loc["comq"]
    assert math.isnan(row["saved"])
    assert "no common range: the baseline has 10.00 to 20.00, the method 60.00 to 97.00" in row["reason"]


def test_one_width_gives_no_curve(tmp_path: Path) -> None:
    row = saved(tmp_path, record(method="rtn"), *shifted(0.5)[3:]).loc["comq"]
    assert math.isnan(row["saved"])
    assert "one result only" in row["reason"]


def test_bits_at_a_drop_are_read_off_or_bounded(tmp_path: Path) -> None:
    points = {"rtn": ((2, 90.0), (3, 96.0), (4, 98.0)), "comq": ((2, 97.5), (3, 98.2))}
    records = [
        record(method=m, bits=b, stored=float(b), result=r, before=98.5)
        for m, line in points.items()
        for b, r in line
    ]
    found = saved(tmp_path, *records)
    rtn, comq = found.loc["rtn"], found.loc["comq"]
    assert rtn["drop_1"] == "−0.5 points"
    assert rtn["needed_1_low"] == rtn["needed_1_high"] == pytest.approx(4)
    assert 2 < comq["needed_1_low"] == comq["needed_1_high"] < 3
    assert comq["saved_1_low"] == pytest.approx(4 - comq["needed_1_low"])
    assert comq["drop_3"] == "−2 points"
    assert (comq["needed_3_low"], comq["needed_3_high"]) == (-math.inf, 2)
    assert comq["saved_3_low"] == pytest.approx(rtn["needed_3_low"] - 2)
    assert comq["saved_3_high"] == math.inf


def test_bounds_of_a_difference() -> None:
    assert Bounds(4, math.inf).minus(Bounds(3, 3)) == Bounds(1, math.inf)
    assert Bounds(-math.inf, 2).minus(Bounds(3, 3)) == Bounds(-math.inf, -1)
    assert Bounds(4, math.inf).minus(Bounds(3, math.inf)) == Bounds(-math.inf, math.inf)


def test_a_curve_is_monotone_and_goes_through_its_points() -> None:
    curve = Curve([4, 2, 3, 8], [97, 60, 90, 97])
    assert [curve.needed(q).low for q in (60, 90, 97)] == [2, 3, 4]  # of 97 twice, the fewest bits
    bits = [curve.needed(q).low for q in np.linspace(60, 97, 50)]
    assert (np.diff(bits) > 0).all()


def test_a_dip_is_rearranged() -> None:
    assert Curve([2, 3, 4], [60, 97, 90]).needed(90).low == 3


def test_seeds_are_resampled_together(tmp_path: Path) -> None:
    shared = (-2.0, 0.0, 2.0)  # a seed moves both methods alike, so that the saving does not vary
    records = [
        record(method=m, bits=b, stored=b - shift, result=50 + 10 * b + move, before=99, seed=seed)
        for m, shift in (("rtn", 0.0), ("comq", 0.5))
        for b in (1, 2, 3)
        for seed, move in enumerate(shared)
    ]
    row = saved(tmp_path, *records).loc["comq"]
    assert row["interval"] == "3 seeds"
    assert (row["saved"], row["saved_low"], row["saved_high"]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_nominal_width_is_not_used(tmp_path: Path) -> None:
    results = ((2, 60.0), (3, 90.0))
    rtn = [record(method="rtn", bits=b, result=r, stored=b + 1.0) for b, r in results]
    comq = [record(method="comq", bits=b, result=r, stored=b + 0.25) for b, r in results]
    assert saved(tmp_path, *rtn, *comq).loc["comq", "saved"] == pytest.approx(0.75)


def test_report_prints_the_table_of_each_model(tmp_path: Path) -> None:
    layers = [
        {
            "name": "a",
            "shape": [1, 3, 10],
            "relative_error": 0.1,
            "bits_per_coefficient": 2.5,
            "limit_bits": 2.0,
        },
        {
            "name": "b",
            "shape": [1, 1, 10],
            "relative_error": 0.1,
            "bits_per_coefficient": 4.0,
            "limit_bits": 2.0,
        },
    ]
    write(tmp_path, *shifted(0.7, layers=layers), record("digits_vit", "gptq", 3))
    report = write_report([tmp_path])
    text = report.markdown
    assert text.index("Digits ResNet") < text.index("Bits saved against rtn; intervals over 360 samples")
    assert text.index("Bits saved against rtn") < text.index("### Digits ViT")
    assert "Bits saved: none, because each method has one width only" in text
    comq = next(line for line in text.splitlines() if line.startswith("| comq") and "[" in line)
    assert "0.70 [" in comq
    assert comq.endswith("0.88 |")  # (30 · 0.5 + 10 · 2) / 40 bits above the limit
    latex = (tmp_path / "bits_saved.tex").read_text()
    assert latex.isascii()
    assert r"0.70 [" in latex
    table = pd.read_csv(tmp_path / "bits_saved.csv").set_index("line")
    assert table.loc["comq", "saved"] == pytest.approx(0.7)
    assert table.loc["comq", "above_limit"] == pytest.approx(0.875)


def test_bounds_are_printed_as_bounds(tmp_path: Path) -> None:
    rtn = [record(method="rtn", bits=b, stored=float(b), result=r) for b, r in ((3, 90.0), (4, 97.5))]
    comq = [record(method="comq", bits=b, stored=float(b), result=r) for b, r in ((2, 97.2), (3, 98.2))]
    text = write_report([write(tmp_path, *rtn, *comq)]).markdown
    lines = [line for line in text.splitlines() if "bits at" in line or line.startswith("| rtn")]
    assert "> 4.00" in lines[-1]  # −0.5 points is out of its reach
    entries = [entry.strip() for entry in text[text.index("Bits saved against") :].split("|")]
    assert "≤ 2.00 (> 1.87)" in entries  # −2 points: comq has 97.2 at 2 bits, rtn 96.5 at 3.87


def test_an_unknown_baseline_is_refused(tmp_path: Path) -> None:
    write(tmp_path, *shifted(0.5))
    with pytest.raises(SystemExit, match="no result of the baseline 'gptq'; methods with results: rtn, comq"):
        main([str(tmp_path), "--baseline", "gptq"])
