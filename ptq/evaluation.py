"""How good a model is: top-1 and top-5 accuracy on images, perplexity on text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from ptq.errors import InputError
from ptq.integers import on_integers
from ptq.models.adapter import ModelAdapter


@dataclass(kw_only=True)
class Evaluation:
    """Accuracy or perplexity on the test split, by the task of the model."""

    batch_size: int  # images a forward pass
    num_samples: int | None  # images, drawn at random; null = all
    batch_tokens: int  # tokens a forward pass, and at least one window
    context: int | None  # tokens a window; null = the model's
    stride: int | None  # tokens from one window to the next; null = context, so that windows do not overlap
    max_tokens: int | None  # the first so many of the text; null = all
    integers: bool  # quantized layers compute on integers alone (ptq/integers.py); float layers as ever

    def run(
        self, adapter: ModelAdapter, module: nn.Module, data: Any, device: torch.device | str, progress: bool
    ) -> dict[str, Any]:
        """Metrics of `module`, which is on `device` and is put in eval mode; `data` is a choice of conf/data.

        Classification: top1 and top5 in percent, samples. Language modelling: perplexity, nll (nats a token),
        tokens (predicted ones), context. Raises InputError where data and model do not fit or a logit is not
        finite.
        """
        if data.task != adapter.task:
            raise InputError(
                f"model {adapter.name} has task {adapter.task!r}, but the data is for {data.task!r}; "
                f"choose data for the model with data=NAME"
            )
        module.eval()
        if self.integers:
            module = on_integers(module)
        if adapter.task == "classification":
            return self._accuracy(adapter, module, data, device, progress)
        if adapter.task == "language_modeling":
            return self._perplexity(adapter, module, data, device, progress)
        raise InputError(
            f"model {adapter.name} has task {adapter.task!r}, which has no metric; evaluate it by hand"
        )

    @torch.inference_mode()
    def _accuracy(
        self, adapter: ModelAdapter, module: nn.Module, data: Any, device: torch.device | str, progress: bool
    ) -> dict[str, Any]:
        if self.batch_size < 1:
            raise InputError(f"eval.batch_size must be at least 1; got {self.batch_size}")
        images = data.dataset("test", adapter.preprocessing, num_samples=self.num_samples)
        # a loader without a generator of its own draws a seed from the global one
        loader = DataLoader(images, batch_size=self.batch_size, num_workers=0, generator=torch.Generator())
        top1 = top5 = samples = 0
        with tqdm(desc="accuracy", total=len(images), unit="img", delay=1, disable=not progress) as bar:
            for batch, labels in loader:
                logits = adapter.forward(module, batch.to(device))  # [images, classes]
                require_finite(logits, adapter.name)
                ranked = logits.topk(min(5, logits.shape[1])).indices.cpu()  # [images, 5]
                hits = ranked == labels[:, None]
                top1 += int(hits[:, 0].sum())
                top5 += int(hits.sum())
                samples += len(labels)
                bar.update(len(labels))
        return {"top1": 100 * top1 / samples, "top5": 100 * top5 / samples, "samples": samples}

    @torch.inference_mode()
    def _perplexity(
        self, adapter: ModelAdapter, module: nn.Module, data: Any, device: torch.device | str, progress: bool
    ) -> dict[str, Any]:
        context, stride = self._window(adapter)
        streams = data.tokens("test", adapter.tokenizer)
        if data.per_document:
            windows = cut_documents(streams, context, self.max_tokens)
        else:
            windows = cut_stream(streams[0], context, stride, self.max_tokens)
        total = sum(batch.shape[0] * new for batch, new in windows)
        nll, tokens = 0.0, 0
        with tqdm(
            desc="perplexity", total=total, unit="tok", unit_scale=True, delay=1, disable=not progress
        ) as bar:
            for ids, new in in_batches(windows, self.batch_tokens):
                ids = ids.to(device)
                logits = adapter.forward(module, ids)[:, :-1][:, -new:].float()  # [windows, new, vocabulary]
                require_finite(logits, adapter.name)
                targets = ids[:, -new:]  # [windows, new]
                nll += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
                tokens += targets.numel()
                bar.update(targets.numel())
        nll /= tokens
        perplexity = math.exp(nll) if nll < 700 else math.inf  # where exp overflows
        return {"perplexity": perplexity, "nll": nll, "tokens": tokens, "context": context}

    def _window(self, adapter: ModelAdapter) -> tuple[int, int]:
        """Checked context and stride, in tokens."""
        longest = adapter.context_length
        context = longest if self.context is None else self.context
        if context is None:
            raise InputError(f"model {adapter.name} states no context length; set eval.context")
        if context < 2 or (longest is not None and context > longest):
            raise InputError(
                f"eval.context must be at least 2 and at most the {longest} tokens of {adapter.name}; "
                f"got {context}"
            )
        stride = context if self.stride is None else self.stride
        if not 1 <= stride <= context:
            raise InputError(
                f"eval.stride must be between 1 and the context of {context} tokens; got {stride}"
            )
        if self.batch_tokens < 1:
            raise InputError(f"eval.batch_tokens must be at least 1; got {self.batch_tokens}")
        return context, stride


def cut_stream(stream: Tensor, context: int, stride: int, max_tokens: int | None) -> list[tuple[Tensor, int]]:
    """Windows of one stream, grouped: ([windows, context], number of last tokens that each scores).

    The first window scores all its tokens but the first, later ones only those that no window scored before.
    Tokens after the last whole window are left out. Raises InputError where not even one window is whole.
    """
    stream = stream[:max_tokens]
    if len(stream) < context:
        raise InputError(
            f"the test text must fill one context of {context} tokens; it has {len(stream)}"
            f"{'' if max_tokens is None else f' (eval.max_tokens={max_tokens})'}; "
            f"choose a longer text, more eval.max_tokens, or a shorter eval.context"
        )
    windows = stream.unfold(0, context, stride)  # [windows, context]
    groups = [(windows[:1], context - 1), (windows[1:], min(stride, context - 1))]
    return [(ids, new) for ids, new in groups if len(ids)]


def cut_documents(streams: list[Tensor], context: int, max_tokens: int | None) -> list[tuple[Tensor, int]]:
    """Documents cut at the context, by length so that none is padded: ([documents, length], length − 1).

    With `max_tokens`, the first documents that together have no more. Raises InputError where none is left.
    """
    by_length: dict[int, list[Tensor]] = {}
    taken = 0
    for stream in streams:
        document = stream[:context]
        taken += len(document)
        if max_tokens is not None and taken > max_tokens:
            break
        if len(document) >= 2:
            by_length.setdefault(len(document), []).append(document)
    if not by_length:
        limit = "" if max_tokens is None else f" within eval.max_tokens={max_tokens}"
        raise InputError(
            f"no test document of at least 2 tokens{limit}; choose other text or more eval.max_tokens"
        )
    return [(torch.stack(group), length - 1) for length, group in sorted(by_length.items())]


def in_batches(windows: list[tuple[Tensor, int]], batch_tokens: int) -> Iterator[tuple[Tensor, int]]:
    """The same windows in batches of at most `batch_tokens` tokens, but at least one window."""
    for ids, new in windows:
        for batch in ids.split(max(1, batch_tokens // ids.shape[1])):
            yield batch, new


def require_finite(logits: Tensor, name: str) -> None:
    """Raise InputError where a logit is NaN or infinite."""
    if not torch.isfinite(logits).all():
        raise InputError(
            f"logits of {name} are NaN or infinite, so it has no metric; use more bits, another method, "
            f"or model.dtype=float32"
        )
