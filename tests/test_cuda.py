"""The same on a GPU: layers, blocks, networks and jobs come out as good as on a CPU. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.config import build, load_choice
from ptq.layers import QuantizedLayer
from ptq.methods.method import RatedGridSpec
from ptq.models.networks import DigitsResNetModule, DigitsViTModule
from ptq.runner import run
from tests.conftest import random_problem
from tests.methods.test_methods import METHODS, SHORTENED, method_grid
from tests.test_preparation import trained
from tests.test_runner import config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

SHORT = {"iterations": 100, "batch_size": 16}
LEARNED: list[tuple[str, dict[str, Any]]] = [
    ("gradient_ptq", SHORT),
    ("gradient_ptq", {**SHORT, "unit": "network", "float_target": False}),
    ("brecq_fast", {**SHORT, "loss": "fisher_diagonal"}),
    ("qdrop_fast", SHORT),
    ("autoround", SHORT),
    ("tesseraq", SHORT),
    ("adaround_fast", {"iterations": 100}),
    ("decoupleq", {}),
    ("qft", {"epochs": 4, "batch_size": 16}),
    ("qft_gptq_start", {"epochs": 4, "batch_size": 16}),
]


def networks() -> list[tuple[nn.Module, list[Tensor]]]:
    torch.manual_seed(0)
    images = list(torch.randn(64, 1, 8, 8).split(32))
    return [
        (trained(DigitsResNetModule([4, 6], 1, 10)), images),
        (trained(DigitsViTModule(2, 8, 1, 2, 12, 10)), images),
    ]


def output_error(module: nn.Module, quantized: nn.Module, batches: list[Tensor], device: str) -> float:
    module, quantized = module.to(device), quantized.to(device)
    with torch.no_grad():
        pairs = [(quantized(x.to(device)), module(x.to(device))) for x in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


@pytest.mark.parametrize("name", METHODS)
def test_a_layer(name: str) -> None:
    problem = random_problem(8, 24, dtype=torch.float32)
    bits = 2.5 if isinstance(build(load_choice("grid", method_grid(name))), RatedGridSpec) else 3
    W, H = problem.W[0], problem.H[0].float()
    short = SHORTENED.get(name, {})
    here, there = (ptq.quantize_layer(W.to(d), H.to(d), name, bits=bits, **short) for d in ("cpu", "cuda"))
    assert there.values().is_cuda
    assert there.relative_error == pytest.approx(here.relative_error, rel=0.05)
    assert there.bits_per_coefficient == pytest.approx(here.bits_per_coefficient, abs=0.1)


@pytest.mark.parametrize("bits", ["w3", "w4a8"])
@pytest.mark.parametrize(("name", "overrides"), LEARNED)
def test_a_network(name: str, overrides: dict[str, Any], bits: str) -> None:
    """Batches may lie on the host; the float model is prepared where it computes."""
    preparation = "none" if name.startswith("qft") else "equalize"
    for module, batches in networks():
        errors = []
        for device in ("cpu", "cuda"):
            quantized, report = ptq.quantize_model(
                module.to(device), batches, name, bits=bits, preparation=preparation, **overrides
            )
            devices = {t.device.type for t in [*quantized.parameters(), *quantized.buffers()]}
            assert devices == {device}
            assert any(isinstance(m, QuantizedLayer) for m in quantized.modules())
            assert all(layer.relative_error > 0 for layer in report.layers)
            errors.append(output_error(module, quantized, batches, device))
        assert errors[1] < 1.5 * errors[0] + 1e-3


@pytest.mark.parametrize(
    "job",
    [
        ["method=comq", "bits=w3", "preparation=equalize"],
        ["method=gptq", "bits=w4a4_ends8", "activations=per_channel", "calibration.bias_correction=true"],
        ["method=rtn", "bits=w3", "tuning=block", "tuning.epochs=2", "calibration.reestimate_batchnorm=true"],
        ["method=rtn", "bits=w3", "tuning=network", "tuning.epochs=2"],
        ["method=gptq", "bits=mixed", "bits.score=output_fisher"],
        ["method=gptq", "grid=entropy", "bits=rate"],
        ["method=qft", "bits=w4a8", "method.epochs=2", "eval.integers=true", "bfloat16=true"],
        ["method=qdrop_fast", "bits=w2a4", "method.iterations=60", "bfloat16=true"],
    ],
    ids=" ".join,
)
def test_a_job(tmp_path: Path, job: list[str]) -> None:
    """Twice, so that the second finds the float metrics of the first."""
    wide = ["device=cuda", "calibration.num_samples=128", "eval.num_samples=300"]
    here = run(config(tmp_path, *job, *wide, "device=cpu"), {})
    records = [run(config(tmp_path, *job, *wide, f"seed={seed}"), {}) for seed in (0, 1)]
    for record in (here, *records):
        assert record["status"] == "done", record["error"]
    assert "cpu" not in records[0]["device"]
    assert records[0]["float"]["top1"] == pytest.approx(here["float"]["top1"], abs=0.5)
    assert records[0]["quantized"]["top1"] == pytest.approx(here["quantized"]["top1"], abs=6)
    assert 0 < records[0]["peak_memory_bytes"] < 2**31


def test_the_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in (["method=brecq_fast"], ["method=qft", "bits=w4a8"], ["method=comq", "tuning=block"]):
        run(config(tmp_path, *job, "device=cuda", "dry_run=true"), {})
        assert "time to expect" in capsys.readouterr().out
