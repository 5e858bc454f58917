"""AWQ: what the two searches promise, the scales by hand, the exact size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.testing import assert_close

from ptq.config import CONF_DIR
from ptq.errors import InputError
from ptq.grids.scaled import ColumnScaled
from ptq.methods.awq import column_scale, unit_errors
from ptq.problem import LayerProblem
from ptq.runner import run
from tests.conftest import Golden, random_problem


def test_scales_by_hand() -> None:
    # √H_jj = 1, 4, 0, 16: s = 1, 2, –, 4 at r = 1/2, over √(4 · 1) = 2; a dead input stays as it is
    problem = LayerProblem("diagonal", torch.ones(1, 4), torch.diag(torch.tensor([1.0, 16.0, 0.0, 256.0])))
    assert_close(1 / column_scale(problem, 0.5), torch.tensor([[[0.5, 1.0, 1.0, 2.0]]]))
    assert torch.equal(column_scale(problem, 0.0), torch.ones(1, 1, 4))


def test_each_group_of_a_convolution_is_normalised_by_itself() -> None:
    problem = random_problem(3, 6, groups=2)
    H = problem.H * torch.tensor([1.0, 100.0])[:, None, None]
    scaled = LayerProblem("scaled", problem.W, H)
    assert_close(column_scale(scaled, 0.7), column_scale(problem, 0.7), rtol=1e-3, atol=0)


@pytest.mark.parametrize("group_size", [None, 8, 5], ids=["row", "eight", "ragged"])
def test_unit_errors_are_those_of_each_unit_alone(choice, group_size: int | None) -> None:
    problem = random_problem(4, 18, groups=2)
    grid = choice("grid", "affine").fit(problem.W, 3, group_size)
    errors = unit_errors(problem, grid, group_size)
    W_hat = grid.values(grid.round(problem.W))
    for u, start in enumerate(range(0, 18, group_size or 18)):
        only = torch.zeros(18)
        only[start : start + (group_size or 18)] = 1
        assert_close(errors[..., u], problem.error(problem.W + (W_hat - problem.W) * only))


@pytest.mark.parametrize("group_size", [None, 16], ids=["row", "group"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_more_candidates_are_never_worse(choice, golden: Golden, bits: int, group_size: int | None) -> None:
    """r = 0 without clipping is nearest rounding; exponents never hurt the layer, nor clipping any row."""
    problem, spec = golden.problem, choice("grid", "affine")
    plain = spec.fit(problem.W, bits, group_size)
    nearest = problem.error(plain.values(plain.round(problem.W)))
    found = []
    for exponents, shrink in ((1, []), (20, []), (20, [0.9, 0.8, 0.7, 0.6])):
        method = choice("method", "awq", exponents=exponents, shrink=shrink)
        codes, grid = method.quantize_layer(problem, spec, bits, group_size)
        found.append(problem.error(grid.values(codes)))
    assert_close(found[0], nearest)
    assert float(found[1].sum()) <= float(found[0].sum()) * (1 + 1e-9)
    assert bool((found[2] <= found[1] * (1 + 1e-9)).all())
    assert float(found[2].sum()) < float(found[1].sum())


def test_uniform_inputs_need_no_column_scales(choice) -> None:
    W = random_problem(6, 20).W
    problem = LayerProblem("white", W, torch.eye(20, dtype=torch.float64)[None])
    codes, grid = choice("method", "awq", shrink=[]).quantize_layer(
        problem, choice("grid", "affine"), 3, None
    )
    assert isinstance(grid, ColumnScaled)
    assert torch.equal(grid.scale, torch.ones(1, 1, 20, dtype=torch.float64))
    plain = choice("grid", "affine").fit(W, 3)
    assert torch.equal(codes, plain.round(W))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_channel_of_much_larger_inputs_is_kept_finer(choice, granularity: str) -> None:
    problem = random_problem(8, 24)
    gain = torch.ones(24, dtype=torch.float64)
    gain[5] = 60.0
    salient = LayerProblem("salient", problem.W, problem.H * gain * gain[:, None])
    spec = choice("grid", "affine", granularity=granularity)
    codes, grid = choice("method", "awq").quantize_layer(salient, spec, 3, None)
    assert int(grid.scale[0, 0].argmin()) == 5
    plain = spec.fit(salient.W, 3)
    error = salient.relative_error(grid.values(codes))
    assert error < 0.5 * salient.relative_error(plain.values(plain.round(salient.W)))


def test_dry_run_knows_the_exact_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model=digits_vit", "method=awq", "bits=w3g32", "device=cpu", "progress=false"]
    overrides += [f"output_dir={tmp_path}", "eval.num_samples=20", "calibration.num_samples=20"]
    choices = {"model": "digits_vit", "method": "awq", "bits": "w3g32"}
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        run(compose("config", overrides=[*overrides, "dry_run=true"]), choices)
        said = re.search(r"([\d.]+) bits per coefficient", capsys.readouterr().out)
        record = run(compose("config", overrides=[*overrides, "save_model=true"]), choices)
    assert said is not None
    assert record["status"] == "done"
    assert said[1] == f"{record['bits_per_coefficient']['total']:.4f}"
    bits = sum(sum(layer["storage_bits"].values()) for layer in record["layers"])
    # packed tensors end at whole bytes
    assert bits <= 8 * record["saved_bytes"] < bits + 8 * 4 * len(record["layers"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"exponents": 0}, "exponents must be at least 1; got 0"),
        ({"shrink": [0.9, 1.5]}, r"above 0 and at most 1.*1\.5"),
        ({"shrink": [0.0]}, "above 0 and at most 1.*0"),
    ],
    ids=["exponents", "growth", "zero"],
)
def test_wrong_hyperparameters(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("method", "awq", **overrides)
