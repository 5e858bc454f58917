from __future__ import annotations

from pathlib import Path

from record_factory import failed, record, write

from analysis.checks import mixed_protocols
from analysis.collect import collect_all


def warnings(folder: Path, *records: dict) -> list[str]:
    found = collect_all([write(folder, *records)])
    return mixed_protocols(found.frame, found.records)


def calibrated(number: int) -> dict:
    return {"config": {"calibration": {"num_samples": number}}}


def test_jobs_run_alike_need_no_warning(tmp_path: Path) -> None:
    assert warnings(tmp_path, *(record(method=m, bits=b) for m in ("rtn", "comq") for b in (2, 3, 4))) == []


def test_calibration_sizes_within_one_width(tmp_path: Path) -> None:
    jobs = [record(method=m) for m in ("rtn", "gptq", "comq")]
    (line,) = warnings(tmp_path, *jobs, record(method="decoupleq", **calibrated(1024)))
    assert line == "Digits ResNet: calibration samples: 128 (3 jobs), 1024 (1 job: decoupleq)"


def test_another_size_at_another_width_is_no_mix(tmp_path: Path) -> None:
    assert warnings(tmp_path, record(bits=4), record(bits=2, **calibrated(1024))) == []


def test_jobs_without_calibration_are_not_held_against_others(tmp_path: Path) -> None:
    none = {"config": {"calibration": {"_target_": "ptq.calibration.NoCalibration"}}}
    assert warnings(tmp_path, record(method="hqq", **none), record(method="comq")) == []


def test_evaluation_samples_float_results_and_devices(tmp_path: Path) -> None:
    fewer = {"samples": 100, "top1": 80.0, "top5": 99.0}
    lines = warnings(
        tmp_path,
        record(method="rtn"),
        record(method="gptq", quantized=fewer),
        record(method="comq", before=97.0, bits=4, device="cuda"),
    )
    assert [line.split(": ")[1] for line in lines] == [
        "evaluation samples",
        "result of the float model",
        "device, so times do not compare",
    ]
    assert "98.50 (2 jobs), 97.00 (1 job: comq)" in lines[1]


def test_models_are_not_compared_with_each_other_nor_failed_jobs_with_done_ones(tmp_path: Path) -> None:
    other = record("digits_vit", device="cuda", before=96.0, **calibrated(512))
    stopped = failed(method="gptq", **calibrated(7))
    assert warnings(tmp_path, record(), other, stopped) == []


def test_commits_are_counted(tmp_path: Path) -> None:
    versions = [{"torch": "2.6", "commit": commit} for commit in ("aaa", "bbb", "aaa")]
    records = [record(bits=b, versions=v) for b, v in zip((4, 3, 2), versions, strict=True)]
    assert warnings(tmp_path, *records) == ["all models: commit: aaa (2 jobs), bbb (1 job)"]
