"""Reports on folders that are not as they should be: every fault is told, and what is sound is reported."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from record_factory import failed, record, write

from analysis.checks import mixed_protocols
from analysis.collect import aggregate, collect_all
from analysis.curves import curve_points
from analysis.layer_figure import layer_points
from analysis.report import NoRecordsError, Report, write_report
from analysis.tables import markdown
from analysis.time_figure import time_points


def damaged(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name / "record.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """One width, a failed job, a duplicate, a half-written record, a foreign file, two calibration sizes."""
    folder = tmp_path_factory.mktemp("mixture")
    more = {"config": {"calibration": {"num_samples": 1024}}}
    write(folder, record(method="rtn", result=80.0), record(method="comq", result=90.0, **more))
    write(folder, record(method="rtn", result=81.0), failed("no memory", method="gptq"))
    os.utime(folder / "job000" / "record.json", (100, 100))
    whole = json.dumps(record(method="hqq"))
    damaged(folder, "half", whole[: len(whole) // 2].encode())
    damaged(folder, "foreign", b"\xff\xfe\x00binary")
    return write_report([folder], html=True), folder


def test_problems_name_the_file_and_what_is_wrong(mixture: tuple[Report, Path]) -> None:
    report, folder = mixture
    problems = {Path(line.split(": ")[0]).parent.name: line for line in report.problems}
    assert set(problems) == {"half", "foreign", "job003"}
    assert "cannot be read as a record: " in problems["half"]
    assert "cannot be read as a record: " in problems["foreign"]
    assert problems["job003"].endswith("failed: RuntimeError: no memory (layer 'head')")
    assert str(folder / "half" / "record.json") in problems["half"]


def test_the_newer_of_two_records_counts_and_the_other_is_named(mixture: tuple[Report, Path]) -> None:
    report, folder = mixture
    assert "81.00" in report.markdown
    assert "80.00" not in report.markdown
    (line,) = report.duplicates
    assert line.startswith(f"{folder / 'job000' / 'record.json'}: the same job as")


def test_what_was_not_run_alike_is_a_warning(mixture: tuple[Report, Path]) -> None:
    (line,) = mixture[0].warnings
    assert "calibration samples: 128 (1 job), 1024 (1 job: comq" in line


def test_one_width_has_no_bits_saved_and_says_why(mixture: tuple[Report, Path]) -> None:
    assert "Bits saved: none, because each method has one width only" in mixture[0].markdown


def test_all_of_it_is_printed_and_on_the_page(mixture: tuple[Report, Path]) -> None:
    report, folder = mixture
    text, page = report.text(), (folder / "report.html").read_text()
    for title, count in (("Problems", 3), ("Duplicates", 1), ("Not run alike", 1)):
        assert f"{title} ({count}):" in text
        assert title in page
    assert "no memory" in page
    assert "one width only" in page


def test_nothing_but_half_written_records(tmp_path: Path) -> None:
    damaged(tmp_path, "half", b'{"status": "do')
    damaged(tmp_path, "empty", b"")
    with pytest.raises(NoRecordsError, match="with a result or an error under") as stopped:
        write_report([tmp_path])
    assert str(stopped.value).count("cannot be read as a record") == 2
    assert not list(tmp_path.glob("*.*"))  # nothing was written


@pytest.mark.parametrize("junk", [None, "x", [], {}, float("nan")], ids=repr)
@pytest.mark.parametrize(
    "key",
    [
        "config",
        "config.choices",
        "config.bits",
        "config.bits.weight",
        "float",
        "quantized",
        "quantized.top1",
        "bits_per_coefficient",
        "bits_per_coefficient.total",
        "layers",
        "seconds",
        "seconds.solve",
        "versions",
        "error",
        "device",
        "seed",
    ],
)
def test_junk_at_a_key_stops_nothing(tmp_path: Path, key: str, junk: Any) -> None:
    content = copy.deepcopy(record(result=90.0, versions={"torch": "2.6"}))
    *places, last = key.split(".")
    node = content
    for place in places:
        node = node[place]
    node[last] = junk
    found = collect_all([write(tmp_path, record(method="rtn", result=80.0), content)])
    cells = aggregate(found.frame)
    assert "80.00" in markdown(cells)
    assert len(mixed_protocols(found.frame, found.records)) < 5
    assert len(curve_points(cells)) >= 1
    assert len(time_points(cells)) >= 1
    assert len(layer_points(found.layers)) >= 4
