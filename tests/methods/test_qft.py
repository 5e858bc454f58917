"""QFT: a fine grid changes nothing, units are free, gradients are right, and integers say the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import ptq
from ptq import checkpoint
from ptq.config import CONF_DIR, build, choices, load_choice
from ptq.distillation import Distance, distance
from ptq.errors import InputError
from ptq.layers import QuantizedLayer
from ptq.methods.qft import QFT
from ptq.models.adapter import ModelAdapter
from ptq.models.networks import CifarResNetModule, DigitsResNetModule, DigitsViTModule
from ptq.plan import trace
from ptq.preparation import folded_graph, rescale
from ptq.rescaled_layers import RescaledLayer
from ptq.resume import Resume, Store
from ptq.runner import run
from ptq.whole_network import NetworkProblem, check_whole
from tests.test_preparation import adapter_of, trained

NAMES = [n for n in choices("method") if isinstance(build(load_choice("method", n)), QFT)]
SHORT = {"epochs": 2, "batch_size": 16}


class Depthwise(nn.Module):
    """A strided stem, a depthwise convolution, a concatenation and a pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, stride=2)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 4, 1, bias=False)
        self.side = nn.Conv2d(6, 3, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depth(torch.relu(self.stem(x))))
        x = torch.cat([torch.relu(self.point(x)), torch.relu(self.side(x))], 1)
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "resnet": lambda: DigitsResNetModule([4, 6], 1, 10),
    "vit": lambda: DigitsViTModule(2, 8, 1, 2, 12, 10),
    "depthwise": Depthwise,
}


def network(name: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    module = trained(NETWORKS[name]())
    return module, list(torch.randn(48, 1, 8, 8).split(16))


def quantized(module: nn.Module, batches: list[Tensor], name: str = "qft", **overrides: Any) -> Any:
    bits = overrides.pop("bits", "w4a8")
    grid = overrides.pop("grid", None)
    return ptq.quantize_model(module, batches, name, grid=grid, bits=bits, **{**SHORT, **overrides})


def problem_of(
    module: nn.Module, batches: list[Tensor], bits: int = 4, activation: int = 8
) -> NetworkProblem:
    adapter = adapter_of(module)
    names = trace(adapter, batches[0]).layers()
    return NetworkProblem(
        adapter=adapter,
        graph=folded_graph(adapter, batches[0]),
        images=torch.cat(batches),
        batch_size=len(batches[0]),
        bits=dict.fromkeys(names, bits),
        activation_bits=dict.fromkeys(names, activation),
        activations=build(load_choice("activations", "default")),
        grid=build(load_choice("grid", "symmetric")),
        start={},
        seed=0,
        progress=False,
        resume=Resume(),
    )


def put(module: nn.Module, layers: dict[str, RescaledLayer]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)


@pytest.mark.parametrize("name", NETWORKS)
def test_sixteen_bits_equal_the_float_network(name: str) -> None:
    module, batches = network(name)
    before = module(batches[0])
    bits = build(load_choice("bits", "w8a8", weight=16, activation=16))
    # Adam's first steps are as long as its rates whatever the gradient: these are of the grid's fineness
    rates = {"learning_rate": 1e-4, "scale_learning_rate": 1e-5}
    student, report = quantized(module, batches, bits=bits, **rates)
    assert float((student(batches[0]) - before).norm() / before.norm()) < 1e-3
    assert report.tuning[0].loss_before < 1e-5
    assert 0 < max(report.tuning[0].losses) < 1e-5  # training does not leave the float network
    assert torch.equal(module(batches[0]), before)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_another_unit_leaves_codes_and_loss_bit_for_bit(choice, name: str) -> None:
    """Section 3 of the arithmetic: scaling a homogeneous channel and its unit cancels exactly."""
    outputs, codes = [], []
    for changed in (False, True):
        module, batches = network(name)
        problem = problem_of(module, batches)
        method = choice("method", "qft")
        units = torch.ones(problem.graph.units)
        layers = method._layers(problem, units)
        if changed:
            generator = torch.Generator().manual_seed(0)
            factors = 2.0 ** torch.randint(-3, 4, (problem.graph.units,), generator=generator)
            factors[0] = 1
            rescale(module, problem.graph, factors)
            scales = next(iter(layers.values())).shared[0]
            scales.log_units -= factors.log2()
            for name_, layer in layers.items():
                W = module.get_submodule(name_).weight
                layer.weight.copy_(W.reshape(layer.weight.shape))
                bias = module.get_submodule(name_).bias
                if bias is not None:
                    layer.bias.copy_(bias)
                if layer.apart:
                    channels = problem.graph.layers[name_]
                    change = factors[channels.inputs] / factors[channels.outputs]
                    layer.sign *= change.reshape(layer.sign.shape)  # its own factor: no unit changes it
        put(module, layers)
        outputs.append(module(batches[0]))
        codes.append([(m.quantized_weight() / m.scale()).round() for m in layers.values()])
    assert torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


@pytest.mark.parametrize("which", ["log_units", "log_steps", "log_right", "weight", "bias"])
def test_gradients_by_finite_differences(choice, which: str) -> None:
    module, batches = network("resnet")
    module.double()
    batches = [b.double() for b in batches]
    problem = problem_of(module.float(), [b.float() for b in batches], bits=3, activation=4)
    method = choice("method", "qft", ranges="min_max", full_range=False)
    layers = method._layers(problem, torch.ones(problem.graph.units))
    put(module, layers)
    module.double()
    scales = next(iter(layers.values())).shared[0].double()
    for layer in layers.values():
        layer.rounds = False
    owner = scales if which in ("log_units", "log_steps") else layers["stages.1.0.conv2"]
    parameter = getattr(owner, which)
    with torch.no_grad():  # away from the kinks, and with some weights clipped
        for layer in layers.values():
            layer.log_right -= 0.37
        scales.log_steps -= 0.21
    parameter.requires_grad_(True)
    weights = torch.randn(10, dtype=torch.float64)

    def loss() -> Tensor:
        return (module(batches[0]) * weights).square().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if which == "log_units":
        direction[0] = 0  # REAL never moves
    if which == "log_steps":
        direction[list(scales.fixed_steps)] = 0
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter += sign * 1e-6 * direction
            values.append(float(loss()))
            parameter -= sign * 1e-6 * direction
    slope = (values[0] - values[1]) / 2e-6
    assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-3, abs=1e-8)
    assert abs(slope) > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("regime", ["scalar", "layer_wise", "channel_wise", "doubly_channel_wise"])
@torch.no_grad()
def test_integers_say_what_fake_quantization_says(choice, name: str, regime: str) -> None:
    module, batches = network(name)
    problem = problem_of(module, batches)
    method = choice("method", "qft", regime=regime, units="ones")
    units = torch.ones(problem.graph.units)
    if method.regime.has_units:
        generator = torch.Generator().manual_seed(0)
        units[1:] = torch.rand(len(units) - 1, generator=generator) + 0.5
    layers = method._layers(problem, units)
    put(module, layers)
    fake = module(batches[0])
    rescale(module, problem.graph, units, done=frozenset(layers))
    for layer_name, layer in layers.items():
        parent, _, child = layer_name.rpartition(".")
        frozen = layer.frozen(32)
        setattr(module.get_submodule(parent), child, frozen)
        assert frozen.input_quantizer is not None
        assert frozen.input_quantizer.scale.numel() == 1
        grid, _ = frozen.grid_and_codes()
        assert (grid.scale.numel() == 1) == method.regime.one_factor
    assert_close(module(batches[0]), fake, rtol=2e-2, atol=2e-2 * float(fake.abs().max()))
    assert float((module(batches[0]) - fake).norm() / fake.norm()) < 5e-3


@pytest.mark.parametrize("regime", ["channel_wise", "doubly_channel_wise"])
@torch.no_grad()
def test_integers_are_as_accurate_as_fake_quantization(choice, regime: str) -> None:
    """On the embedded digits, 8-bit inputs, before any training: within one of 597 images."""
    adapter = build(load_choice("model", "digits_resnet")).load()
    digits = build(load_choice("data", "digits"))
    images, labels = next(iter(DataLoader(digits.dataset("test", adapter.preprocessing), 597)))
    module = adapter.module
    problem = problem_of(module, list(images.split(100)), bits=4)
    method = choice("method", "qft", regime=regime, units="ones")
    layers = method._layers(problem, torch.ones(problem.graph.units))
    put(module, layers)
    fake = module(images).argmax(-1)
    for name, layer in layers.items():
        put(module, {name: layer.frozen(16)})
    integers = module(images).argmax(-1)
    accuracies = [float((found == labels).double().mean()) for found in (fake, integers)]
    assert accuracies[0] > 0.97
    assert abs(accuracies[1] - accuracies[0]) < 1.5 / len(labels)
    assert int((fake != integers).sum()) <= 2


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_loss_after_training_is_that_of_the_integers(name: str) -> None:
    """What the record says of the network in training holds for codes, steps and factors as stored."""
    module, batches = network(name)
    student, report = quantized(
        module, batches, target="logits", bits="w3a8", validation_fraction=0.0, units="equalize", epochs=4
    )
    assert report.tuning[0].kept
    losses = [distance(Distance.relative_l2, student(b), module(b)) for b in batches]
    assert float(sum(losses) / len(losses)) == pytest.approx(report.tuning[0].loss_after, rel=0.05)


def test_a_loss_that_explodes_ends_training_with_the_best(caplog: pytest.LogCaptureFixture) -> None:
    module, batches = network("resnet")
    student, report = quantized(module, batches, rate="absolute", learning_rate=1e30, epochs=5)
    (tuned,) = report.tuning
    assert tuned.steps < 5 * 3
    assert all(math.isfinite(loss) for loss in [*tuned.losses, tuned.loss_before, tuned.loss_after])
    assert tuned.loss_after <= tuned.loss_before
    assert bool(torch.isfinite(student(batches[0])).all())
    assert "no longer finite" in caplog.text


def test_images_that_move_are_compared_with_the_float_network_on_the_same() -> None:
    """At sixteen bits no image makes a difference, however it is moved."""
    module, batches = network("resnet")
    bits = build(load_choice("bits", "w8a8", weight=16, activation=16))
    rates = {"learning_rate": 1e-4, "scale_learning_rate": 1e-5}
    _, report = quantized(module, batches, bits=bits, flip=True, shift=2, **rates)
    assert 0 < max(report.tuning[0].losses) < 1e-5


def test_attention_whose_query_key_and_value_are_one() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x[:, 0])
            return self.head(nn.functional.scaled_dot_product_attention(x, x, x).mean(1))

    torch.manual_seed(0)
    _, report = quantized(Attending().eval(), list(torch.randn(48, 1, 8, 8).split(16)))
    assert [layer.name for layer in report.layers] == ["into", "head"]


@pytest.mark.parametrize("regime", ["layer_wise", "doubly_channel_wise"])
def test_training_lowers_the_loss_and_the_file_holds_all(choice, tmp_path: Path, regime: str) -> None:
    module, batches = network("resnet")
    grid = "symmetric_tensor" if regime == "layer_wise" else None
    units = "equalize_mmse" if regime == "layer_wise" else "alternating"
    student, report = quantized(
        module, batches, bits="w3", regime=regime, units=units, grid=grid, epochs=6, validation_fraction=0.0
    )
    assert report.tuning[0].loss_after < 0.8 * report.tuning[0].loss_before
    assert report.tuning[0].steps == 6 * 3
    layers = {n: m for n, m in student.named_modules() if isinstance(m, QuantizedLayer)}
    assert len(layers) == len(report.layers)
    assert all(0 <= r.clipped_fraction < 0.4 and 0 < r.relative_error < 0.5 for r in report.layers)
    weights = sum(torch.Size(layer.shape).numel() for layer in report.layers)
    stored = sum(8 * t.numel() * t.element_size() for layer in layers.values() for t in layer.packed.values())
    assert stored - 8 * len(layers) <= sum(sum(r.storage_bits.values()) for r in report.layers) <= stored
    assert report.bits_per_coefficient()["total"] == pytest.approx(stored / weights, rel=0.01)
    checkpoint.save(student, tmp_path / "saved")
    restored = checkpoint.load(tmp_path / "saved", DigitsResNetModule([4, 6], 1, 10))
    assert torch.equal(restored(batches[0]), student(batches[0]))


def test_the_same_seed_gives_the_same_network() -> None:
    module, batches = network("resnet")
    first, second = (quantized(module, batches, flip=True, shift=1)[0] for _ in range(2))
    assert torch.equal(first(batches[0]), second(batches[0]))


def test_an_interrupted_training_goes_on(choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = choice("method", "qft", epochs=4, batch_size=16, flip=True)

    def solved(resume: Resume) -> tuple[Tensor, list[float]]:
        module, batches = network("depthwise")
        problem = replace(problem_of(module, batches), resume=resume)
        with torch.no_grad():
            losses = method.quantize_network(problem).tuning.losses
        return module(batches[0]), losses

    def store() -> Resume:
        return Resume(Store(tmp_path / "work", {"job": 1}, 0.0, lambda: 0))

    whole, losses = solved(Resume())
    save = Resume.save

    def interrupted(self: Resume, key: str, state: Any) -> None:
        save(self, key, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Resume, "save", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            solved(store())
    monkeypatch.setattr(Resume, "save", save)
    again, losses_again = solved(store())
    assert losses_again == losses
    assert torch.equal(again, whole)


@pytest.mark.parametrize(("name", "grid"), [("qft", "symmetric"), ("qft_layer_wise", "symmetric_tensor")])
def test_a_start_is_taken_over(name: str, grid: str) -> None:
    module, batches = network("resnet")
    begun, _ = ptq.quantize_model(module, batches, "gptq", grid=grid, bits=4, preparation="fold_batchnorm")
    student, _ = quantized(module, batches, name, grid=grid, bits="w4", start="gptq", units="ones", epochs=0)
    assert_close(student(batches[0]), begun(batches[0]), rtol=1e-3, atol=1e-4)
    scales = [m.grid_and_codes()[0].scale for m in student.modules() if isinstance(m, QuantizedLayer)]
    assert all((scale.numel() == 1) == (grid == "symmetric_tensor") for scale in scales)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-32])
@pytest.mark.parametrize("start", [None, "gptq"])
def test_rows_that_all_but_vanish_are_rows_of_zeros(start: str | None, size: float) -> None:
    """Weight decay leaves dead rows of 1e-40, whose steps underflow in a file's 16 bits."""
    module, batches = network("vit")
    query = module.get_submodule("blocks.0.attn.qkv")
    with torch.no_grad():
        query.weight[2] = size * torch.tensor([1.0, -1.0]).repeat(len(query.weight[2]) // 2)
    student, _ = quantized(module, batches, bits="w2", start=start, units="ones")
    assert bool(torch.isfinite(student(batches[0])).all())
    quantized_query = student.get_submodule("blocks.0.attn.qkv")
    grid, codes = quantized_query.grid_and_codes()
    assert not bool(codes[0, 2].any())
    assert not bool(quantized_query.weight[2].any())
    assert float(grid.scale.max()) < 4 * float(grid.scale[0, 3:].mean())  # steps set the learning rate


@pytest.mark.parametrize("units", ["ones", "equalize", "equalize_mmse", "alternating"])
@pytest.mark.parametrize("name", ["resnet", "depthwise"])
def test_steps_fit_the_weights_whatever_the_units_are(name: str, units: str) -> None:
    """Rows that read one channel (of grey images, depthwise) start near their best steps as the others do."""
    module, batches = network(name)
    problem = problem_of(module, batches, bits=8)
    method = build(load_choice("method", "qft", units=units))
    factors = method._units(problem)
    for layer_name, layer in method._layers(problem, factors).items():
        W = layer.weight.detach()
        error = float((layer.quantized_weight() - W).norm() / W.norm())
        assert error < 0.02, layer_name
        assert layer.clipped_fraction() < 0.02


@pytest.mark.parametrize("start", [None, "gptq"])
def test_mixed_widths_within_the_budget(start: str | None) -> None:
    module, batches = network("resnet")
    bits = build(load_choice("bits", "mixed", candidates=[2, 3, 4, 8], activation=8))
    _, uniform = quantized(module, batches, bits="w3a8")
    student, report = quantized(module, batches, bits=bits, start=start, units="ones")
    facts = report.mixed_precision
    assert facts is not None
    stored, plain = (sum(sum(r.storage_bits.values()) for r in x.layers) for x in (report, uniform))
    assert plain - 6 * 6 * 9 < stored <= plain
    widths = [layer.bits for layer in report.layers]
    assert len(set(widths)) > 1
    for layer in report.layers:
        _, codes = student.get_submodule(layer.name).grid_and_codes()
        assert int(codes.max()) < 2 ** (layer.bits - 1)
    assert all(layer.activation is not None for layer in report.layers)


def test_option_a_shortcuts_share_units() -> None:
    torch.manual_seed(0)
    module = trained(CifarResNetModule(8, 10))
    batches = [torch.randn(8, 3, 16, 16)]
    bits = build(load_choice("bits", "w8a8", weight=16, activation=16))
    student, _ = quantized(module, batches, bits=bits, epochs=0)
    wanted = module(batches[0])
    assert float((student(batches[0]) - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_configurations_work_on_a_small_network(choice, name: str) -> None:
    module, batches = network("resnet")
    _, report = quantized(module, batches, name)
    assert report.tuning[0].loss_after <= report.tuning[0].loss_before
    assert choice("method", name).passes() > 0


def test_a_job_from_config_to_saved_model(tmp_path: Path) -> None:
    overrides = [
        "model=digits_resnet", "method=qft", "method.epochs=1", "bits=w4a8_ends8", "preparation=equalize",
        "calibration.num_samples=64", "eval.num_samples=100", "progress=false", "device=cpu",
        "save_model=true", f"output_dir={tmp_path}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=overrides)
        text = compose(
            "config", overrides=["model=topics_llama", "data=topics", "method=qft", *overrides[8:]]
        )
    record = run(config, {"model": "digits_resnet", "method": "qft"})
    assert record["status"] == "done", record["error"]
    assert record["quantized"]["top1"] > record["float"]["top1"] - 4
    assert [layer["bits"] for layer in record["layers"]][:2] == [8, 4]
    weights = sum(torch.Size(layer["shape"]).numel() for layer in record["layers"])
    assert record["saved_bytes"] * 8 / weights == pytest.approx(
        record["bits_per_coefficient"]["total"], abs=0.01
    )
    restored = checkpoint.load(Path(record["directory"]) / "model")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in restored.modules())
    refused = run(text, {"model": "topics_llama", "method": "qft"})
    assert refused["status"] == "failed"
    assert "is a language model" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epochs": -1}, "epochs and shift of at least 0"),
        ({"learning_rate": 0.0}, "rates must be positive; got learning_rate=0.0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\); got 1.0"),
        ({"distance": "kl"}, "use target=logits"),
        ({"regime": "channel_wise"}, "regime=channel_wise has no units"),
        ({"regime": "layer_wise"}, "use equalize_mmse"),
        ({"start": "gptq"}, "needs units=ones and full_range=true"),
        ({"regime": "both"}, "ill-typed value for method.regime"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_hyperparameters(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("method", "qft", **overrides)


def test_what_cannot_be_done_is_refused_before_work() -> None:
    module, batches = network("depthwise")
    for grid, message in (("affine", "use grid=symmetric"), ("symmetric_tensor", "one scale per channel")):
        with pytest.raises(InputError, match=message):
            quantized(module, batches, grid=grid)
    with pytest.raises(InputError, match=r"no groups of inputs; got bits\.group_size=4"):
        quantized(module, batches, bits=build(load_choice("bits", "w4", group_size=4)))
    with pytest.raises(InputError, match=r"integers from 2 to 16 here; got 2\.5"):
        quantized(module, batches, bits=2.5)
    for changes, message in (
        ({"rounding": "method"}, "rounding=nearest"),
        ({"granularity": "channel"}, "layer"),
    ):
        with pytest.raises(InputError, match=message):
            quantized(module, batches, bits=build(load_choice("bits", "mixed", **changes)))
    per_channel = build(load_choice("activations", "per_channel"))
    with pytest.raises(InputError, match="granularity tensor; got channel"):
        quantized(module, batches, activations=per_channel)
    quantized(module, batches, bits="w4", activations=per_channel, epochs=0)  # not read
    with pytest.raises(InputError, match="tensors of images, all of one size; got also tuple"):
        quantized(module, [(batches[0],)])
    with pytest.raises(InputError, match=r"one size; got also shape \[16, 1, 4, 8\]"):
        quantized(module, [batches[0], batches[0][:, :, :4]])
    with pytest.raises(InputError, match="takes no tuning"):
        ptq.quantize_model(module, batches, "qft", bits=4, tuning="network")
    with pytest.raises(InputError, match="needs calibration data"):
        ptq.quantize_model(module, batches, "qft", bits=4, settings="none")
    with pytest.raises(InputError, match="quantizes whole networks: use quantize_model"):
        ptq.quantize_layer(torch.ones(2, 2), torch.eye(2), "qft")
    with pytest.raises(InputError, match="leaves none of 48 images"):
        quantized(module, batches, validation_fraction=0.999)
    text: dict[str, Any] = {"name": "text", "module": module, "task": "language_modeling"}
    with pytest.raises(InputError, match="'text' is a language model"):
        check_whole(ModelAdapter(**text, forward=nn.Module.__call__), load_bits(), None, None, None)


def load_bits() -> Any:
    return build(load_choice("bits", "w4"))
