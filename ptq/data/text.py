"""Text for language models: where it comes from, how it becomes tokens, and which segments calibrate.

A split is one long stream of tokens, or, with `per_document`, one short stream for each document.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptq.data.held_out import HELD_OUT, divide_sequence
from ptq.data.root import resolve
from ptq.errors import InputError, suggestion
from ptq.models.adapter import ModelAdapter

SPLITS = ("calibration", "test")


@dataclass(kw_only=True)
class Text(ABC):
    """What every text source does; a source adds `documents`, `joiner` and `source`."""

    per_document: bool  # true = every document is a stream and scored on its own; false = one stream a split

    task: ClassVar[str] = "language_modeling"
    tests_on_calibration: ClassVar[bool] = False

    @abstractmethod
    def documents(self, split: str) -> list[str]:
        """The documents of a split, in order; raises InputError where they cannot be had."""

    @property
    def document_joiner(self) -> str:
        """What stands between two documents in a stream."""
        return "\n\n"

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the text comes from, for messages and records."""

    def tokens(self, split: str, tokenizer: Any) -> list[Tensor]:
        """Streams of token ids, int64 [tokens]: one, or one per document.

        A joined stream starts as the tokenizer starts a text; a document starts with the tokenizer's
        beginning-of-sequence token where it has one.
        """
        documents = self.documents(split)
        if not self.per_document:
            return [torch.tensor(tokenizer.encode(self.document_joiner.join(documents)), dtype=torch.int64)]
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        streams = []
        for document in documents:
            ids = list(tokenizer.encode(document))
            if start and ids[:1] != start:
                ids = start + ids
            streams.append(torch.tensor(ids, dtype=torch.int64))
        return streams

    def check(self, adapter: ModelAdapter) -> None:
        """Raise InputError unless the model reads text, both splits do, and the test text fills a context."""
        if adapter.task != self.task or adapter.tokenizer is None:
            no_tokenizer = " and no tokenizer" if adapter.tokenizer is None else ""
            raise InputError(
                f"{self.source} is text, but model {adapter.name} has task {adapter.task!r}{no_tokenizer}; "
                f"choose data for that task with data=NAME"
            )
        for split in SPLITS:
            if not any(document.strip() for document in self.documents(split)):
                raise InputError(
                    f"{self.source} has no text in its {split} split; choose another file or data=NAME"
                )
        lengths = [len(stream) for stream in self.tokens("test", adapter.tokenizer)]
        if self.per_document and max(lengths) < 2:
            raise InputError(
                f"a document must have at least 2 tokens to be scored; the longest of {self.source} has "
                f"{max(lengths)}; choose longer documents, or data.per_document=false"
            )
        if (
            not self.per_document
            and adapter.context_length is not None
            and lengths[0] < adapter.context_length
        ):
            raise InputError(
                f"the test text must fill one context of {adapter.context_length} tokens; "
                f"{self.source} has {lengths[0]}; choose longer text, per_document=true, or another model"
            )

    def describe(self) -> dict[str, Any]:
        """Name, source, and documents and characters of each split."""
        splits = {split: self.documents(split) for split in SPLITS}
        return {
            "name": type(self).__name__,
            "source": self.source,
            "per_document": self.per_document,
            "documents": {split: len(documents) for split, documents in splits.items()},
            "characters": {split: sum(map(len, documents)) for split, documents in splits.items()},
        }


def draw_segments(streams: list[Tensor], num_samples: int, sequence_length: int, seed: int) -> Tensor:
    """Calibration segments [num_samples, sequence_length] int64, cut at random offsets from the streams.

    Several streams are joined first, as in training, so that a segment may run over the end of a document.
    The draw depends on the arguments only: the global random state is neither read nor changed.
    """
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1; got {num_samples}")
    if sequence_length < 1:
        raise InputError(f"sequence_length must be at least 1 token; got {sequence_length}")
    stream = torch.cat(streams)  # [tokens]
    if len(stream) < sequence_length:
        raise InputError(
            f"the calibration text must fill one segment of {sequence_length} tokens; it has {len(stream)}; "
            f"choose a longer text or a shorter sequence_length"
        )
    wanted = num_samples * sequence_length
    if wanted > len(stream):
        raise InputError(
            f"num_samples={num_samples} segments of sequence_length={sequence_length} are {wanted} tokens, "
            f"but the calibration text has {len(stream)}; ask for at most {len(stream) // sequence_length} "
            f"such segments"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - sequence_length + 1, (num_samples, 1), generator=generator)
    return stream[starts + torch.arange(sequence_length)]  # [num_samples, sequence_length]


@dataclass(kw_only=True)
class PydocTopics(Text):
    """CPython's own help texts (pydoc_data), the text of the embedded model; nothing is downloaded.

    Topics are divided by a checksum of their names: about 10 % test, 10 % calibration, the rest train. A
    paragraph that several topics share stays in the first of test, calibration and train only, so no split
    has another's text. The texts differ a little from one Python version to the next. Split "validation"
    is another 10 %, part of train, and "remainder" all of calibration (see held_out).
    """

    source: ClassVar[str] = "pydoc_data.topics"
    shortest_unique: ClassVar[int] = 40  # characters; shorter paragraphs are headings and may repeat
    validation_class: ClassVar[int] = 2  # of the checksum modulo 10

    def documents(self, split: str) -> list[str]:
        """The topics of split "calibration", "test", "train", "validation" or "remainder", in order of their
        names.
        """
        from pydoc_data.topics import topics

        check_split(split, (*SPLITS, "train", *HELD_OUT))
        wanted = {"remainder": "calibration", "validation": "train"}.get(split, split)
        names: dict[str, list[str]] = {"test": [], "calibration": [], "train": []}
        for name in sorted(topics):
            names[{0: "calibration", 1: "test"}.get(zlib.crc32(name.encode()) % 10, "train")].append(name)
        seen: set[str] = set()
        documents = []
        for part, part_names in names.items():
            for name in part_names:
                kept = []
                for paragraph in re.sub(r"[ \t]+\n", "\n", topics[name]).strip().split("\n\n"):
                    if len(paragraph) >= self.shortest_unique:
                        if paragraph in seen:
                            continue
                        seen.add(paragraph)
                    kept.append(paragraph)
                held_out = split != "validation" or zlib.crc32(name.encode()) % 10 == self.validation_class
                if part == wanted and held_out:
                    documents.append("\n\n".join(kept))
        return documents


@dataclass(kw_only=True)
class TextFiles(Text):
    """Text from two local UTF-8 files, which may be one and the same with a part for each split."""

    calibration_file: str  # under PTQ_DATA unless absolute
    calibration_start: int  # characters of that file to leave out, from its beginning
    test_file: str  # under PTQ_DATA unless absolute
    max_characters: int | None  # the test text is that many characters from the beginning; null = all
    document_separator: str | None  # regular expression between documents; null = the text is one document
    min_document_characters: int  # shorter documents are left out
    join_paragraphs: bool  # true = several line ends in a row become one

    @property
    def document_joiner(self) -> str:
        """A line end, or a blank line where those are kept."""
        return "\n" if self.join_paragraphs else "\n\n"

    @property
    def source(self) -> str:
        """The test file as configured."""
        return self.test_file

    def documents(self, split: str) -> list[str]:
        """The documents of split "calibration", "test", "validation" or "remainder" (see held_out)."""
        check_split(split, (*SPLITS, *HELD_OUT))
        if split == "test":
            text = self._read(self.test_file, split)[: self.max_characters]
        else:
            text = divide_sequence(self._read(self.calibration_file, split)[self.calibration_start :], split)
        if self.document_separator is None:
            documents = [text]
        else:
            try:
                documents = re.split(self.document_separator, text)
            except re.error as error:
                raise InputError(
                    f"document_separator={self.document_separator!r} is no regular expression: {error}; "
                    f"escape its special characters with a backslash"
                ) from error
        if self.join_paragraphs:
            documents = [re.sub(r"\n+", "\n", document) for document in documents]
        if self.document_separator is not None:
            documents = [document.strip() for document in documents]
        documents = [
            document for document in documents if len(document) >= max(self.min_document_characters, 1)
        ]
        if not documents:
            raise InputError(
                f"no {split} text of at least min_document_characters={self.min_document_characters} "
                f"characters is left of {self.test_file if split == 'test' else self.calibration_file}; "
                f"lower min_document_characters, max_characters or calibration_start"
            )
        return documents

    def _read(self, file: str, split: str) -> str:
        if self.calibration_start < 0 or (self.max_characters is not None and self.max_characters < 1):
            raise InputError(
                f"calibration_start must be at least 0 and max_characters at least 1 or null; got "
                f"{self.calibration_start} and {self.max_characters}"
            )
        path = resolve(file, f"{split} text")
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot read {split} text {path}: {error}; it must be a UTF-8 text file"
            ) from error


@dataclass(kw_only=True)
class HuggingFaceText(Text):
    """Text from a data set of the Hugging Face hub, or from its local cache."""

    path: str  # name on the hub, or a local data set folder
    name: str | None  # configuration of the data set
    calibration_split: str
    calibration_files: str | None  # one file of the data set rather than the whole split
    calibration_documents: int | None  # the first so many rows; null = all
    test_split: str
    test_files: str | None
    test_documents: int | None
    column: str  # that holds the text
    joiner: str  # between rows: a blank line for WikiText-2, a space for C4, as GPTQ does
    streaming: bool  # read rows as they arrive, without downloading the whole split

    @property
    def document_joiner(self) -> str:
        """What the configuration says."""
        return self.joiner

    @property
    def source(self) -> str:
        """Path and configuration on the hub."""
        return self.path if self.name is None else f"{self.path} ({self.name})"

    def documents(self, split: str) -> list[str]:
        """Rows of split "calibration", "test", "validation" or "remainder" (see held_out); empty rows are
        kept in a stream, as GPTQ does.
        """
        check_split(split, (*SPLITS, *HELD_OUT))
        if split == "test":
            hub_split, files, count = self.test_split, self.test_files, self.test_documents
        else:
            hub_split, files, count = (
                self.calibration_split,
                self.calibration_files,
                self.calibration_documents,
            )
        try:
            texts = read_rows(self.path, self.name, hub_split, files, self.column, count, self.streaming)
        except Exception as error:  # the library raises a dozen kinds when it cannot reach or find something
            from datasets.config import HF_DATASETS_CACHE

            first_line = next(iter(str(error).splitlines()), "")
            load = f"datasets.load_dataset({self.path!r}, {self.name!r}, split={hub_split!r})"
            raise InputError(
                f"{split} text of {self.source} is missing: split {hub_split!r}, column {self.column!r} was "
                f"found neither on the Hugging Face hub nor in the cache {HF_DATASETS_CACHE} "
                f"({type(error).__name__}: {first_line}); on a machine with network run {load} and copy that "
                f"cache here, or use local text with data=wikitext2 or another of conf/data"
            ) from error
        rows = [text for text in texts if text.strip()] if self.per_document else list(texts)
        part: list[str] = divide_sequence(rows, split)
        return part


@lru_cache(maxsize=4)
def read_rows(
    path: str, name: str | None, split: str, file: str | None, column: str, count: int | None, streaming: bool
) -> tuple[str, ...]:
    """The first `count` entries of a column of a data set on the hub, or all; read once a process."""
    from datasets import load_dataset

    files = None if file is None else {split: file}
    rows = load_dataset(path, name, data_files=files, split=split, streaming=streaming)
    return tuple(row[column] for row in islice(rows, count))


def check_split(split: str, known: tuple[str, ...]) -> None:
    """Raise InputError unless `split` is known."""
    if split not in known:
        raise InputError(f"unknown split {split!r}; known: {', '.join(known)}{suggestion(split, known)}")
