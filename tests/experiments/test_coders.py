"""The coders' tables: streams of a saved model against the estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ptq
from experiments.coders import huffman_bits, model_rows
from ptq.checkpoint import quantized_bytes
from ptq.errors import InputError


@pytest.fixture
def model() -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40)), torch.randn(128, 64)


def test_the_streams_of_a_saved_model(model, tmp_path) -> None:
    quantized, report = ptq.quantize_model(model[0], [model[1]], "gptq", "entropy_rows", 2.5)
    folder = ptq.save(quantized, tmp_path / "model")
    table = model_rows(folder)
    assert table["layer"].tolist() == ["0", "2", "all", "file"]
    total, file = table.iloc[-2], table.iloc[-1]
    assert total["weights"] == 64 * 96 + 96 * 40
    assert total["stored"] == pytest.approx(report.bits_per_coefficient()["total"])
    assert total["stored"] * total["weights"] == pytest.approx(8 * quantized_bytes(folder))
    size = (folder / "quantized.safetensors").stat().st_size
    assert file["stored"] * file["weights"] == pytest.approx(8 * size)
    assert file["gap"] - total["gap"] == pytest.approx(8 * (size - quantized_bytes(folder)) / file["weights"])
    assert total["Huffman"] > total["pooled entropy"]
    assert total["gap"] == pytest.approx(total["stored"] - total["pooled entropy"])


def test_a_model_of_fixed_width_has_none(model, tmp_path) -> None:
    quantized, _ = ptq.quantize_model(model[0], [model[1]], "rtn", "affine", 4)
    with pytest.raises(InputError, match="no entropy-coded layer"):
        model_rows(ptq.save(quantized, tmp_path / "model"))


def test_huffman_lengths_by_hand() -> None:
    """Shares ½, ¼, ¼ take 1, 2, 2 bits."""
    assert huffman_bits(np.array([0, 0, 1, 2])) == 1.5
    assert huffman_bits(np.array([3, 3, 3])) == 1.0
