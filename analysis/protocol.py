"""How a record was calibrated and evaluated, in the words of the published tables."""

from __future__ import annotations

import re
from typing import Any

from analysis.records import dict_at, number

PROTOCOL = (
    "activation_bits",
    "first_last",
    "tuning",
    "calibration_data",
    "calibration_samples",
    "context",
)

# A choice of conf/data → what the papers call it: as calibration data, and as evaluation data.
CALIBRATION = {
    "imagenet": "ImageNet train",
    "c4": "C4",
    "wikitext2": "WikiText-2 train",
    "wikitext2_hub": "WikiText-2 train",
}
EVALUATION = {"imagenet": "ImageNet", "wikitext2": "WikiText-2", "wikitext2_hub": "WikiText-2"}
EVALUATION_SAMPLES = {"ImageNet": 50_000}

IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")


def protocol(content: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The fields of PROTOCOL, as columns of `papers.published` have them; NaN where a number is unset."""
    choices, bits = dict_at(config, "choices"), dict_at(config, "bits")
    calibration, tuning = dict_at(config, "calibration"), dict_at(config, "tuning")
    without_data = "num_samples" not in calibration
    source = str(calibration.get("source") or choices.get("data", ""))
    context = dict_at(config, "eval").get("context") or dict_at(config, "model").get("context_length")
    return {
        "activation_bits": number(bits.get("activation")),
        "first_last": _first_last(content, bits),
        "tuning": "labels" if tuning.get("loss") == "cross_entropy" else str(tuning.get("scope") or "none"),
        "calibration_data": "none" if without_data else CALIBRATION.get(source, source),
        "calibration_samples": number(calibration.get("num_samples")),
        "context": number(context),
    }


def _first_last(content: dict[str, Any], bits: dict[str, Any]) -> str:
    """`8` and the like, `all` where no layer is left out, `blocks` where all outside numbered blocks are."""
    if bits.get("first_last") is not None:
        return f"{number(bits['first_last']):g}"
    skipped = [
        layer
        for layer in content.get("skipped_layers") or []
        if "not a Linear, Conv2d or Conv1D weight"
        not in str(dict_at({"layer": layer}, "layer").get("reason"))
    ]
    if not skipped:
        return "all"
    layers = [str(dict_at({"layer": layer}, "layer").get("name")) for layer in content.get("layers") or []]
    return "blocks" if all(IN_A_BLOCK.search(name) for name in layers) else "some float"
