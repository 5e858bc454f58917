"""Language models: the embedded one, and folders that transformers loads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ptq.config import build, choices, companion, load_choice
from ptq.errors import InputError
from ptq.evaluation import Evaluation
from ptq.models.language import ByteTokenizer, CausalLM, TopicsLlama

CHANGED = "model.layers.0.mlp.up_proj.weight"


def causal_lm(path: Path | str, **changes: Any) -> CausalLM:
    fields: dict[str, Any] = {
        "path": str(path),
        "context_length": None,
        "dtype": "float32",
        "attention": "sdpa",
        "skip_output_head": True,
    }
    return CausalLM(**fields | changes)


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A one-layer LLaMA with tied embeddings and context 24."""
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return save(tmp_path / "tiny", LlamaForCausalLM(config))


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def embedded(**changes: Any) -> TopicsLlama:
    return build(load_choice("model", "topics_llama", **changes))


def test_bytes_come_back() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve – text")
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == "naïve – text"
    assert tokenizer.decode([255]) == "\N{REPLACEMENT CHARACTER}"


def test_embedded_model_is_whole() -> None:
    adapter = embedded().load()
    assert adapter.task == "language_modeling"
    assert not adapter.module.training
    assert all(p.dtype == torch.float32 for p in adapter.module.parameters())
    assert len(adapter.blocks()) == 4
    assert len(adapter.quantizable()) == 4 * 7 + 1
    assert list(adapter.skip) == ["lm_head"]
    ids = torch.tensor([adapter.tokenizer.encode("statement")])
    assert adapter.forward(adapter.module, ids).shape == (1, 9, 256)
    assert embedded(skip_output_head=False).load().skip == {}


def test_embedded_model_beats_the_unigram_model_threefold() -> None:
    adapter = embedded().load()
    data = build(load_choice("data", "topics"))
    evaluation: Evaluation = build(load_choice("eval", "default"))
    result = evaluation.run(adapter, adapter.module, data, "cpu", progress=False)
    (train,), (test,) = (data.tokens(split, adapter.tokenizer) for split in ("train", "test"))
    counts = torch.bincount(train, minlength=256).double() + 1
    unigram = (counts / counts.sum()).log()[test].mean().neg().exp().item()
    assert unigram > 3 * result["perplexity"]
    assert result["perplexity"] < 4


def test_loading_leaves_the_global_random_state(folder: Path) -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # its stub says tuple or dict
    embedded().load()
    causal_lm(folder, skip_output_head=False).load()
    torch.testing.assert_close(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]  # type: ignore[index]  # its stub says tuple or dict


def test_embedded_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"missing: lm_head\.weight.*extra: x"):
        embedded(checkpoint=str(tmp_path / "x.safetensors")).load()
    with pytest.raises(InputError, match="checkpoint not found"):
        embedded(checkpoint=str(tmp_path / "absent.safetensors")).load()


def test_folder_loads_as_saved(folder: Path) -> None:
    adapter = causal_lm(folder).load()
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapter.forward(adapter.module, ids), reference(input_ids=ids).logits)
    assert adapter.context_length == 24
    assert adapter.skip.keys() == {"lm_head"}
    assert not adapter.module.training
    assert adapter.module.config.use_cache is False
    assert adapter.tokenizer.encode("a") == [1]


def test_relative_folder_lies_under_the_data_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQ_DATA", str(folder.parent))
    assert causal_lm("tiny").load().source == folder


def test_head_to_quantize_gets_a_weight_of_its_own(folder: Path) -> None:
    tied = causal_lm(folder).load().module
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    adapter = causal_lm(folder, skip_output_head=False).load()
    head, embedding = adapter.module.lm_head.weight, adapter.module.model.embed_tokens.weight
    assert adapter.skip == {}
    assert head.data_ptr() != embedding.data_ptr()
    torch.testing.assert_close(head, embedding)


def test_other_architecture_and_dtype(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    folder = save(tmp_path / "gpt2", GPT2LMHeadModel(config))
    adapter = causal_lm(folder, dtype="bfloat16", attention="eager").load()
    assert adapter.context_length == 16
    assert adapter.blocks() == ["transformer.h.0", "transformer.h.1"]
    assert {p.dtype for p in adapter.module.parameters()} == {torch.bfloat16}


def test_every_misfit_is_named(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["stray.weight"] = torch.zeros(2)
        del state["model.norm.weight"]
        state[CHANGED] = torch.zeros(5, 8)

    change_weights(folder, change)
    with pytest.raises(InputError, match="does not fit") as raised:
        causal_lm(folder).load()
    for part in (
        "missing: model.norm.weight",
        "extra: stray.weight",
        f"{CHANGED} is [5, 8], expected [12, 8]",
    ):
        assert part in str(raised.value)


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    change_weights(folder, lambda state: state[CHANGED].fill_(float("nan")))
    with pytest.raises(InputError, match=f"NaN or infinity in: {CHANGED}"):
        causal_lm(folder).load()


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="never unpickles"):
        causal_lm(folder).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"context_length": 25}, "at most the 24 tokens .* got 25", id="context-too-long"),
        pytest.param({"context_length": 1}, "at least 2 .* got 1", id="context-too-short"),
        pytest.param({"dtype": "float23"}, "unknown dtype 'float23'.*did you mean 'float32'", id="dtype"),
        pytest.param({"attention": "flash"}, "eager or sdpa; got 'flash'", id="attention"),
    ],
)
def test_wrong_fields_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        causal_lm(folder, **changes).load()


def test_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent has no config\.json"):
        causal_lm(tmp_path / "absent").load()


def test_unreachable_hub_says_what_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no connection\nat all")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    monkeypatch.setenv("PTQ_DATA", str(tmp_path))
    with pytest.raises(
        InputError, match=f"'some/model'.* looked in {tmp_path}.*hub.*cache.*no connection\\).*hf download"
    ):
        causal_lm("some/model").load()
    monkeypatch.delenv("PTQ_DATA")
    with pytest.raises(InputError, match="PTQ_DATA is unset"):
        causal_lm("some/model").load()


@pytest.mark.parametrize("name", choices("model"))
def test_default_data_exists(name: str) -> None:
    assert companion("model", name, "data") in choices("data")
