"""The walk over a model: order, sharing, chaining, what each layer sees, and what is left out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ptq
from ptq.errors import InputError
from ptq.layers import QuantizedLayer
from ptq.models.adapter import ModelAdapter
from ptq.plan import trace
from ptq.problem import LayerProblem


class Block(nn.Module):
    """Attention-like: three projections of one input, then one of their sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return x + gain * self.out(torch.tanh(self.q(x) + self.k(x) * self.v(x)))


class Toy(nn.Module):
    """A stem, an in-place activation, chained blocks, a broken chain, a layer never called, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.unused = nn.Linear(8, 8)
        self.table = nn.Embedding(4, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.stem(x)).flatten(2).transpose(1, 2)
        x = self.blocks[1](self.blocks[0](x))
        x = self.blocks[2](x * 0.5, gain=2.0)
        return self.head(x.mean(1))


@pytest.fixture
def toy() -> tuple[Toy, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy().eval(), list(torch.randn(24, 3, 6, 6).split(8))


def adapter(module: nn.Module) -> ModelAdapter:
    return ModelAdapter(name="toy", module=module, task="any", forward=lambda m, x: m(x))


def test_plan(toy) -> None:
    module, batches = toy
    plan = trace(adapter(module), batches[0])
    assert [u.name for u in plan.units] == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert [u.chained for u in plan.units] == [False, False, True, False, False]
    assert plan.units[1].stages == [["blocks.0.q", "blocks.0.k", "blocks.0.v"], ["blocks.0.out"]]
    assert (plan.first, plan.last, plan.unreached) == (["stem"], ["head"], ["unused"])


class Recorder:
    """A method that rounds and keeps every problem it was given."""

    needs_gram = True

    def __init__(self) -> None:
        self.problems: dict[str, LayerProblem] = {}

    def quantize_layer(self, problem, grid, bits, group_size):
        self.problems[problem.name] = problem
        fitted = grid.fit(problem.T, bits, group_size, problem.H)
        return fitted.round(problem.T), fitted


def layer_inputs(module: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """All inputs of a layer over whole forward passes, [tokens, in] float64."""
    seen: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    with torch.no_grad():
        for batch in batches:
            module(batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("case", ["float", "quantized", "float_path"])
def test_each_layer_sees_what_the_settings_say(toy, choice, case: str, sequential: bool) -> None:
    module, batches = toy
    overrides = (
        {"inputs": "float"} if case == "float" else {"target": "float_path"} if case == "float_path" else {}
    )
    settings = choice("calibration", "default", sequential=sequential, target_damping=0.01, **overrides)
    recorder = Recorder()
    quantized, _ = ptq.quantize_model(module, batches, recorder, "affine", 2, settings=settings)
    # first stages: the same for either `sequential`
    for name in ("blocks.0.q", "blocks.1.k", "blocks.2.q", "head"):
        X_float = layer_inputs(module, name, batches)
        # the layer's own weights do not change its input, so the finished model shows what it saw
        X = X_float if case == "float" else layer_inputs(quantized, name, batches)
        problem = recorder.problems[name]
        H = X.T @ X / len(X)
        assert_close(problem.H[0], H, rtol=1e-4, atol=1e-6)
        C = X_float.T @ X / len(X) if case == "float_path" else None
        assert_close(
            problem.T,
            LayerProblem(name, problem.W, H[None], None if C is None else C[None]).T,
            rtol=1e-3,
            atol=1e-4,
        )
    X = layer_inputs(quantized, "blocks.1.out", batches)
    close = bool(
        torch.isclose(recorder.problems["blocks.1.out"].H[0], X.T @ X / len(X), rtol=1e-4, atol=1e-6).all()
    )
    assert close == (sequential and case != "float")


def test_the_model_given_is_left_alone_and_every_weight_is_accounted_for(toy) -> None:
    module, batches = toy
    before = copy.deepcopy(module.state_dict())
    quantized, report = ptq.quantize_model(module, batches, "rtn", bits=3, skip=["blocks.1.*"])
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    assert [layer.name for layer in report.layers][:2] == ["stem", "blocks.0.q"]
    reasons = {s["name"]: s["reason"] for s in report.skipped}
    assert "never called" in reasons["unused.weight"]
    assert "Embedding" in reasons["table.weight"]
    assert reasons["blocks.1.q.weight"] == "left out by bits.skip"
    assert isinstance(quantized.head, QuantizedLayer)
    assert isinstance(quantized.blocks[1].q, nn.Linear)
    names = {layer.name for layer in report.layers} | {n.removesuffix(".weight") for n in reasons}
    assert names == {n for n, m in module.named_modules() if hasattr(m, "weight")}


def test_a_layer_used_twice_counts_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    module, recorder = Twice().eval(), Recorder()
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    ptq.quantize_model(module, [x], recorder, "affine", 4)
    X = layer_inputs(module, "layer", [x])
    assert len(X) == 100
    assert_close(recorder.problems["layer"].H[0], X.T @ X / 100, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["weight", "input"])
def test_nan_names_the_layer(toy, where: str) -> None:
    module, batches = toy
    if where == "weight":
        module.blocks[2].k.weight.data[0, 0] = float("inf")
        expected = "blocks.2.k.weight"
    else:
        batches[1][0, 0, 0, 0] = float("nan")
        expected = "stem"
    with pytest.raises(InputError, match=f"(?s){expected}|'{expected}'.*NaN"):
        ptq.quantize_model(module, batches, "gptq", bits=4)


def test_first_and_last_layers(toy, choice) -> None:
    module, batches = toy
    _, report = ptq.quantize_model(module, batches, "rtn", bits=choice("bits", "w2", first_last=8))
    assert {layer.name: layer.bits for layer in report.layers if layer.bits == 8} == {"stem": 8, "head": 8}


@pytest.mark.parametrize("name", ["rtn", "gptq", "comq"])
def test_same_seed_same_bits_and_the_users_generator_is_untouched(toy, name: str) -> None:
    module, batches = toy
    state = torch.random.get_rng_state()
    outputs = [ptq.quantize_model(module, batches, name, bits=2)[0](batches[0]) for _ in range(2)]
    assert torch.equal(*outputs)
    assert torch.equal(state, torch.random.get_rng_state())


def test_calibration_none_serves_rtn_only(toy) -> None:
    module, batches = toy
    ptq.quantize_model(module, batches[:1], "rtn", bits=4, settings="none")
    with pytest.raises(InputError, match="GPTQ needs calibration data"):
        ptq.quantize_model(module, batches[:1], "gptq", bits=4, settings="none")
    with pytest.raises(InputError, match="empty"):
        ptq.quantize_model(module, [], "rtn", bits=4)


def test_names_in_bits_must_exist(toy, choice) -> None:
    module, batches = toy
    with pytest.raises(InputError, match=r"'blocks.0.qq'.*did you mean 'blocks.0.q'"):
        ptq.quantize_model(module, batches, "rtn", bits=choice("bits", "w4", skip=["blocks.0.qq"]))
    with pytest.raises(InputError, match=r"unknown bits 'w_3'.*did you mean 'w3'"):
        ptq.quantize_model(module, batches, "rtn", bits="w_3")


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no Linear, Conv2d or Conv1D"):
        ptq.quantize_model(nn.Sequential(nn.ReLU()), [torch.ones(2, 3)], "rtn", bits=4)


class Standardised(nn.Linear):
    """A layer that computes more than the class it derives from."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


def test_layers_with_a_forward_of_their_own_stay_float() -> None:
    module = nn.Sequential(Standardised(4, 4), nn.Linear(4, 2))
    quantized, report = ptq.quantize_model(module, [torch.ones(3, 4)], "rtn", bits=4)
    assert [layer.name for layer in report.layers] == ["1"]
    assert "computes more" in report.skipped[0]["reason"]
    assert isinstance(quantized[0], Standardised)


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    quantized, report = ptq.quantize_model(Tied(), [torch.ones(3, 4)], "rtn", bits=4)
    assert quantized.a is quantized.b
    assert isinstance(quantized.b, QuantizedLayer)
    assert len(report.layers) == 1


def test_models_of_transformers_with_a_cache_and_tokenizer_batches() -> None:
    from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=17,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            attn_implementation="eager",
        )
        model = LlamaForCausalLM(config).eval()
    assert model.config.use_cache
    ids = torch.arange(16).reshape(2, 8)
    batches = [BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for _ in range(2)]
    quantized, report = ptq.quantize_model(model, batches, "gptq", bits=8, settings="float_path")
    assert quantized.config.use_cache
    assert len(report.layers) == 15
    with torch.no_grad():
        expected = model(ids).logits
        difference = (quantized(ids).logits - expected).abs().max()
    assert float(difference) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("model", "calibration", "message"),
    [
        (nn.Linear(2, 2), [torch.ones(3, 2)], "bare Linear: wrap it"),
        (nn.Sequential(nn.Linear(2, 2)), torch.ones(3, 2), "not one Tensor"),
    ],
    ids=["bare layer", "tensor"],
)
def test_calls_that_would_go_wrong_quietly(model: nn.Module, calibration, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ptq.quantize_model(model, calibration, "rtn", bits=4)
