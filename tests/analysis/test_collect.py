from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from record_factory import failed, record, write

from analysis.collect import aggregate, collect, collect_all
from analysis.labels import bits_label


def test_numbers_are_those_of_the_record(tmp_path: Path) -> None:
    write(tmp_path, record(bits=3, result=91.25, stored=3.0625, seed=7))
    (row,) = collect([tmp_path]).to_dict("records")
    assert (row["model"], row["data"], row["method"], row["grid"], row["bits"]) == (
        "digits_resnet",
        "digits",
        "comq",
        "affine",
        "W3",
    )
    assert (row["metric"], row["float"], row["quantized"], row["seed"]) == ("top1", 98.5, 91.25, 7)
    assert (row["codes_bits"], row["parameters_bits"], row["bits_per_coefficient"]) == (3.0, 0.0625, 3.0625)
    assert (row["model_bits_per_coefficient"], row["seconds"], row["peak_memory_bytes"]) == (3.5625, 2.5, 1e6)
    assert row["solve_seconds"] == 1.25  # 0.25 of the 1.5 seconds went into the limit


@pytest.mark.parametrize(
    ("bits", "label"),
    [
        pytest.param({"weight": 3.0}, "W3", id="plain"),
        pytest.param({"weight": 3, "group_size": 128}, "W3 g128", id="groups"),
        pytest.param({"weight": 4, "activation": 8, "first_last": 8}, "W4A8 · 8-bit ends", id="activations"),
        pytest.param({"weight": 3, "first_last": 8}, "W3 · 8-bit ends", id="ends"),
        pytest.param({"weight": 2.5, "group_size": 64, "first_last": 8}, "W2.5 g64 · 8-bit ends", id="all"),
    ],
)
def test_bits_label(bits: dict[str, float], label: str) -> None:
    assert bits_label(bits) == label


def test_seeds_become_mean_std_and_n(tmp_path: Path) -> None:
    write(tmp_path, *(record(result=value, seed=seed) for seed, value in enumerate((90.0, 92.0, 94.0))))
    write(tmp_path, failed(seed=3))
    (cell,) = aggregate(collect([tmp_path])).to_dict("records")
    assert (cell["mean"], cell["std"], cell["n"], cell["failed"]) == (92.0, 2.0, 3, 1)
    assert cell["seeds"] == "0 1 2"


@pytest.mark.parametrize("newest", [0, 1], ids=["older result last", "newer result last"])
def test_of_equal_hashes_the_newest_finished_one_stays(tmp_path: Path, newest: int) -> None:
    write(tmp_path, record(result=80.0), record(result=81.0), failed())
    for number in range(3):
        written = 300 if number == 2 else 200 if number == newest else 100
        os.utime(tmp_path / f"job{number:03d}" / "record.json", (written, written))
    found = collect_all([tmp_path, tmp_path])
    assert found.frame["quantized"].tolist() == [80.0 + newest]
    assert found.problems == []
    assert len(found.duplicates) == 2
    kept = tmp_path / f"job{newest:03d}" / "record.json"
    assert all(f"the same job as {kept}" in line for line in found.duplicates)
    assert [record.path for record in found.records] == [kept]


def test_colliding_configs_are_told_apart_by_the_key_that_differs(tmp_path: Path) -> None:
    write(tmp_path, *(record(bits=bits) for bits in (4, 3, 2)))
    write(tmp_path, record(bits=3, method_config={"target": "float_path"}))
    assert set(collect([tmp_path])["method"]) == {"comq", "comq (target=float_path)"}


def test_equally_common_values_are_both_named(tmp_path: Path) -> None:
    write(tmp_path, record(), record(method_config={"target": "float_path"}))
    assert set(collect([tmp_path])["method"]) == {"comq (target=quantized_path)", "comq (target=float_path)"}


def test_a_variant_keeps_its_label_where_it_collides_with_nothing(tmp_path: Path) -> None:
    float_path = {"target": "float_path"}
    write(tmp_path, *(record(bits=bits) for bits in (4, 3, 2)), record(bits=3, method_config=float_path))
    write(tmp_path, record(model="digits_vit", bits=3, method_config=float_path))
    frame = collect([tmp_path])
    assert frame.loc[frame["model"] == "digits_vit", "method"].tolist() == ["comq (target=float_path)"]


def test_a_choice_explains_the_keys_below_it(tmp_path: Path) -> None:
    large = {"choices": {"calibration": "large"}, "config": {"calibration": {"num_samples": 1024}}}
    write(tmp_path, record(), record(bits=4), record(bits=3, **large))
    assert set(collect([tmp_path])["method"]) == {"comq", "comq (calibration=large)"}


def test_the_grid_is_named_where_it_is_not_the_usual_one(tmp_path: Path) -> None:
    write(tmp_path, record(bits=4), record(bits=3), record(bits=3, grid="ptnq"))
    assert set(collect([tmp_path])["method"]) == {"comq", "comq (grid=ptnq)"}


def test_where_a_run_writes_tells_nothing_apart(tmp_path: Path) -> None:
    write(tmp_path, record(config={"name": "a"}), record(config={"name": "b"}))
    assert collect([tmp_path])["method"].tolist() == ["comq"]


@pytest.mark.parametrize("text", ['{"status": "do', "[1]", "{}", '"done"'])
def test_what_is_no_record_is_a_problem(tmp_path: Path, text: str) -> None:
    write(tmp_path, record())
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "record.json").write_text(text)
    found = collect_all([tmp_path])
    assert len(found.frame) == 1
    assert len(found.problems) == 1
    assert "partial" in found.problems[0]


def test_a_record_may_lack_every_optional_key(tmp_path: Path) -> None:
    write(tmp_path, {"status": "done"}, {"status": "failed", "error": None, "config": None}, record())
    found = collect_all([tmp_path])
    assert len(found.frame) == 2  # the first two are one cell, and the finished one is kept
    assert len(found.problems) == 1


def test_a_result_that_is_not_finite_is_told(tmp_path: Path) -> None:
    write(tmp_path, json.loads(json.dumps(record(result=float("nan")))))
    assert "top1 is nan" in collect_all([tmp_path]).problems[0]


def test_a_record_from_before_a_key_is_like_those_with_the_value_of_then(tmp_path: Path) -> None:
    """No label tells them apart; another value does, and a class that never had the key goes without."""
    engine = {"_target_": "ptq.methods.gradient_ptq.GradientPTQ"}
    write(tmp_path / "old", record(method_config=engine, bits=2))
    write(tmp_path / "new", record(method_config={**engine, "fisher_rank": 15}, bits=3))
    write(tmp_path / "other", record(method="gptq", method_config={"_target_": "ptq.methods.gptq.GPTQ"}))
    found = collect_all([tmp_path])
    assert set(found.frame["method"]) == {"comq", "gptq"}
    ranks = {r.config["choices"]["method"]: r.config["method"].get("fisher_rank") for r in found.records}
    assert ranks == {"comq": 15, "gptq": None}
    write(tmp_path / "changed", record(method_config={**engine, "fisher_rank": 4}, bits=2))
    assert len(set(collect_all([tmp_path]).frame["method"])) == 3
