"""Text sources and the calibration draw."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq.config import build, load_choice
from ptq.data import text
from ptq.data.text import HuggingFaceText, PydocTopics, TextFiles, draw_segments
from ptq.errors import InputError
from ptq.models.adapter import ModelAdapter
from ptq.models.language import ByteTokenizer


class StartingTokenizer(ByteTokenizer):
    """Bytes with a beginning-of-sequence token that only the data can put in front."""

    bos_token_id = 256


def byte_model(context_length: int, task: str = "language_modeling", tokenizer: Any = None) -> ModelAdapter:
    return ModelAdapter(
        name="bytes",
        module=nn.Identity(),
        task=task,
        forward=lambda module, batch: batch,
        tokenizer=tokenizer or ByteTokenizer(),
        context_length=context_length,
    )


def files(tmp_path: Path, content: str, **changes: Any) -> TextFiles:
    path = tmp_path / "some.txt"
    path.write_text(content, encoding="utf-8")
    fields: dict[str, Any] = {
        "calibration_file": str(path),
        "calibration_start": 0,
        "test_file": str(path),
        "max_characters": None,
        "per_document": False,
        "document_separator": None,
        "min_document_characters": 0,
        "join_paragraphs": False,
    }
    return TextFiles(**fields | changes)


def random_states() -> tuple[Tensor, tuple[Any, ...], Any]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # its stub says tuple or dict


def test_draw_takes_consecutive_tokens_within_the_text() -> None:
    segments = draw_segments(
        [torch.arange(50), torch.arange(50, 101)], num_samples=14, sequence_length=7, seed=3
    )
    assert segments.shape == (14, 7)
    assert segments.dtype == torch.int64
    assert (segments.diff(dim=1) == 1).all()
    assert segments.min() >= 0
    assert segments.max() <= 100


def test_draw_reaches_the_first_and_the_last_offset() -> None:
    starts = {int(draw_segments([torch.arange(9)], 1, 7, seed)[0, 0]) for seed in range(40)}
    assert starts == {0, 1, 2}


def test_draw_depends_on_the_seed_alone_and_leaves_global_random_state() -> None:
    before = random_states()
    first = draw_segments([torch.arange(1000)], 8, 16, seed=1)
    torch.testing.assert_close(random_states()[0], before[0])
    assert random_states()[1:] == before[1:]
    torch.manual_seed(99)
    torch.testing.assert_close(draw_segments([torch.arange(1000)], 8, 16, seed=1), first)
    assert not torch.equal(draw_segments([torch.arange(1000)], 8, 16, seed=2), first)


@pytest.mark.parametrize(
    ("tokens", "num_samples", "length", "message"),
    [
        pytest.param(100, 0, 10, "num_samples must be at least 1; got 0", id="none"),
        pytest.param(100, -2, 10, "got -2", id="negative"),
        pytest.param(
            100, 11, 10, "are 110 tokens, but the calibration text has 100; ask for at most 10", id="many"
        ),
        pytest.param(9, 1, 10, "must fill one segment of 10 tokens; it has 9", id="short"),
        pytest.param(100, 1, 0, "sequence_length must be at least 1 token; got 0", id="empty"),
    ],
)
def test_draw_refuses_what_the_text_does_not_have(
    tokens: int, num_samples: int, length: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        draw_segments([torch.arange(tokens)], num_samples, length, seed=0)


def test_topics_splits_share_no_paragraph_and_have_their_proportions() -> None:
    data = PydocTopics(per_document=False)
    documents = {split: data.documents(split) for split in ("train", "calibration", "test")}
    sizes = {split: sum(map(len, texts)) for split, texts in documents.items()}
    total = sum(sizes.values())
    assert 0.70 < sizes["train"] / total < 0.90
    assert 0.05 < sizes["calibration"] / total < 0.20
    assert 0.05 < sizes["test"] / total < 0.15
    paragraphs = {
        split: {p for document in texts for p in document.split("\n\n") if len(p) >= 40}
        for split, texts in documents.items()
    }
    assert not paragraphs["test"] & (paragraphs["train"] | paragraphs["calibration"])
    assert not paragraphs["calibration"] & paragraphs["train"]


def test_topics_streams() -> None:
    (stream,) = PydocTopics(per_document=False).tokens("test", ByteTokenizer())
    assert stream.dtype == torch.int64
    assert stream.ndim == 1
    documents = PydocTopics(per_document=True).tokens("test", StartingTokenizer())
    assert len(documents) > 5
    assert all(document[0] == 256 for document in documents)


def test_unknown_split_is_named() -> None:
    with pytest.raises(InputError, match=r"unknown split 'tests'; known: .*did you mean 'test'"):
        PydocTopics(per_document=False).documents("tests")


def test_one_file_is_divided_at_a_character(tmp_path: Path) -> None:
    data = files(tmp_path, "0123456789", calibration_start=6, max_characters=6)
    assert data.documents("test") == ["012345"]
    assert data.documents("calibration") == ["6789"]


def test_documents_are_split_joined_and_filtered(tmp_path: Path) -> None:
    content = "One day a\n\nb\n\n\nOnce c\n\nd\n\nOne day\n"
    data = files(
        tmp_path,
        content,
        per_document=True,
        document_separator=r"\n+(?=Once|One day)",
        min_document_characters=8,
        join_paragraphs=True,
    )
    assert data.documents("test") == ["One day a\nb", "Once c\nd"]
    streams = data.tokens("test", StartingTokenizer())
    assert [len(stream) for stream in streams] == [1 + 11, 1 + 8]


def test_check_accepts_what_fits(tmp_path: Path) -> None:
    files(tmp_path, "x" * 16).check(byte_model(16))
    files(tmp_path, "x" * 3, per_document=True).check(byte_model(16))


@pytest.mark.parametrize(
    ("content", "changes", "model", "message"),
    [
        pytest.param("x" * 15, {}, byte_model(16), "one context of 16 tokens; .* has 15; choose", id="short"),
        pytest.param("", {}, byte_model(16), "no calibration text", id="empty"),
        pytest.param(" \n", {}, byte_model(1), "no text in its calibration split", id="blank"),
        pytest.param("x", {"per_document": True}, byte_model(4), "at least 2 tokens", id="one-token"),
        pytest.param(
            "abc", {"calibration_start": 3}, byte_model(2), "no calibration text", id="start-past-end"
        ),
        pytest.param(
            "abc", {"calibration_start": -1}, byte_model(2), "calibration_start must be", id="negative"
        ),
        pytest.param(
            "abc", {"document_separator": "("}, byte_model(2), "no regular expression", id="bad-regex"
        ),
        pytest.param("abc", {}, byte_model(2, task="classification"), "has task 'classification'", id="task"),
    ],
)
def test_check_refuses(
    tmp_path: Path, content: str, changes: dict[str, Any], model: ModelAdapter, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        files(tmp_path, content, **changes).check(model)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt"):
        files(tmp_path, "abc", test_file=str(tmp_path / "absent.txt")).check(byte_model(2))


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"some\.bin.*UTF-8"):
        files(tmp_path, "abc", test_file=str(path)).documents("test")


def test_describe_counts(tmp_path: Path) -> None:
    description = files(tmp_path, "abcdef", max_characters=4, calibration_start=4).describe()
    assert description["characters"] == {"calibration": 2, "test": 4}
    assert description["documents"] == {"calibration": 1, "test": 1}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> HuggingFaceText:
    """WikiText-2 as configured, on a hub that has three rows."""
    text.read_rows.cache_clear()
    rows = [{"text": " = A = \n"}, {"text": ""}, {"text": "bc"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    return build(load_choice("data", "wikitext2_hub"))


def test_hub_rows_are_joined_by_blank_lines(hub: HuggingFaceText) -> None:
    (stream,) = hub.tokens("test", ByteTokenizer())
    assert ByteTokenizer().decode(stream.tolist()) == " = A = \n\n\n\n\nbc"


def test_hub_rows_are_limited_and_empty_ones_no_documents(hub: HuggingFaceText) -> None:
    hub.per_document, hub.calibration_documents = True, 2
    assert hub.documents("calibration") == [" = A = \n"]


def test_unreachable_hub_says_what_where_and_how(
    hub: HuggingFaceText, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        InputError, match=r"wikitext-2-raw-v1.*hub.*cache .*no route\).*load_dataset\(.*data=wikitext2"
    ):
        hub.documents("test")


LOCAL = ["wikitext2", "wikitext103", "tinystories", "tinyshakespeare"]


@pytest.mark.data
@pytest.mark.parametrize("name", LOCAL)
def test_local_texts_are_there(name: str, data_folder: Path) -> None:
    data = build(load_choice("data", name))
    data.check(byte_model(256))
    assert data.describe()["characters"]["calibration"] > 90_000


@pytest.fixture
def data_folder(request: pytest.FixtureRequest) -> Path:
    import os

    if not os.environ.get("PTQ_DATA"):
        pytest.skip("PTQ_DATA is unset: the local texts are looked for under it")
    return Path(os.environ["PTQ_DATA"])


@pytest.mark.data
def test_tinystories_has_the_measured_stories_and_calibrates_on_others(data_folder: Path) -> None:
    data = build(load_choice("data", "tinystories"))
    test, calibration = data.documents("test"), data.documents("calibration")
    assert len(test) == 111
    assert not set(test) & set(calibration)
