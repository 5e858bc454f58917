from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from analysis.names import KNOWN_METHODS
from analysis.papers import NUMBERS, WORDS, UnknownPaperError, papers, published

MODELS = {path.stem for path in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml")}
ALLOWED = {
    "family": {"", *KNOWN_METHODS},
    "ours": {"", *MODELS},
    "data": {"", "ImageNet", "WikiText-2"},
    "metric": {"top1", "perplexity", "top1_gain"},
    "first_last": {"", "all", "8", "blocks"},
    "tuning": {"", "none", "block", "network", "labels"},
    "tier": {"", "A", "B"},
}


def test_every_paper_has_its_file() -> None:
    assert papers() == ["anchors", "comq", "decoupleq", "gradient_ptq", "ptnq", "qft"]


@pytest.mark.parametrize("paper", papers())
def test_schema(paper: str) -> None:
    frame = published(paper)
    assert len(frame) > 10
    assert set(frame.columns) == {*NUMBERS, *WORDS}
    for name, words in ALLOWED.items():
        assert set(frame[name]) <= words, name
    for name in ("paper", "table", "method", "model", "metric"):
        assert (frame[name] != "").all(), name
    for name in NUMBERS:
        assert (frame[name].dropna() > 0).all(), name
    assert frame["weight_bits"].notna().all()
    identity = [
        "paper",
        "table",
        "method",
        "model",
        "weight_bits",
        "activation_bits",
        "granularity",
        "group_size",
        "notes",  # the same setting with another activation quantizer
    ]
    assert not frame.duplicated(identity).any()


@pytest.mark.parametrize("paper", papers())
def test_a_value_says_where_it_was_read_and_a_gap_says_why(paper: str) -> None:
    for _, row in published(paper).iterrows():
        if math.isnan(row["value"]):
            assert row["notes"]
            assert math.isnan(row["float"])
        else:
            assert row["source"]
            assert row["tier"] in ("A", "B")
            assert row["metric"] != "top1" or row["value"] < 100


@pytest.mark.parametrize("paper", papers())
def test_one_float_value_per_checkpoint_is_near_the_others(paper: str) -> None:
    known = published(paper).dropna(subset=["float"])
    spread = known.groupby("model")["float"].agg(["min", "max"])
    assert (spread["max"] / spread["min"] < 1.1).all()


@pytest.mark.parametrize(
    ("paper", "model", "method", "bits", "group", "value", "before"),
    [
        ("comq", "DeiT-S", "COMQ", 2, math.nan, 67.19, 79.83),
        ("decoupleq", "LLaMA-2-7B", "OmniQuant", 2, 128, 9.62, 5.47),
        ("decoupleq", "ResNet-18", "decoupleQ+sft", 2, math.nan, 65.45, 69.76),
        ("ptnq", "ViT (307 M parameters)", "affine", 4, math.nan, 78.9, 80.1),
        ("qft", "ResNet-18", "QFT", 4, math.nan, math.nan, math.nan),
    ],
)
def test_known_rows(
    paper: str, model: str, method: str, bits: float, group: float, value: float, before: float
) -> None:
    frame = published(paper)
    same_group = frame["group_size"].isna() if math.isnan(group) else frame["group_size"] == group
    named = (frame["model"] == model) & (frame["method"] == method) & (frame["weight_bits"] == bits)
    row = frame[named & same_group].iloc[0]
    assert (row["value"], row["float"]) == pytest.approx((value, before), nan_ok=True)


def test_an_unknown_paper_is_refused() -> None:
    with pytest.raises(UnknownPaperError, match="no published numbers of 'gptqq'; there are: anchors, comq"):
        published("gptqq")


def test_missing_fields_are_nan_or_empty() -> None:
    row = published("comq").iloc[-1]
    assert pd.isna(row["value"])
    assert row["source"] == ""
