from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from record_factory import failed, record, write

from analysis.collect import aggregate, collect
from analysis.names import format_perplexity, method_family, model_title
from analysis.tables import latex, latex_escape, markdown, tidy


def cells(folder: Path, *records: dict) -> pd.DataFrame:
    return aggregate(collect([write(folder, *records)]))


def rows(table: str) -> dict[str, list[str]]:
    lines = [
        [part.strip() for part in line.strip("| ").split("|")]
        for line in table.splitlines()
        if line[:1] == "|"
    ]
    return {name: entries for name, *entries in lines}


def test_blocks_columns_bold_missing_and_failed(tmp_path: Path) -> None:
    table = markdown(
        cells(
            tmp_path,
            record(method="comq", bits=4, result=97.9, stored=4.25),
            record(method="comq", bits=3, result=93.0),
            record(method="rtn", bits=4, result=97.0),
            failed(method="rtn", bits=3),
            record(method="gptq", bits=3, result=93.001),
        )
    )
    found = rows(table)
    assert "### Digits ResNet (`digits_resnet`) · top-1, %, higher is better" in table
    assert list(found) == ["method", "------", "float", "rtn", "gptq", "comq"]
    assert found["method"] == ["W4", "W3"]
    assert found["float"][0] == "98.50"
    assert found["rtn"] == ["97.00 @ 4.06", "failed"]
    assert found["gptq"] == ["–", "**93.00** @ 3.06"]
    assert found["comq"] == ["**97.90** @ 4.25", "**93.00** @ 3.06"]  # prints as gptq's: both are best


def test_the_lowest_perplexity_is_best_in_each_model(tmp_path: Path) -> None:
    options = {"metric": "perplexity", "data": "topics", "before": 3.9, "bits": 2}
    found = cells(
        tmp_path,
        record("topics_llama", "rtn", result=1340.0, **options),
        record("topics_llama", "comq", result=31.0, **options),
        record("digits_resnet", "rtn", bits=2, result=12.0),
    )
    table = markdown(found)
    assert "perplexity, lower is better" in table
    assert "1.3e3 @ 2.06" in table
    assert "**31.00** @ 2.06" in table
    assert "**12.00** @ 2.06" in table
    best = tidy(found).set_index(["model", "method"])["best"].to_dict()
    assert best == {
        ("digits_resnet", "rtn"): True,
        ("topics_llama", "comq"): True,
        ("topics_llama", "rtn"): False,
    }


def test_spread_and_n(tmp_path: Path) -> None:
    seeds = [record(result=value, seed=seed) for seed, value in enumerate((90.0, 92.0, 94.0))]
    assert "mean ± std over n = 3 seeds" in markdown(cells(tmp_path / "one", *seeds))
    mixed = markdown(cells(tmp_path / "two", *seeds, record(method="rtn", result=80.0)))
    assert "**92.00 ± 2.00 (n=3)** @ 3.06" in mixed


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.899, "3.90"), (99.99, "99.99"), (99.999, "100"), (120.4, "120"), (999.9, "1.0e3"), (1340.0, "1.3e3")],
)
def test_perplexity_format(value: float, text: str) -> None:
    assert format_perplexity(value) == text


@pytest.mark.parametrize(
    ("label", "family"),
    [
        ("comq", "comq"),
        ("comq_release (sweeps=5)", "comq"),
        ("gradient_ptq · g128", "gradient_ptq"),
        ("comqat", "comqat"),
        ("mine (x=1)", "mine"),
    ],
)
def test_method_family(label: str, family: str) -> None:
    assert method_family(label) == family


def test_model_title() -> None:
    assert model_title("cifar10_resnet20") == "CIFAR-10 ResNet-20"
    assert model_title("my_net7") == "My Net7"


def test_latex_escapes_and_balances(tmp_path: Path) -> None:
    name = r"a_b & 50% #1 {x} $y$ \z~^"
    text = latex(
        cells(tmp_path, record(label=name), record(method="rtn", bits=4), failed(method="gptq", bits=2))
    )
    assert r"a\_b \& 50\% \#1 \{x\} \$y\$ \textbackslash{}z\textasciitilde{}\textasciicircum{}" in text
    bare = re.sub(r"\\[{}&%#$_]", "", "\n".join(line for line in text.splitlines() if line[:1] != "%"))
    assert bare.count("{") == bare.count("}")
    assert "%" not in bare
    assert "_" not in bare
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    width = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1))
    body = [line for line in bare.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
    assert {line.count("&") + 1 for line in body} == {width}
    assert text.isascii()


def test_latex_escape_leaves_words_alone() -> None:
    assert latex_escape("comq (sweeps=3)") == "comq (sweeps=3)"


def test_mixed_widths_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    def mixed(budget: float | None, result: float) -> dict:
        own = {"_target_": "ptq.mixed_precision.MixedBits", "budget": budget, "candidates": [2, 3, 4]}
        return record(bits=3, result=result, bits_config=own, choices={"bits": "mixed"})

    found = rows(markdown(cells(tmp_path, record(result=90.0), mixed(None, 91.0), mixed(3.5, 92.0))))
    assert found["method"] == ["mixed 3.5", "W3", "mixed as W3"]
    assert found["comq"] == ["**92.00** @ 3.06", "**90.00** @ 3.06", "**91.00** @ 3.06"]
