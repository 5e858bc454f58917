"""Train the embedded language model on CPython's help topics; writes one safetensors file.

Seven minutes on one core: `python -m experiments.train_topics ptq/models/weights/topics_llama.safetensors`
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange

from ptq.data.text import PydocTopics
from ptq.models.language import ByteTokenizer, topics_llama

SEED = 0
STEPS = 3000
WARMUP_STEPS = 100
BATCH_SIZE = 8  # segments a step
CONTEXT = 256  # tokens a segment
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1  # matrices only


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))


def token_loss(module: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of tokens 2..n given those before; ids [sequences, n]."""
    logits = module(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def unigram_perplexity(train: Tensor, test: Tensor) -> float:
    """Perplexity on `test` of byte frequencies counted on `train`, add-one smoothed."""
    counts = torch.bincount(train, minlength=ByteTokenizer.vocab_size).double() + 1
    log_probability = (counts / counts.sum()).log()
    return math.exp(-log_probability[test].mean().item())


@torch.inference_mode()
def perplexity(module: nn.Module, stream: Tensor) -> float:
    """Perplexity over non-overlapping windows of the context."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [token_loss(module, batch) * len(batch) for batch in windows.split(32)]
    return math.exp(torch.stack(losses).sum().item() / len(windows))


def train(output: Path) -> None:
    """Train from a fixed seed, print perplexities per byte, and write float16 weights to `output`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in one order; and at this size a second thread gains little
    data, tokenizer = PydocTopics(per_document=False), ByteTokenizer()
    (train_stream,), (test_stream,) = data.tokens("train", tokenizer), data.tokens("test", tokenizer)
    module = topics_llama().train()
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    positions = torch.arange(CONTEXT)
    steps = trange(STEPS, desc="train", mininterval=5)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        starts = torch.randint(len(train_stream) - CONTEXT + 1, (BATCH_SIZE, 1))
        loss = token_loss(module, train_stream[starts + positions])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            steps.set_postfix(loss=f"{loss.item():.3f}")
    module.eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, output)
    module.load_state_dict(state)  # report what was saved: the weights rounded to float16
    parameters = sum(p.numel() for p in module.parameters())
    print(f"parameters {parameters:,}; {output} {output.stat().st_size:,} bytes")
    print(f"test perplexity per byte {perplexity(module, test_stream):.3f} ({len(test_stream):,} bytes)")
    print(f"train perplexity per byte {perplexity(module, train_stream):.3f} ({len(train_stream):,} bytes)")
    print(f"unigram test perplexity per byte {unigram_perplexity(train_stream, test_stream):.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.train_topics OUTPUT.safetensors")
    train(Path(sys.argv[1]))
