"""Quantized layer inputs in the walk over a model: what H is made of, shared quantizers, exceptions, bias
correction, storage, refusals.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ptq
from ptq import stage_inputs
from ptq.activations import ActivationQuantizer
from ptq.calibration import GramAccumulator
from ptq.capture import layer_inputs
from ptq.config import choices
from ptq.errors import InputError
from ptq.layers import QuantizedLayer, input_matrix
from tests.test_checkpoint import Mixed, X
from tests.test_pipeline import Recorder, Toy


@pytest.fixture
def toy() -> tuple[Toy, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy().eval(), list(torch.randn(24, 3, 6, 6).split(8))


@pytest.fixture
def mixed() -> Mixed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed().eval()


def received(module: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What arrives at a layer, before any quantizer of its own; all batches."""
    seen: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            module(batch)
    handle.remove()
    return torch.cat(seen)


def quantizers(module: nn.Module) -> dict[str, ActivationQuantizer | None]:
    return {n: m.input_quantizer for n, m in module.named_modules() if isinstance(m, QuantizedLayer)}


CASES: dict[str, dict[str, Any]] = {
    "float": {"inputs": "float"},
    "quantized": {},
    "float_path": {"target": "float_path"},
    "not sequential": {"sequential": False},
}


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_quantized_inputs(toy, choice, case: str) -> None:
    module, batches = toy
    recorder = Recorder()
    quantized, _ = ptq.quantize_model(
        module, batches, recorder, bits="w2a4", settings=choice("calibration", "default", **CASES[case])
    )
    for name in ("stem", "blocks.0.q", "blocks.1.k", "head"):
        source = module if case == "float" else quantized
        quantizer = quantizers(quantized)[name]
        assert quantizer is not None
        layer, x = module.get_submodule(name), received(source, name, batches)
        x_hat = input_matrix(layer, quantizer(x)).double()
        accumulator = GramAccumulator(layer)
        accumulator.add(quantizer(x), received(module, name, batches) if case == "float_path" else None)
        assert_close(recorder.problems[name].H, accumulator.gram(), rtol=1e-4, atol=1e-6)
        H = x_hat.mT @ x_hat / x_hat.shape[1]
        assert_close(
            accumulator.gram().diagonal(dim1=1, dim2=2).sum(),
            H.diagonal(dim1=1, dim2=2).sum(),
            rtol=1e-5,
            atol=0,
        )
        problem = recorder.problems[name]
        assert torch.equal(problem.T, problem.W) == (case != "float_path")


@pytest.mark.parametrize(
    ("case", "without", "kept"),
    [("quantized", 4, 2), ("float", 2, 1), ("float_path", 6, 3), ("not sequential", 2, 1)],
)
def test_kept_inputs_save_passes_and_change_nothing(
    toy, choice, monkeypatch, case: str, without: int, kept: int
) -> None:
    """Passes over a block of two stages: for quantizers, for statistics, and through the float network."""
    module, batches = toy
    settings = choice("calibration", "default", **CASES[case])
    passes: list[str] = []

    def counted(adapter, module, unit, *rest):
        passes.append(unit.name)
        return layer_inputs(adapter, module, unit, *rest)

    monkeypatch.setattr(stage_inputs, "layer_inputs", counted)
    found = []
    for size in (stage_inputs.KEPT_BYTES, 2500, 0):  # all, some batches, nothing
        monkeypatch.setattr(stage_inputs, "KEPT_BYTES", size)
        passes.clear()
        recorder = Recorder()
        ptq.quantize_model(module, batches, recorder, "affine", "w4a8", settings=settings)
        found.append((recorder.problems, passes.count("blocks.0") // len(batches)))
    for problems, _ in found:
        assert problems.keys() == found[-1][0].keys()
        for name, problem in problems.items():
            assert torch.equal(problem.H, found[-1][0][name].H)
            assert torch.equal(problem.T, found[-1][0][name].T)
    assert found[-1][1] == without
    assert found[0][1] == kept
    assert kept <= found[1][1] <= without


@pytest.mark.parametrize("name", [n for n in choices("activations") if n != "per_position"])
def test_many_bits_are_as_good_as_float(mixed, choice, name: str) -> None:
    bits = choice("bits", "w8", weight=16, activation=16)
    quantized, _ = ptq.quantize_model(mixed, [X], "rtn", bits=bits, activations=name)
    with torch.no_grad():
        assert_close(quantized(X), mixed(X), rtol=1e-2, atol=2e-3)


def test_fewer_bits_of_inputs_are_worse(mixed) -> None:
    errors = []
    for bits in ("w8", "w8a8", "w4a4", "w2a2"):
        quantized, _ = ptq.quantize_model(mixed, [X], "gptq", bits=bits)
        with torch.no_grad():
            errors.append(float((quantized(X) - mixed(X)).norm() / mixed(X).norm()))
    assert errors == sorted(errors)
    assert errors[1] < 0.01 < errors[2]


def test_layers_that_share_an_input_share_its_quantizer(toy) -> None:
    quantized, report = ptq.quantize_model(*toy, "rtn", bits="w4a8")
    found = quantizers(quantized)
    assert found["blocks.0.q"] is found["blocks.0.k"] is found["blocks.0.v"]
    assert found["blocks.0.q"] is not found["blocks.1.q"]
    assert found["blocks.0.out"] is not found["blocks.0.q"]
    facts = {layer.name: layer.activation for layer in report.layers}
    assert facts["head"] == {
        "bits": 8,
        "granularity": "tensor",
        "signed": False,
        "zero_point": True,
        "scales": 1,
        "storage_bits": 64,
    }
    assert not facts["blocks.0.q"]["zero_point"]  # after the stem's ReLU


def test_exceptions(toy, choice) -> None:
    module, batches = toy
    bits = choice("bits", "w4a4_ends8", activation_skip=["blocks.1.*", "blocks.0.k"], skip=["blocks.2.q"])
    recorder = Recorder()
    quantized, report = ptq.quantize_model(module, batches, recorder, bits=bits)
    widths = {name: None if q is None else q.bits for name, q in quantizers(quantized).items()}
    assert (widths["stem"], widths["head"], widths["blocks.0.q"]) == (8, 8, 4)
    assert [n for n, width in widths.items() if width is None] == [
        "blocks.0.k",
        *(f"blocks.1.{part}" for part in ("q", "k", "v", "out")),
    ]
    assert "blocks.2.q" not in widths
    assert {layer.name: layer.activation and layer.activation["bits"] for layer in report.layers} == {
        layer.name: widths[layer.name] for layer in report.layers
    }
    # one input, but not one H: k receives it unrounded
    assert not torch.equal(recorder.problems["blocks.0.k"].H, recorder.problems["blocks.0.q"].H)
    assert torch.equal(recorder.problems["blocks.0.v"].H, recorder.problems["blocks.0.q"].H)


def test_float_inputs_are_the_rule(toy) -> None:
    quantized, report = ptq.quantize_model(*toy, "rtn", bits="w4")
    assert set(quantizers(quantized).values()) == {None}
    assert {layer.activation for layer in report.layers} == {None}


@pytest.mark.parametrize("name", [n for n in choices("activations") if n != "per_position"])
def test_saved_quantizers_come_back_to_the_bit(mixed, tmp_path, name: str) -> None:
    quantized, _ = ptq.quantize_model(mixed, [X], "rtn", bits="w3a3", activations=name)
    ptq.save(quantized, tmp_path / "model")
    loaded = ptq.load(tmp_path / "model", Mixed())
    assert torch.equal(loaded(X), quantized(X))
    assert {n for n, q in quantizers(loaded).items() if q is not None} == set(quantizers(quantized))
    ptq.save(loaded, tmp_path / "again")
    for file in ("model.json", "float.safetensors", "quantized.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_bits_by_hand() -> None:
    """As test_checkpoint's 10 × 6 layer, with one scale and one zero point of 32 bits for its input."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    quantized, report = ptq.quantize_model(nn.Sequential(nn.Linear(6, 10)), [x], "rtn", "affine", "w3a8")
    assert report.bits_per_coefficient()["total"] == 3 + 10 * 19 / 60
    assert report.model_bits_per_coefficient(quantized) == pytest.approx((180 + 190 + 10 * 32 + 64) / 70)


@pytest.mark.parametrize("bits", ["w2", "w2a2"])
@pytest.mark.parametrize("case", ["layer", "float_path", "float"])
def test_bias_correction_restores_mean_outputs(mixed, choice, bits: str, case: str) -> None:
    overrides: dict[str, Any] = {
        "layer": {},
        "float_path": {"target": "float_path"},
        "float": {"inputs": "float"},
    }[case]
    x = X + 0.5
    settings = choice("calibration", "default", bias_correction=True, **overrides)
    quantized, report = ptq.quantize_model(mixed, [x[:4], x[4:]], "rtn", bits=bits, settings=settings)
    assert [layer.name for layer in report.layers if layer.added_bias] == ["linear"]
    for name, layer in quantized.named_children():
        if not isinstance(layer, QuantizedLayer):
            continue
        original = mixed.get_submodule(name)
        arrived = received(mixed if case == "float" else quantized, name, [x])
        wanted = received(mixed, name, [x]) if case == "float_path" else arrived
        with torch.no_grad():
            dims = (0, 2, 3) if arrived.dim() == 4 else (0,)
            given, asked = layer(arrived), original(wanted)
            if name == "conv":  # the norm that reads it took its bias up
                given, asked = quantized.norm(given), mixed.norm(asked)
            assert_close(given.mean(dims), asked.mean(dims), rtol=1e-4, atol=1e-5)
    stored = sum(sum(layer.storage_bits.values()) for layer in report.layers)
    stored += sum(q.storage_bits() for q in quantizers(quantized).values() if q is not None)
    stored += 32 * sum(p.numel() for n, p in quantized.named_parameters() if "input_quantizer" not in n)
    parameters = sum(p.numel() for p in mixed.parameters())
    assert mixed.conv.bias is None
    assert report.model_bits_per_coefficient(quantized) == pytest.approx(stored / parameters)


@pytest.mark.parametrize("overrides", [{}, {"unit": "network", "loss": "l2"}], ids=["block", "network"])
def test_biases_are_not_corrected_for_codes_that_are_learned_later(
    mixed, choice, overrides: dict[str, Any]
) -> None:
    settings = choice("calibration", "default", bias_correction=True)
    with pytest.raises(InputError, match=r"GradientPTQ learns other codes after that.*leave it false"):
        ptq.quantize_model(mixed, [X[:4], X[4:]], "brecq", settings=settings, **overrides)


def test_biases_are_corrected_for_codes_learned_layer_by_layer(mixed, choice) -> None:
    x = X + 0.5
    settings = choice("calibration", "default", bias_correction=True)
    quantized, _ = ptq.quantize_model(mixed, [x], "adaround", bits=2, settings=settings, iterations=20)
    arrived = received(quantized, "linear", [x])
    with torch.no_grad():
        assert_close(quantized.linear(arrived).mean(0), mixed.linear(arrived).mean(0), rtol=1e-4, atol=1e-5)


def test_without_data_only_dynamic_ranges(toy) -> None:
    module, batches = toy
    with pytest.raises(
        InputError, match=r"granularity=tensor takes its ranges from data.*activations=per_token"
    ):
        ptq.quantize_model(module, batches[:1], "rtn", bits="w4a8", settings="none")
    quantized, _ = ptq.quantize_model(
        module, batches[:1], "rtn", bits="w8a8", settings="none", activations="per_token"
    )
    with torch.no_grad():
        assert_close(quantized(batches[0]), module(batches[0]), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"activation": 0}, "bits.activation must be an integer from 1 to 16, or null; got 0"),
        ({"activation": None, "activation_first_last": 8}, "activation_first_last=8 is an exception to"),
        ({"activation_skip": ["hed"]}, "'hed', which the model does not have; did you mean 'head'"),
        ({"activation": 4.5}, "ill-typed value for bits.activation"),
    ],
    ids=["zero", "exception", "name", "fraction"],
)
def test_wrong_widths(toy, choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ptq.quantize_model(*toy, "rtn", bits=choice("bits", "w4a8", **overrides))


def test_positions_need_layers_that_have_them(toy, choice) -> None:
    module, batches = toy
    with pytest.raises(InputError, match=r"layer 'stem'.*no token positions"):
        ptq.quantize_model(module, batches, "rtn", bits="w4a4", activations="per_position")
    bits = choice("bits", "w4a4", activation_skip=["stem"])
    quantized, _ = ptq.quantize_model(module, batches, "rtn", bits=bits, activations="per_position")
    assert quantizers(quantized)["blocks.0.q"].scale.shape == (9, 1)
    with pytest.raises(InputError, match="do not fit"):
        quantized(torch.randn(2, 3, 10, 10))


def test_nan_names_the_layer(toy) -> None:
    module, batches = toy
    batches[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="layer 'stem': NaN or infinity in its inputs"):
        ptq.quantize_model(module, batches, "rtn", bits="w4a8")


def test_trained_scales_lower_the_blocks_loss(toy, choice) -> None:
    module, batches = toy
    off = {"grids": False, "norms": False, "biases": False}
    settings = choice("tuning", "block", epochs=6, batch_size=8, learning_rate=0.01, **off)
    bits = choice("bits", "w8a8", activation=3)
    plain, tuned = (
        ptq.quantize_model(module, batches, "rtn", bits=bits, activations="minmax", tuning=tuning)
        for tuning in ("none", settings)
    )
    plain, (tuned, report) = plain[0], tuned
    assert all(unit.loss_after < unit.loss_before for unit in report.tuning)
    before, after = quantizers(plain)["blocks.0.q"], quantizers(tuned)["blocks.0.q"]
    assert not torch.equal(before.scale, after.scale)
    assert not after.scale.requires_grad
    assert after is quantizers(tuned)["blocks.0.k"]
