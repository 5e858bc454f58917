from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from record_factory import failed, record, write

from analysis.report import main, write_report

FILES = [
    "table.md",
    "table.csv",
    "table.tex",
    "bits_saved.csv",
    "bits_saved.tex",
    "curves.png",
    "curves.pdf",
    "curves.csv",
    "time.png",
    "time.pdf",
    "time.csv",
    "layers_digits_resnet.png",
    "layers_digits_resnet.pdf",
    "layers_topics_llama.png",
    "layers_topics_llama.pdf",
    "layers.csv",
]


def sweep(folder: Path) -> Path:
    options = {"metric": "perplexity", "data": "topics", "before": 3.9}
    for method, loss in (("rtn", 2.0), ("comq", 1.0)):
        for bits in (4, 3, 2):
            drop = loss * 3.0 ** (4 - bits)
            write(
                folder, *(record(method=method, bits=bits, result=98 - drop + s / 8, seed=s) for s in (0, 1))
            )
            write(folder, record("topics_llama", method, bits, 4 + drop, **options))
    return write(folder, failed("H is singular\nraise damping", method="gptq", bits=2))


def test_report_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = sweep(tmp_path / "sweep"), tmp_path / "report"
    main([str(folder), "--output", str(output)])
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    printed = capsys.readouterr().out
    assert (output / "table.md").read_text().strip() in printed
    assert all(str(output / name) in printed for name in FILES)
    assert "failed: RuntimeError: H is singular raise damping (layer 'head')" in printed
    table = pd.read_csv(output / "table.csv").set_index(["model", "method", "bits"])
    assert table.loc[("digits_resnet", "comq", "W4"), "mean"] == 97 + 1 / 16
    assert table.loc[("topics_llama", "rtn", "W2"), ["mean", "float", "bits_per_coefficient"]].tolist() == [
        22.0,
        3.9,
        2.0625,
    ]
    curves = pd.read_csv(output / "curves.csv").set_index(["model", "method", "bits"])
    assert len(curves) == 12
    assert curves["mean"].equals(table.loc[curves.index, "mean"])
    assert b"/Type3" not in (output / "curves.pdf").read_bytes()


def test_top5_and_default_output(tmp_path: Path) -> None:
    report = write_report([sweep(tmp_path)], None, "top5")
    assert "top-5, %, higher is better" in report.markdown
    assert sorted(path.name for path in report.paths) == sorted(FILES)
    assert {path.parent for path in report.paths} == {tmp_path}


def test_a_sweep_where_all_failed_still_has_its_table(tmp_path: Path) -> None:
    report = write_report([write(tmp_path, failed())])
    assert "failed" in report.markdown
    assert [path.name for path in report.paths] == FILES[:5]


@pytest.mark.parametrize(("name", "message"), [("absent", "is not a folder"), ("empty", "no record.json")])
def test_nothing_to_report_on(
    tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=message) as stopped:
        main([str(tmp_path / name)])
    assert isinstance(stopped.value.code, str)  # Python prints it to stderr and exits with status 1
    assert capsys.readouterr().out == ""
