"""Embeddings as layers: the problem they pose, their files, what their ids are spared, shared matrices,
and that nothing changes where nobody asks.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ptq
from ptq import resume, walk
from ptq.block_calls import Float32
from ptq.checkpoint import file_bytes, quantized_bytes
from ptq.config import build, load_choice
from ptq.errors import InputError
from ptq.importance import FloatNetwork, Score, costs
from ptq.layers import QuantizedLayer
from ptq.models.adapter import ModelAdapter
from ptq.pipeline import quantize
from ptq.plan import check_layers
from ptq.rate_allocation import _Statistics
from ptq.records import config_hash
from ptq.report import Report
from ptq.resume import Resume, Store
from ptq.runner import run
from tests.models.test_language import causal_lm, embedded, save
from tests.test_pipeline import Recorder
from tests.test_runner import config

VOCABULARY, TABLE = 37, "model.embed_tokens"
REST = ["model.layers.*", "lm_head"]


def llama(tied: bool = False) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=24,
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
        ).eval()


IDS = torch.randint(VOCABULARY - 5, (8, 20), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": ids} for ids in IDS.split(4)]


@torch.no_grad()
def outputs(module: nn.Module) -> Tensor:
    return module(input_ids=IDS).logits


def quantized(module: nn.Module, *args: Any, **settings: Any) -> tuple[Any, Report]:
    return ptq.quantize_model(module, BATCHES, *args, embeddings=True, **settings)


KINDS = [
    pytest.param({"method": "gptq", "bits": 4}, id="affine"),
    pytest.param({"method": "comq", "bits": "w3g32", "group_size": 8}, id="groups"),
    pytest.param({"method": "watersic", "grid": "entropy", "bits": 2.5}, id="entropy"),
    pytest.param({"method": "rtn", "bits": "w4a8"}, id="w4a8"),
]


@pytest.mark.parametrize("settings", KINDS)
def test_saved_is_loaded_to_the_bit_and_the_file_is_what_was_counted(settings, tmp_path: Path) -> None:
    module, report = quantized(llama(), **settings)
    assert isinstance(module.model.embed_tokens, QuantizedLayer)
    assert report.layers[0].name == TABLE
    assert report.layers[0].shape == [1, VOCABULARY, 16]
    assert TABLE not in {each["name"].removesuffix(".weight") for each in report.skipped}
    ptq.save(module, tmp_path / "model")
    loaded = ptq.load(tmp_path / "model", llama())
    assert torch.equal(outputs(loaded), outputs(module))
    weights = sum(torch.Size(layer.shape).numel() for layer in report.layers)
    assert weights == VOCABULARY * 16 * 2 + 2 * (4 * 16 * 16 + 3 * 16 * 24)
    tensors = sum(len(m.packed) for m in module.modules() if isinstance(m, QuantizedLayer))
    counted = report.bits_per_coefficient()["total"] * weights / 8
    assert counted - 1e-6 <= quantized_bytes(tmp_path / "model") <= counted + tensors
    size = (tmp_path / "model" / "quantized.safetensors").stat().st_size
    assert size == file_bytes(module)


@pytest.mark.parametrize("settings", KINDS)
def test_rows_are_those_of_the_dequantized_table(settings) -> None:
    module, report = quantized(llama(), **settings)
    plain = copy.deepcopy(module)
    plain.model.embed_tokens = nn.Embedding.from_pretrained(module.model.embed_tokens.weight)
    assert torch.equal(outputs(plain), outputs(module))
    W, W_hat = llama().model.embed_tokens.weight.detach(), module.model.embed_tokens.weight
    assert not torch.equal(W, W_hat)
    error = float((W - W_hat).norm() / W.norm())
    assert report.layers[0].relative_error == pytest.approx(error, rel=1e-3)
    assert error < 0.25


@pytest.mark.parametrize("target", ["layer", "float_path"])
def test_the_problem_is_the_table_itself(choice, target: str) -> None:
    recorder = Recorder()
    quantized(llama(), recorder, "affine", 2, settings=choice("calibration", "default", target=target))
    problem = recorder.problems[TABLE]
    W = llama().model.embed_tokens.weight.detach()
    assert torch.equal(problem.H[0], torch.eye(16, dtype=torch.float64))
    assert torch.equal(problem.T[0], W)
    assert torch.equal(problem.W[0], W)


def test_error_feedback_has_nothing_to_feed_back() -> None:
    feedback, _ = quantized(llama(), "gptq_paper", "affine", 3)
    nearest, _ = quantized(llama(), "rtn", "affine", 3)
    assert torch.equal(feedback.model.embed_tokens.weight, nearest.model.embed_tokens.weight)
    assert not torch.equal(feedback.lm_head.weight, nearest.lm_head.weight)


def test_without_calibration_data() -> None:
    module, _ = quantized(llama(), "rtn", bits=3)
    same, _ = quantized(llama(), "rtn", bits=3, settings="none")
    assert torch.equal(outputs(same), outputs(module))


def test_ids_are_never_rounded_and_bias_correction_passes_by(choice) -> None:
    settings = choice("calibration", "default", bias_correction=True)
    module, report = quantized(llama(), "rtn", bits="w4a8", settings=settings)
    layers = {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLayer)}
    assert {n for n, m in layers.items() if m.input_quantizer is None} == {TABLE}
    assert {n for n, m in layers.items() if m.bias is None} == {TABLE}
    assert report.layers[0].activation is None
    assert all(layer.activation is not None for layer in report.layers[1:])


def test_nobody_asks_nothing_changes() -> None:
    module, report = ptq.quantize_model(llama(), BATCHES, "rtn", bits=3)
    assert torch.equal(module.model.embed_tokens.weight, llama().model.embed_tokens.weight)
    (reason,) = (each["reason"] for each in report.skipped if each["name"] == f"{TABLE}.weight")
    assert "not a Linear, Conv2d or Conv1D weight" in reason
    assert "embeddings=True" in reason
    base = {"model": {"path": "x", "skip_embeddings": True}, "seed": 0}
    assert config_hash(base) == config_hash({"model": {"path": "x"}, "seed": 0})
    assert config_hash(base) != config_hash({"model": {"path": "x", "skip_embeddings": False}, "seed": 0})
    for name in ("topics_llama", "stories260k"):
        node = load_choice("model", name)
        assert node.skip_embeddings is True
        del node["skip_embeddings"]  # as models saved before the key have it
        assert build(node).skip_embeddings


def bits(**changes: Any) -> Any:
    return build(load_choice("bits", "w4", **changes))


def test_widths_by_name_and_place() -> None:
    _, report = quantized(llama(), "rtn", bits=bits(layers={"*.embed_tokens": 2}))
    assert [layer.bits for layer in report.layers[:2]] == [2, 4]
    _, report = quantized(llama(), "rtn", bits="w4_ends8")
    assert [layer.bits for layer in report.layers][::14] == [8, 4]
    assert {layer.name for layer in report.layers if layer.bits == 8} == {TABLE, "lm_head"}
    module, report = quantized(llama(), "rtn", bits=bits(skip=["*embed*"]))
    assert isinstance(module.model.embed_tokens, nn.Embedding)
    assert "left out by bits.skip" in {each["reason"] for each in report.skipped}
    with pytest.raises(InputError, match=r"embed_tokens', an embedding.*model\.skip_embeddings=false"):
        ptq.quantize_model(llama(), BATCHES, "rtn", bits=bits(layers={TABLE: 2}))


@pytest.mark.parametrize("method", ["brecq", "qdrop", "autoround"])
def test_block_methods_train_the_table_as_a_unit(method: str) -> None:
    module, report = quantized(llama(), method, bits="w3a8", iterations=40)
    assert [unit.unit for unit in report.tuning] == [TABLE, "model.layers.0", "model.layers.1", "lm_head"]
    assert report.tuning[0].steps == 40
    assert isinstance(module.model.embed_tokens, QuantizedLayer)
    W, W_hat = llama().model.embed_tokens.weight.detach(), module.model.embed_tokens.weight
    assert float((W - W_hat).norm() / W.norm()) < 0.25


def test_codes_stay_while_tuning_trains_the_scales() -> None:
    start, _ = quantized(llama(), "rtn", bits=3)
    adapter = ModelAdapter(
        name="llama",
        module=llama(),
        task="language_modeling",
        forward=lambda m, x: m(input_ids=x).logits,
        embeddings=True,
    )
    parts = {
        "method": build(load_choice("method", "rtn")),
        "grid": build(load_choice("grid", "affine")),
        "calibration": build(load_choice("calibration", "default")),
        "tuning": build(load_choice("tuning", "network", epochs=2, batch_size=4)),
    }
    quantize(adapter, list(IDS.split(4)), bits=bits(weight=3), **parts)
    before, after = start.model.embed_tokens, adapter.module.model.embed_tokens
    assert torch.equal(before.grid_and_codes()[1], after.grid_and_codes()[1])
    assert not torch.equal(before.weight, after.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_tables_and_types(dtype: torch.dtype, tmp_path: Path) -> None:
    def gpt2() -> GPT2LMHeadModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
            ends = {"bos_token_id": None, "eos_token_id": None}
            return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ends)).eval().to(dtype)

    module, report = quantized(gpt2(), "rtn", bits=4, skip=["lm_head"])
    assert [layer.name for layer in report.layers[:2]] == ["transformer.wte", "transformer.wpe"]
    assert module.transformer.wpe(torch.arange(3)).dtype == dtype
    ptq.save(module, tmp_path / "model")
    loaded = ptq.load(tmp_path / "model", gpt2())
    assert torch.equal(outputs(loaded), outputs(module))
    assert outputs(loaded).dtype == dtype
    with Float32(module):
        assert module.transformer.wte(torch.arange(3)).dtype == torch.float32
    assert module.transformer.wte(torch.arange(3)).dtype == dtype
    scales = copy.deepcopy(module.transformer.wte.packed)
    module.half()
    assert outputs(module).dtype == torch.float16
    assert all(torch.equal(t, scales[name]) for name, t in module.transformer.wte.packed.items())


def test_what_does_more_than_look_up_stays_float() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 3 * super().forward(ids)

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.scaled = nn.Embedding(9, 6), Scaled(9, 6)
            self.limited = nn.Embedding(9, 6, max_norm=1.0)

        def forward(self, ids: Tensor) -> Tensor:
            return self.plain(ids) + self.scaled(ids) + self.limited(ids)

    ids = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
    _, report = ptq.quantize_model(Three(), [ids], "rtn", embeddings=True)
    assert [layer.name for layer in report.layers] == ["plain"]
    reasons = {each["name"]: each["reason"] for each in report.skipped}
    assert reasons.keys() == {"scaled.weight", "limited.weight"}
    assert all("computes more" in reason for reason in reasons.values())


def test_a_shared_matrix_is_not_quantized_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'model\.embed_tokens' and 'lm_head' share one weight.*bits\.skip"):
        quantized(llama(tied=True), "rtn")
    module, report = quantized(llama(tied=True), "rtn", bits=4, skip=["lm_head"])
    assert torch.equal(module.lm_head.weight, llama(tied=True).lm_head.weight)
    assert {each["name"] for each in report.skipped} == {"lm_head.weight"}
    parameters = sum(p.numel() for p in llama(tied=True).parameters())  # the shared matrix once
    rest = parameters - report.weights() + VOCABULARY * 16
    stored = report.bits_per_coefficient()["total"] * report.weights() + 32 * rest
    assert report.model_bits_per_coefficient(module) == pytest.approx(stored / parameters, rel=1e-9)
    ptq.save(module, tmp_path / "model")
    assert torch.equal(outputs(ptq.load(tmp_path / "model", llama(tied=True))), outputs(module))
    module, report = quantized(llama(tied=True), "rtn", bits=4, skip=[TABLE])
    assert torch.equal(module.model.embed_tokens.weight, llama(tied=True).lm_head.weight)
    assert {each["name"] for each in report.skipped} == {f"{TABLE}.weight"}


def test_the_option_of_language_models(tmp_path: Path) -> None:
    folder = save(tmp_path / "tiny", llama(tied=True))
    adapter = causal_lm(folder, skip_embeddings=False).load()
    assert TABLE in adapter.quantizable()
    assert adapter.module.lm_head.weight is not adapter.module.model.embed_tokens.weight
    assert adapter.copied == VOCABULARY * 16
    assert embedded(skip_embeddings=False).load().copied == causal_lm(folder).load().copied == 0
    assert TABLE not in causal_lm(folder).load().quantizable()
    assert len(embedded(skip_embeddings=False).load().quantizable()) == 4 * 7 + 2
    both = causal_lm(folder, skip_embeddings=False, skip_output_head=False).load()
    with pytest.raises(InputError, match=r"share one weight.*model\.skip_output_head=true"):
        check_layers(both, bits())
    check_layers(both, bits(skip=["lm_head"]))


def test_dry_run_and_record_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["eval.num_samples=4", "calibration.num_samples=4", "calibration.sequence_length=64"]
    wanted = ["model.skip_embeddings=false", "bits=w3g32", "method=gptq", "save_model=true"]
    job = ["model=topics_llama", *small, *wanted]
    run(config(tmp_path, *job, "dry_run=true"), {"model": "topics_llama"})
    said = capsys.readouterr().out
    record = run(config(tmp_path, *job), {"model": "topics_llama"})
    assert record["status"] == "done", record["error"]
    total = record["bits_per_coefficient"]["total"]
    assert f"quantized: {len(record['layers'])} layers" in said
    assert f"{total:.4f} bits per coefficient" in said
    (line,) = [one.split() for one in said.splitlines() if one.startswith(f"{TABLE} ")]
    assert line[1:] == ["1", "×", "256", "×", "128", "3", "float", f"{line[-1]}"]
    table = record["layers"][0]
    assert float(line[-1]) == pytest.approx(table["bits_per_coefficient"], abs=1e-4)
    assert [each["name"] for each in record["skipped_layers"]] == ["lm_head.weight"]
    weights = sum(torch.Size(layer["shape"]).numel() for layer in record["layers"])
    assert record["saved_bytes"] * 8 / weights == pytest.approx(total, abs=0.01)
    parameters = 857_216
    stored = total * weights + 32 * (parameters - weights)
    assert record["model_bits_per_coefficient"] == pytest.approx(stored / parameters, rel=1e-9)
    loaded = ptq.load(Path(record["directory"]) / "model")
    assert isinstance(loaded.model.embed_tokens, QuantizedLayer)


def test_methods_on_graphs_refuse_tables() -> None:
    adapter, ids = lookup()
    with pytest.raises(InputError, match=r"'table' is an embedding.*layer-wise method"):
        ptq.quantize_model(adapter.module, [ids], "qft", embeddings=True)


def test_an_interrupted_job_goes_on_with_its_table(choice, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resume, "SHARE", 1e9)

    def job(place: Resume) -> nn.Module:
        adapter, ids = lookup()
        names = {"method": "brecq", "grid": "affine", "bits": "w3", "calibration": "default"}
        changes = {"method": {"iterations": 30}}
        parts = {group: choice(group, name, **changes.get(group, {})) for group, name in names.items()}
        quantize(adapter, list(ids.split(32)), **parts, resume=place)
        return adapter.module

    whole = job(Resume())
    job(Resume(Store(tmp_path, {"job": 1}, 0.0, lambda: 7)))
    again = Store(tmp_path, {"job": 1}, 0.0, lambda: 7)
    assert again.spent.runs == 1
    monkeypatch.setattr(walk, "quantize_to_rate", None)  # nothing is left to solve
    resumed = job(Resume(again))
    ids = torch.arange(11)[None]
    assert torch.equal(resumed(ids), whole(ids))


class Lookup(nn.Module):
    """A table and a head that sees each of its rows by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def lookup() -> tuple[ModelAdapter, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Lookup().eval()
    adapter = ModelAdapter(
        name="lookup", module=module, task="any", forward=lambda m, x: m(x), embeddings=True
    )
    return adapter, torch.randint(7, (64, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("score", list(Score), ids=lambda s: s.value)
def test_scores_of_rows(score: Score) -> None:
    adapter, ids = lookup()
    network = FloatNetwork(
        adapter=adapter, module=adapter.module, batches=list(ids.split(32)), positions_per_image=None, seed=0
    )
    spec = build(load_choice("grid", "affine"))

    def nearest(problem: Any, width: float) -> Any:
        grid = spec.fit(problem.W, width)
        return grid.round(problem.W), grid

    cost = costs(score, network, ["table", "head"], [2, 4], nearest, needs_gram=True)["table"]
    assert cost.shape == (2, 1, 11)
    assert cost[0].sum() > cost[1].sum() > 0
    by_loss = (Score.taylor, Score.integrated_gradient, Score.fisher, Score.output_fisher)
    if score in by_loss:  # ids 7 to 10 never occur
        assert (cost[0, 0, :7] > 0).all()
        assert (cost[0, 0, 7:] == 0).all()


def test_gradients_of_rows_add_up_within_a_sample() -> None:
    adapter, ids = lookup()
    table = adapter.module.table
    statistics = _Statistics(table)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    received: list[Tensor] = []
    X = statistics.add_inputs(ids)
    output = table(ids)
    (gradient,) = torch.autograd.grad(adapter.module.head(torch.tanh(output)).square().sum(), output)
    statistics.add_gradients(X, gradient)
    for sample in ids:
        loss = adapter.module(sample[None]).square().sum()
        (G,) = torch.autograd.grad(loss, table.weight)
        received.append(G)
        expected += (G.T @ G).double()
    assert statistics.F is not None
    assert_close(statistics.F[0], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(statistics.gram()[0], torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("allocation", ["layer_error", "network_loss"])
def test_one_budget_over_table_and_layers(choice, allocation: str) -> None:
    adapter, ids = lookup()
    grid = choice("grid", "entropy_budget", allocation=allocation)
    _, report = ptq.quantize_model(
        adapter.module, [ids], "watersic", grid, 3, embeddings=True, settings=choice("calibration", "default")
    )
    assert [layer.name for layer in report.layers] == ["table", "head"]
    assert report.bits_per_coefficient()["total"] == pytest.approx(3, abs=0.3)


def test_mixed_precision_over_table_and_layers() -> None:
    adapter, ids = lookup()
    widths = build(load_choice("bits", "mixed", budget=13.0, granularity="channel"))
    module, report = ptq.quantize_model(
        adapter.module, list(ids.split(32)), "rtn", bits=widths, embeddings=True, skip=()
    )
    assert 10 < report.bits_per_coefficient()["total"] <= 13
    facts = report.mixed_precision
    assert facts is not None
    assert facts["rows"].keys() == {"table", "head"}
    assert sum(facts["rows"]["table"]) == 11
    assert isinstance(module.table, QuantizedLayer)
