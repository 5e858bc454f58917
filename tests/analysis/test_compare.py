from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from record_factory import failed, record, write

from analysis.collect import collect
from analysis.compare import compare, drop
from analysis.paper_table import latex, markdown
from analysis.papers import papers, published
from analysis.report import main


def deit(result: float = 77.0, bits: float = 3, **options: Any) -> dict[str, Any]:
    """A run of ours that COMQ's table has a number for: 77.47 at 3 bits, float 79.83."""
    calibration = {"num_samples": 2048, "source": "imagenet"}
    options = {"data": "imagenet", "before": 79.85, "config": {"calibration": calibration}, **options}
    return record("deit_small", "comq", bits, result, **options)


def rows(folder: Path, *records: dict[str, Any], paper: str = "comq") -> pd.DataFrame:
    return compare(published(paper), collect([write(folder, *records)]))


def ours(found: pd.DataFrame) -> dict[str, Any]:
    (row,) = found[found["run"] != ""].to_dict("records")
    return row


def test_the_difference_is_ours_less_the_papers(tmp_path: Path) -> None:
    row = ours(rows(tmp_path, deit(76.0, seed=0), deit(78.0, seed=1)))
    assert (row["model"], row["setting"], row["method"], row["run"]) == ("DeiT-S", "W3", "COMQ", "comq")
    assert (row["published"], row["published_float"]) == (77.47, 79.83)
    assert (row["mean"], row["n"], row["std"]) == (77.0, 2, pytest.approx(math.sqrt(2)))
    assert row["difference"] == pytest.approx(77.0 - 77.47)
    assert row["published_drop"] == pytest.approx(2.36)
    assert row["drop"] == pytest.approx(2.85)
    assert row["drop_difference"] == pytest.approx(0.49)
    assert (row["status"], row["seconds"], row["peak_memory_bytes"]) == ("done", 2.5, 1e6)


def test_what_has_no_run_stays_with_its_number(tmp_path: Path) -> None:
    found = rows(tmp_path, deit())
    assert len(found) == len(published("comq"))
    rest = found[found["run"] == ""]
    assert set(rest["status"]) == {"not run"}
    assert rest["published"].notna().sum() == published("comq")["value"].notna().sum() - 1
    assert found["mean"].count() == 1


def test_runs_without_a_published_number_are_added(tmp_path: Path) -> None:
    found = rows(tmp_path, deit(), record("cifar10_resnet20", "rtn"), record("vit_small", "comq", 4))
    status = found[found["run"] != ""].set_index("ours")["status"].to_dict()
    assert status == {
        "deit_small": "done",
        "cifar10_resnet20": "no published value",
        "vit_small": "no published value",  # COMQ's own gap: a row, but without a number
    }
    assert found["difference"].count() == 1


def test_a_failed_run_is_told(tmp_path: Path) -> None:
    row = ours(rows(tmp_path, failed(model="deit_small", method="comq", bits=3, data="imagenet")))
    assert (row["status"], row["metric"]) == ("failed", "top1")
    assert math.isnan(row["mean"])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"bits": 5}, id="width"),
        pytest.param({"bits_config": {"group_size": 128}}, id="groups"),
        pytest.param({"bits_config": {"activation": 8}}, id="activations"),
    ],
)
def test_another_setting_is_not_compared(tmp_path: Path, change: dict[str, Any]) -> None:
    assert ours(rows(tmp_path, deit(**change)))["status"] == "no published value"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            {}, "first/last (blocks → all), evaluation samples (50000 → 360)", id="as the factory has it"
        ),
        pytest.param({"bits_config": {"first_last": 8}}, "first/last (blocks → 8)", id="ends"),
        pytest.param(
            {"config": {"calibration": {"num_samples": 512, "source": "c4"}}},
            "calibration (ImageNet train → C4), calibration size (2048 → 512)",
            id="calibration",
        ),
        pytest.param({"before": 81.0}, "float model", id="checkpoint"),
        pytest.param(
            {"data": "imagenet_samples"}, "evaluation data (ImageNet → imagenet_samples)", id="data"
        ),
    ],
)
def test_what_differs_in_the_protocol_is_marked(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    row = ours(rows(tmp_path, deit(**change)))
    assert words in row["differs"]
    assert row["unstated"] == "tuning"


def test_context_and_tuning_of_language_models(tmp_path: Path) -> None:
    options = {
        "metric": "perplexity",
        "before": 5.47,
        "data": "wikitext2_hub",
        "config": {"calibration": {"num_samples": 128, "source": "c4"}, "model": {"context_length": 4096}},
        "skipped_layers": [{"name": "lm_head", "reason": "kept float"}],
        "layers": [{"name": "model.layers.0.mlp.up_proj"}],
    }
    found = rows(tmp_path, record("llama2_7b", "decoupleq", 2, 10.94, **options), paper="decoupleq")
    met = found[found["run"] != ""].set_index("method")
    assert met.loc["decoupleQ", "differs"] == "tuning (block → none), context (2048 → 4096)"
    assert met.loc["decoupleQ (layer-wise only)", "differs"] == "context (2048 → 4096)"
    assert met.loc["decoupleQ", "drop"] == pytest.approx(100)
    assert met.loc["decoupleQ", "published_hours"] == 2.5


def test_drop() -> None:
    assert drop("top1", 70.0, 72.5) == 2.5
    assert drop("perplexity", 6.6, 6.0) == pytest.approx(10)


def test_markdown(tmp_path: Path) -> None:
    found = rows(tmp_path, deit(76.0, seed=0), deit(78.0, seed=1), record("cifar10_resnet20", "rtn"))
    text = markdown(found, "comq")
    assert "### DeiT-S (`deit_small`) · top-1, %; float: paper 79.83, ours 79.85" in text
    line = next(line for line in text.splitlines() if "77.00 ±" in line)
    entries = [entry.strip() for entry in line.strip("|").split("|")]
    assert entries[:4] == ["W3", "COMQ", "77.47", "2.36"]
    assert entries[4:10] == ["comq", "77.00 ± 1.41 (n=2)", "2.85", "−0.47", "+0.49", "3.06"]
    assert entries[10:12] == ["2.5 s", "1 MB"]
    assert text.index("DeiT-S") < text.index("CIFAR-10 ResNet-20") < text.index("Swin-T")  # ours first
    assert "not run" in text
    assert "- published value not found: the paper’s own tables were not available" in text


@pytest.mark.parametrize("paper", papers())
def test_latex_is_a_row_of_tabulars(tmp_path: Path, paper: str) -> None:
    text = latex(rows(tmp_path, deit(), record("resnet18", "rtn", 4), paper=paper), paper)
    body = "\n".join(line for line in text.splitlines() if line[:1] != "%")
    assert body.isascii()
    bare = re.sub(r"\\[{}&%#$_]", "", body)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[#%^~_]", bare)
    tables = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", bare, re.DOTALL)
    assert len(tables) == body.count(r"\toprule") == body.count(r"\bottomrule") >= 3
    for columns, content in tables:
        lines = [line for line in content.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
        assert {line.count("&") + 1 for line in lines} == {len(columns)}


def test_report_writes_the_paper_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "in", deit())
    main([str(folder), "--output", str(tmp_path / "out"), "--paper", "comq"])
    assert (tmp_path / "out" / "paper_comq.md").read_text().strip() in capsys.readouterr().out
    assert "\\toprule" in (tmp_path / "out" / "paper_comq.tex").read_text()
    table = pd.read_csv(tmp_path / "out" / "paper_comq.csv")
    assert table.loc[table["run"].notna(), "difference"].tolist() == [pytest.approx(-0.47)]


def test_an_unknown_paper_stops_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--paper", "gptqq"])
    assert "invalid choice: 'gptqq'" in capsys.readouterr().err
