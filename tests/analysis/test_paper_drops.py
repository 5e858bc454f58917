from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from record_factory import failed, record, write

from analysis.collect import collect
from analysis.compare import compare
from analysis.names import METRICS
from analysis.paper_drops import UNITS, drop_tables
from analysis.paper_table import latex, markdown
from analysis.papers import published


def tables(folder: Path, *records: dict[str, Any], paper: str = "comq") -> list[tuple[str, list[list[str]]]]:
    return drop_tables(compare(published(paper), collect([write(folder, *records)])))


def test_the_papers_spread_stands_beside_our_drops(tmp_path: Path) -> None:
    (found,) = tables(
        tmp_path,
        record("cifar10_resnet20", "comq_release", 3, 90.0, before=91.5),
        record("cifar10_resnet20", "rtn", 3, 80.0, before=91.5),
        record("digits_vit", "comq_release", 3, 96.0, before=97.0),
    )
    title, (header, *rows) = found
    assert title.endswith("points of top-1")
    assert header == [
        "setting",
        "method",
        "paper: median (range; models)",
        "ours: cifar10_resnet20",
        "ours: digits_vit",
    ]
    assert rows[0] == ["W3", "COMQ (paper)", "1.70 (1.26 to 2.36; 4)", "", ""]
    assert [row[1] for row in rows[1:3]] == ["FQ-ViT (paper)", "PTQ4ViT (paper)"]
    assert rows[3:] == [["W3", "rtn", "", "11.50", "–"], ["W3", "comq_release", "", "1.50", "1.00"]]


def test_perplexities_lose_per_cent(tmp_path: Path) -> None:
    options = {"metric": "perplexity", "before": 4.0}
    (found,) = tables(tmp_path, record("stories260k", "decoupleq", 4, 5.0, **options), paper="decoupleq")
    assert found[1][-1] == ["W4", "decoupleq", "", "25.0 %"]
    assert found[1][1][:2] == ["W4", "GPTQ (paper)"]


def test_none_where_our_runs_have_published_numbers_or_failed(tmp_path: Path) -> None:
    assert tables(tmp_path / "a", record("deit_small", "comq", 3, data="imagenet")) == []
    assert tables(tmp_path / "b", failed(model="cifar10_resnet20", method="comq")) == []


@pytest.mark.parametrize("local", [True, False])
def test_the_papers_models_are_listed_only_if_we_ran_one(tmp_path: Path, local: bool) -> None:
    jobs = [record("cifar10_resnet20", "comq", 3)]
    jobs += [] if local else [record("deit_small", "comq", 3, data="imagenet")]
    rows = compare(published("comq"), collect([write(tmp_path, *jobs)]))
    text = markdown(rows, "comq")
    assert ("Swin-T" in text) is not local
    assert text.index("Drops on the paper") < text.index("### CIFAR-10 ResNet-20")
    assert "Drops on the paper" in latex(rows, "comq")


def test_every_metric_has_its_unit() -> None:
    assert set(UNITS) == set(METRICS)
