"""Causal language models: any that transformers loads, and a small embedded one that needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from ptq.data.root import data_root
from ptq.errors import InputError, suggestion
from ptq.models.adapter import ModelAdapter, load_state_strictly, read_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = Path(__file__).resolve().parent / "weights" / "topics_llama.safetensors"
HEAD_REASON = (
    "output head kept float, as GPTQ and decoupleQ do; set model.skip_output_head=false to quantize it"
)
TOPICS_CONTEXT = 256  # tokens
NO_LIMIT = 10**9  # tokens


class ByteTokenizer:
    """UTF-8 bytes as tokens: 256 ids, no special tokens."""

    vocab_size = 256
    bos_token_id: int | None = None

    def encode(self, text: str) -> list[int]:
        """One id, 0..255, for each UTF-8 byte of `text`."""
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """The text whose bytes are `ids`; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")


def logits(module: nn.Module, ids: Tensor) -> Tensor:
    """Logits [sequences, tokens, vocabulary] for token ids [sequences, tokens]."""
    return module(input_ids=ids).logits


def topics_llama() -> LlamaForCausalLM:
    """The embedded architecture with random weights: LLaMA, 857,216 parameters, byte tokens."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ByteTokenizer.vocab_size,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=TOPICS_CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


@dataclass(kw_only=True)
class TopicsLlama:
    """The embedded model: a small LLaMA trained on CPython's help texts by experiments/train_topics.py."""

    checkpoint: str | None  # null = the weights that ship with ptq; else a file that train_topics wrote
    skip_output_head: bool  # true = the output head stays float
    # true = token and position tables stay float, as in models that were saved without this key
    skip_embeddings: bool = True

    def load(self) -> ModelAdapter:
        """The model in float32 and eval mode; the global random state is left as it was."""
        path = WEIGHTS if self.checkpoint is None else Path(self.checkpoint).expanduser()
        with torch.random.fork_rng(devices=[]):
            module = topics_llama()
        load_state_strictly(module, {k: v.float() for k, v in read_checkpoint(path).items()}, path)
        module.eval()
        return ModelAdapter(
            name="topics_llama",
            module=module,
            task="language_modeling",
            forward=logits,
            skip={output_head(module): HEAD_REASON} if self.skip_output_head else {},
            embeddings=not self.skip_embeddings,
            tokenizer=ByteTokenizer(),
            context_length=TOPICS_CONTEXT,
            source=path,
        )


@dataclass(kw_only=True)
class CausalLM:
    """A causal language model that transformers knows, with its tokenizer; weights from safetensors only."""

    path: str  # folder, under PTQ_DATA unless absolute; else a name on the Hugging Face hub
    context_length: int | None  # tokens a sequence may have here; null = as many as the model allows
    dtype: str  # float32, bfloat16 or float16
    attention: str  # eager or sdpa
    skip_output_head: bool  # true = the output head stays float
    # true = token and position tables stay float, as in models that were saved without this key
    skip_embeddings: bool = True

    def load(self) -> ModelAdapter:
        """The model in eval mode on the CPU; the global random state is left as it was.

        Raises InputError where it is not found, checkpoint and architecture do not fit, or a weight is NaN or
        infinite.
        """
        if self.dtype not in DTYPES:
            raise InputError(
                f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}{suggestion(self.dtype, DTYPES)}"
            )
        if self.attention not in ("eager", "sdpa"):
            raise InputError(f"attention must be eager or sdpa; got {self.attention!r}")
        source, places = self._locate()
        module, tokenizer = self._read(source, places)
        module = module.to(DTYPES[self.dtype]).eval()
        module.config.use_cache = False
        head = output_head(module)
        one = self.skip_output_head != self.skip_embeddings  # else both are float, or refused in ptq/plan.py
        copied = untie(module) if one else 0
        return ModelAdapter(
            name=self.path,
            module=module,
            task="language_modeling",
            forward=logits,
            skip={head: HEAD_REASON} if self.skip_output_head else {},
            embeddings=not self.skip_embeddings,
            copied=copied,
            tokenizer=tokenizer,
            context_length=self._context(module),
            source=source,
        )

    def _locate(self) -> tuple[Path | str, str]:
        """Folder or hub name to load, and the places to name where it is not found."""
        path = Path(self.path).expanduser()
        if path.is_absolute():
            if not (path / "config.json").is_file():
                raise InputError(f"model folder {path} has no config.json; correct the path")
            return path, f"in {path}"
        try:
            folder = data_root() / path
        except InputError as error:
            return self.path, f"under PTQ_DATA ({str(error).split(',')[0]})"
        if (folder / "config.json").is_file():
            return folder, f"in {folder}"
        return self.path, f"in {folder}"

    def _read(self, source: Path | str, places: str) -> tuple[Any, Any]:
        """Module and tokenizer, with the checkpoint checked tensor by tensor."""
        from huggingface_hub.constants import HF_HUB_CACHE

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its report of misfits comes as one InputError below
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            with torch.random.fork_rng(devices=[]):
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    source,
                    use_safetensors=True,
                    trust_remote_code=False,
                    attn_implementation=self.attention,
                    ignore_mismatched_sizes=True,  # to name them all
                    output_loading_info=True,
                )
            module, report = loaded
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # network, cache, file and configuration errors of four libraries
            hub = (
                ""
                if isinstance(source, Path)
                else f", on the Hugging Face hub and in its cache {HF_HUB_CACHE}"
            )
            raise InputError(
                f"model {self.path!r} cannot be loaded: looked {places}{hub} "
                f"({type(error).__name__}: {first_line(error)}); it needs config.json, the tokenizer and "
                f".safetensors weights (ptq never unpickles): put them in a folder under PTQ_DATA, or run "
                f"`hf download {self.path}` on a machine with network and copy that cache here"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        parts = [
            f"{label}: {', '.join(sorted(map(misfit, report[key])))}"
            for label, key in (
                ("missing", "missing_keys"),
                ("extra", "unexpected_keys"),
                ("wrong shape", "mismatched_keys"),
            )
            if report[key]
        ]
        if parts:
            raise InputError(f"checkpoint {source} does not fit {type(module).__name__}: {' | '.join(parts)}")
        bad = [name for name, weight in module.state_dict().items() if not torch.isfinite(weight).all()]
        if bad:
            raise InputError(
                f"checkpoint {source} holds NaN or infinity in: {', '.join(bad)}; use a sound checkpoint"
            )
        tokenizer.model_max_length = NO_LIMIT  # whole splits are tokenized at once and cut later
        return module, tokenizer

    def _context(self, module: Any) -> int:
        """Tokens a sequence may have: the configured number, at most the model's."""
        longest: Any = getattr(module.config, "max_position_embeddings", None)
        if self.context_length is None and longest is None:
            raise InputError(f"{self.path} states no longest sequence; set model.context_length")
        context: int = longest if self.context_length is None else self.context_length
        if context < 2 or (longest is not None and context > longest):
            limit = "" if longest is None else f" and at most the {longest} tokens of {self.path}"
            raise InputError(f"model.context_length must be at least 2{limit}; got {context}")
        return context


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "")


def misfit(entry: str | tuple[str, Any, Any]) -> str:
    """One entry of transformers' loading report in words: a name, or a name with two shapes."""
    if isinstance(entry, str):
        return entry
    name, found, expected = entry
    return f"{name} is {list(found)}, expected {list(expected)}"


def output_head(module: Any) -> str:
    """Name of the layer that turns the last hidden state into logits."""
    head = module.get_output_embeddings()
    return next(name for name, part in module.named_modules() if part is head)


def untie(module: Any) -> int:
    """Give the output head a weight of its own where it shares the embedding's: one of them stays float.
    Returns how many weights were copied.
    """
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if head.weight is not embedding.weight:
        return 0
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    module.config.tie_word_embeddings = False
    return head.weight.numel()
