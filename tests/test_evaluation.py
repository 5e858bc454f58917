"""Accuracy and perplexity on cases worked by hand."""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from ptq.config import build, companion, load_choice
from ptq.errors import InputError
from ptq.evaluation import Evaluation
from ptq.models.adapter import ModelAdapter

VOCABULARY = 7


class Streams:
    """Text data of given tokens."""

    task = "language_modeling"

    def __init__(self, *streams: list[int], per_document: bool = False) -> None:
        self.streams = [torch.tensor(stream) for stream in streams]
        self.per_document = per_document

    def tokens(self, split: str, tokenizer: Any) -> list[Tensor]:
        assert split == "test"
        return self.streams


class Images:
    """Image data whose pixels are the logits."""

    task: ClassVar[str] = "classification"

    def __init__(self, logits: list[list[float]], labels: list[int]) -> None:
        self.items = TensorDataset(torch.tensor(logits), torch.tensor(labels))

    def dataset(
        self, split: str, preprocessing: Any, seed: int = 0, num_samples: int | None = None
    ) -> Dataset:
        assert split == "test"
        return self.items if num_samples is None else Subset(self.items, range(num_samples))


class Bigram(nn.Module):
    """Logits of the next token from the last one alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)  # [vocabulary, vocabulary]

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class WindowMean(nn.Module):
    """Logits that depend on all tokens so far: the running mean of a token's one-hot rows."""

    def forward(self, ids: Tensor) -> Tensor:
        counts = nn.functional.one_hot(ids, VOCABULARY).float().cumsum(1)
        return 3 * counts / torch.arange(1, ids.shape[1] + 1)[:, None]


def model(module: nn.Module, task: str = "language_modeling", context: int | None = 8) -> ModelAdapter:
    return ModelAdapter(
        name="toy", module=module, task=task, forward=lambda m, batch: m(batch), context_length=context
    )


def evaluate(module: nn.Module, data: Any, task: str = "language_modeling", **changes: Any) -> dict[str, Any]:
    evaluation: Evaluation = build(load_choice("eval", "default", **changes))
    return evaluation.run(model(module, task), module, data, "cpu", progress=False)


def random_tokens(count: int) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("value", [0.0, 1e4], ids=["zero", "large"])
def test_constant_logits_have_the_perplexity_of_the_vocabulary(value: float) -> None:
    result = evaluate(Bigram(torch.full((VOCABULARY, VOCABULARY), value)), Streams(random_tokens(43)))
    assert result["perplexity"] == pytest.approx(VOCABULARY)
    assert result["tokens"] == 5 * 7  # five whole windows of 8, each predicts 7
    assert result["context"] == 8


def test_bigram_by_hand() -> None:
    # after 0: probabilities 1/4 and 3/4; after 1: 1/2 and 1/2. Windows 0 1 1 and 0 0 1, last token dropped
    table = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    result = evaluate(Bigram(table), Streams([0, 1, 1, 0, 0, 1, 1]), context=3)
    by_hand = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 4) + math.log(3 / 4)) / 4
    assert result["nll"] == pytest.approx(by_hand)
    assert result["perplexity"] == pytest.approx(math.exp(by_hand))
    assert result["tokens"] == 4


def test_stride_of_one_context_is_no_overlap() -> None:
    data = Streams(random_tokens(45))
    assert evaluate(WindowMean(), data, stride=8) == evaluate(WindowMean(), data)


def test_sliding_windows_score_every_token_once() -> None:
    tokens = random_tokens(20)
    result = evaluate(WindowMean(), Streams(tokens), stride=3)
    ids = torch.tensor(tokens)
    losses = []  # window by window, as the definition says: windows start at 0, 3, 6, 9, 12
    for start in range(0, len(tokens) - 8 + 1, 3):
        window = ids[start : start + 8]
        log_probability = WindowMean()(window[None])[0].log_softmax(-1)
        scored = range(1, 8) if start == 0 else range(5, 8)
        losses += [-log_probability[i - 1, window[i]].item() for i in scored]
    assert result["tokens"] == len(losses) == 7 + 4 * 3
    assert result["nll"] == pytest.approx(sum(losses) / len(losses))


def test_stride_does_not_change_a_model_without_memory() -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(29)
    log_probability = table.log_softmax(-1)
    whole = -log_probability[torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])].mean().item()
    assert evaluate(Bigram(table), Streams(tokens), stride=1)["nll"] == pytest.approx(whole)


def test_batching_changes_nothing() -> None:
    data = Streams(random_tokens(100))
    assert evaluate(WindowMean(), data, batch_tokens=1)["nll"] == pytest.approx(
        evaluate(WindowMean(), data, batch_tokens=10**6)["nll"]
    )


def test_documents_are_cut_and_scored_on_their_own() -> None:
    table = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    data = Streams([0, 0, 0, 1], [0, 1], [1], per_document=True)  # a single token predicts nothing
    result = evaluate(Bigram(table), data, context=3)
    assert result["tokens"] == 3
    assert result["nll"] == pytest.approx(-(2 * math.log(1 / 4) + math.log(3 / 4)) / 3)
    assert evaluate(Bigram(table), data, context=3, max_tokens=3)["tokens"] == 2


def test_max_tokens_takes_the_beginning() -> None:
    tokens = random_tokens(64)
    assert evaluate(WindowMean(), Streams(tokens), max_tokens=17) == evaluate(
        WindowMean(), Streams(tokens[:16])
    )


def test_perplexity_too_large_for_a_float_is_infinite() -> None:
    table = 1e4 * torch.eye(2)
    assert evaluate(Bigram(table), Streams([0, 1] * 8))["perplexity"] == math.inf


def test_top1_and_top5_by_hand() -> None:
    ranked = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]  # class 0 first, class 5 last
    data = Images([ranked] * 5, [0, 0, 1, 4, 5])
    assert evaluate(nn.Identity(), data, "classification", batch_size=2) == {
        "top1": 40.0,
        "top5": 80.0,
        "samples": 5,
    }
    assert evaluate(nn.Identity(), data, "classification", num_samples=2)["top1"] == 100.0


def test_top5_with_fewer_classes_is_everything() -> None:
    result = evaluate(
        nn.Identity(), Images([[0.1, 0.9], [0.1, 0.9], [0.1, 0.9]], [0, 1, 0]), "classification"
    )
    assert result["top1"] == pytest.approx(100 / 3)
    assert result["top5"] == 100.0


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(InputError, match="logits of toy are NaN or infinite"):
        evaluate(Bigram(torch.full((2, 2), bad)), Streams([0, 1] * 8))
    with pytest.raises(InputError, match="logits of toy are NaN or infinite"):
        evaluate(nn.Identity(), Images([[0.0, bad]], [0]), "classification")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"context": 9}, "at most the 8 tokens of toy; got 9", id="context-too-long"),
        pytest.param({"context": 1}, "at least 2 .* got 1", id="context-too-short"),
        pytest.param(
            {"stride": 0}, "eval.stride must be between 1 and the context of 8 tokens; got 0", id="no-stride"
        ),
        pytest.param({"stride": 9}, "got 9", id="stride-too-long"),
        pytest.param({"batch_tokens": 0}, "eval.batch_tokens must be at least 1; got 0", id="batch"),
        pytest.param({"max_tokens": 7}, r"has 7 \(eval.max_tokens=7\)", id="too-few-tokens"),
    ],
)
def test_wrong_fields_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(WindowMean(), Streams(random_tokens(40)), **changes)


def test_text_shorter_than_a_context_is_refused() -> None:
    with pytest.raises(InputError, match="one context of 8 tokens; it has 7; choose"):
        evaluate(WindowMean(), Streams(random_tokens(7)))


def test_documents_without_a_prediction_are_refused() -> None:
    with pytest.raises(InputError, match="no test document of at least 2 tokens"):
        evaluate(WindowMean(), Streams([1], [2], per_document=True))


def test_images_for_a_language_model_are_refused() -> None:
    with pytest.raises(
        InputError, match="model toy has task 'language_modeling', but the data is for 'classification'"
    ):
        evaluate(WindowMean(), Images([[0.0]], [0]))


def test_the_global_random_state_is_left() -> None:
    before = torch.get_rng_state()
    evaluate(nn.Identity(), Images([[0.0, 1.0]] * 4, [0, 1, 1, 0]), "classification")
    evaluate(WindowMean(), Streams(random_tokens(40)))
    torch.testing.assert_close(torch.get_rng_state(), before)


@pytest.mark.data
@pytest.mark.skipif(
    not os.environ.get("PTQ_DATA"), reason="PTQ_DATA is unset: the models are looked for under it"
)
@pytest.mark.parametrize(
    ("name", "tokens", "perplexity"), [("stories260k", 38592, 4.8659), ("babyllama105", 28035, 2.1573)]
)
def test_local_models_have_their_measured_perplexity(name: str, tokens: int, perplexity: float) -> None:
    choice = load_choice("model", name)
    adapter, data = build(choice).load(), build(load_choice("data", companion("model", name, "data")))
    evaluation: Evaluation = build(load_choice("eval", "default"))
    result = evaluation.run(adapter, adapter.module, data, "cpu", progress=False)
    assert result["tokens"] == tokens
    assert result["perplexity"] == pytest.approx(perplexity, rel=0.005)
