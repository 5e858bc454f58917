from __future__ import annotations

import math
from typing import Any

import pytest
from record_factory import record

from analysis.protocol import protocol

NOT_A_LAYER = "weight of a LayerNorm: not a Linear, Conv2d or Conv1D weight"


def found(
    skipped: dict[str, str] | None = None, layers: tuple[str, ...] = (), **options: Any
) -> dict[str, Any]:
    content = record(
        skipped_layers=[{"name": name, "reason": reason} for name, reason in (skipped or {}).items()],
        **options,
    )
    if layers:
        content["layers"] = [{"name": name} for name in layers]
    return protocol(content, content["config"])


@pytest.mark.parametrize(
    ("skipped", "layers", "first_last"),
    [
        pytest.param({}, (), "all", id="nothing left out"),
        pytest.param({"pos_embed": NOT_A_LAYER}, (), "all", id="only what is no layer"),
        pytest.param(
            {"lm_head": "kept float"}, ("model.layers.0.mlp.up_proj",), "blocks", id="language model"
        ),
        pytest.param(
            {"head": "left out by bits.skip"},
            ("patch_embed.proj", "blocks.0.mlp.fc1"),
            "some float",
            id="one",
        ),
    ],
)
def test_first_and_last(skipped: dict[str, str], layers: tuple[str, ...], first_last: str) -> None:
    assert found(skipped, layers)["first_last"] == first_last


def test_wider_ends() -> None:
    assert found(bits_config={"first_last": 8.0})["first_last"] == "8"


def test_calibration_in_the_words_of_the_papers() -> None:
    own = found(data="imagenet")
    assert (own["calibration_data"], own["calibration_samples"]) == ("ImageNet train", 128)
    c4 = found(data="wikitext2_hub", config={"calibration": {"num_samples": 64, "source": "c4"}})
    assert (c4["calibration_data"], c4["calibration_samples"]) == ("C4", 64)
    assert found(data="digits")["calibration_data"] == "digits"
    none = found(config={"calibration": {"_target_": "ptq.calibration.NoCalibration"}})
    assert none["calibration_data"] == "none"
    assert math.isnan(none["calibration_samples"])


def test_tuning_and_context() -> None:
    plain = found()
    assert plain["tuning"] == "none"
    assert math.isnan(plain["context"])
    assert math.isnan(plain["activation_bits"])
    assert found(config={"tuning": {"scope": "block", "loss": "mse"}})["tuning"] == "block"
    assert found(config={"tuning": {"scope": "network", "loss": "cross_entropy"}})["tuning"] == "labels"
    model = {"context_length": 2048}
    assert found(config={"model": model, "eval": {"context": None}})["context"] == 2048
    assert found(config={"model": model, "eval": {"context": 512}})["context"] == 512
