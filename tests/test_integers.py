"""Quantized networks on integers alone against the same by fake quantization."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ptq
from ptq.errors import InputError
from ptq.integers import IntegerLayer, on_integers
from ptq.layers import QuantizedLayer
from ptq.models.networks import DigitsResNetModule, DigitsViTModule
from ptq.runner import run
from tests.test_preparation import trained
from tests.test_runner import config


def network(name: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    module = DigitsResNetModule([4, 6], 1, 10) if name == "resnet" else DigitsViTModule(2, 8, 1, 2, 12, 10)
    return trained(module), list(torch.randn(48, 1, 8, 8).split(16))


@pytest.mark.parametrize("regime", ["scalar", "layer_wise", "channel_wise", "doubly_channel_wise"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
@torch.no_grad()
def test_a_network_trained_by_qft_runs_on_integers(name: str, regime: str) -> None:
    """With units that are not one, after training: logits within the rounding of biases and factors."""
    module, batches = network(name)
    units = {"scalar": "ones", "channel_wise": "ones", "layer_wise": "equalize_mmse"}.get(regime, "equalize")
    grid = "symmetric_tensor" if regime in ("scalar", "layer_wise") else "symmetric"
    fake, _ = ptq.quantize_model(
        module, batches, "qft", grid, "w4a8", regime=regime, units=units, epochs=2, batch_size=16
    )
    integers = on_integers(fake)
    assert not any(isinstance(m, QuantizedLayer) for m in integers.modules())
    for layer in (m for m in integers.modules() if isinstance(m, IntegerLayer)):
        for key in ("weight", "bias", "mantissa", "shift"):
            tensor = layer.get_buffer(key).double()
            assert torch.equal(tensor, tensor.round())
        assert layer.get_buffer("weight").abs().max() <= 8
        assert layer.get_buffer("mantissa").abs().max() < 2**15
    x = torch.cat(batches)
    found, wanted = integers(x), fake(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) >= 47 / 48


@pytest.mark.parametrize("method", ["rtn", "comq"])
@torch.no_grad()
def test_a_layer_is_exact_but_for_bias_and_factor(method: str) -> None:
    """Padding, strides, groups and zero points of both codes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect"))
    x = torch.randn(32, 4, 9, 9) + 0.5
    quantized, _ = ptq.quantize_model(module, [x], method, "affine", "w3a8")
    assert_close(on_integers(quantized)(x), quantized(x), rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_a_factor_that_rounds_up_keeps_its_bits() -> None:
    """Just below a power of two, m would be 2^15, a bit more than there is."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 1))
    quantized, _ = ptq.quantize_model(module, [torch.randn(20, 6)], "rtn", "symmetric", "w4a8")
    grid, _ = quantized[0].grid_and_codes()
    quantized[0].input_quantizer.scale.copy_((1 - 2**-20) / grid.scale.flatten())
    layer = on_integers(quantized)[0]
    assert layer.get_buffer("mantissa").tolist() == [2**14]
    assert layer.get_buffer("shift").tolist() == [14]


@pytest.mark.parametrize("method", ["rtn", "qft"])
def test_a_job_evaluated_on_integers(tmp_path: Path, method: str) -> None:
    job = [f"method={method}", "grid=symmetric", "bits=w4a8", "eval.num_samples=300"]
    job += ["method.epochs=2"] if method == "qft" else []
    fake, integers = (run(config(tmp_path, *job, f"eval.integers={on}"), {}) for on in (False, True))
    assert integers["status"] == "done", integers["error"]
    assert integers["quantized"]["top1"] > 90
    assert integers["quantized"]["top1"] == pytest.approx(fake["quantized"]["top1"], abs=0.67)  # two images
    assert [layer["relative_error"] for layer in integers["layers"]] == [
        layer["relative_error"] for layer in fake["layers"]
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bits": "w4"}, r"layer '0': integers need inputs quantized.*bits=w4a8"),
        (
            {"bits": "w4a8", "grid": "affine_float"},
            r"layer '0': integers need an affine grid.*grid=symmetric",
        ),
        ({"bits": "w4a8", "grid": "power"}, "integers need an affine grid"),
    ],
)
def test_layers_without_an_integer_form_are_named(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    module, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(20, 6)
    quantized, _ = ptq.quantize_model(module, [x], "rtn", **overrides)
    with pytest.raises(InputError, match=message):
        on_integers(quantized)
    settings = config(tmp_path, "eval.integers=true", *(f"{key}={value}" for key, value in overrides.items()))
    record = run(settings, {})
    assert record["status"] == "failed"
    assert re.search(message.replace("layer '0'", "eval.integers=true"), record["error"]["message"])


def test_inputs_that_stay_float_are_refused_before_work(tmp_path: Path) -> None:
    job = ["eval.integers=true", "bits=w4a8", "grid=symmetric", "bits.activation_skip=[stem]"]
    record = run(config(tmp_path, *job), {})
    assert record["status"] == "failed"
    assert "inputs of stem stay float by bits.activation_skip" in record["error"]["message"]
    assert "float" not in record  # nothing was evaluated
