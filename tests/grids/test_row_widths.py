"""Rows of different widths: each row as on the inner grid of its width, everything stored and counted."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ptq import checkpoint
from ptq.errors import InputError
from ptq.grids.row_widths import RowWidths, RowWidthsGrid
from ptq.layers import QuantizedLayer, quantized_layer
from tests.conftest import random_problem

WIDTHS = [2, 3, 4, 5, 6, 7, 8]
GRIDS = [
    "affine",
    "affine_float",
    "symmetric",
    "symmetric_tensor",
    "normal_float",
    "ptnq_channel",
    "codebook",
]


def some_rows(groups: int, out: int) -> Tensor:
    """Widths 2, 3 and 8, each of them in some row."""
    pick = torch.arange(groups * out) * 7 % 3
    return torch.tensor([2, 3, 8])[pick].reshape(groups, out)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ["rtn", "gptq", "comq", "comq_thorough", "decoupleq"])
def test_contract(choice, name: str, groups: int) -> None:
    problem = random_problem(5, 24, groups=groups, dtype=torch.float32)
    rows = some_rows(groups, 5)
    spec = RowWidths(inner=choice("grid", "affine_float"), rows=rows, widths=WIDTHS)
    method = choice("method", name)
    codes, grid = method.quantize_layer(problem, spec, 3, None)
    W_hat = grid.values(codes)
    assert isinstance(grid, RowWidthsGrid)
    assert codes.shape == problem.W.shape
    assert codes.dtype == torch.int16
    for values, width in zip(W_hat.flatten(0, 1), rows.flatten(), strict=True):
        assert len(values.unique()) <= 2 ** int(width)
    narrow, wide = (
        method.quantize_layer(problem, choice("grid", "affine_float"), bits, None) for bits in (2, 8)
    )
    errors = [problem.relative_error(g.values(c)) for c, g in (narrow, (codes, grid), wide)]
    assert errors == sorted(errors, reverse=True)
    again = method.quantize_layer(problem, spec, 3, None)
    assert torch.equal(again[1].values(again[0]), W_hat)


@pytest.mark.parametrize("group_size", [None, 7])
@pytest.mark.parametrize("name", ["rtn", "gptq", "comq"])
def test_each_row_is_what_its_width_alone_makes_of_it(choice, name: str, group_size: int | None) -> None:
    problem = random_problem(6, 20)
    rows = some_rows(1, 6)
    inner = choice("grid", "affine_float")
    method = choice("method", name, **({"tolerance": 0.0} if name == "comq" else {}))
    spec = RowWidths(inner=inner, rows=rows, widths=WIDTHS)
    codes, grid = method.quantize_layer(problem, spec, 3, group_size)
    W_hat = grid.values(codes)
    for width in (2, 3, 8):
        alone_codes, alone = method.quantize_layer(problem, inner, width, group_size)
        assert_close(W_hat[rows == width], alone.values(alone_codes)[rows == width], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", GRIDS)
def test_storage_is_counted_to_the_bit_and_read_back(choice, name: str, groups: int) -> None:
    problem = random_problem(8, 24, groups=groups, dtype=torch.float32)
    rows = some_rows(groups, 8)
    spec = RowWidths(inner=choice("grid", name), rows=rows, widths=WIDTHS)
    grid = spec.fit(problem.W, 3, None, problem.H)
    codes = grid.round(problem.W)
    tensors, facts = grid.storage(codes)
    loaded, loaded_codes = RowWidthsGrid.from_storage(tensors, json.loads(json.dumps(facts)))
    assert torch.equal(loaded_codes, codes)
    assert torch.equal(loaded.values(loaded_codes), grid.values(codes))
    counted = grid.storage_bits(codes)
    assert counted == spec.size(problem.W, 3, None)
    assert counted["codes"] == 24 * int(rows.sum())
    stored = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    assert sum(counted.values()) <= stored < sum(counted.values()) + 8 * len(tensors)


def test_bits_by_hand(choice) -> None:
    W = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(0))
    spec = RowWidths(inner=choice("grid", "symmetric"), rows=torch.tensor([[2, 5, 5, 8]]), widths=WIDTHS)
    grid = spec.fit(W, 0)
    # codes 10 · (2 + 5 + 5 + 8); a scale of 16 bits and one of seven widths, three bits, per row
    assert grid.storage_bits(grid.round(W)) == {"codes": 200, "parameters": 4 * (16 + 3)}
    only = RowWidths(inner=choice("grid", "symmetric"), rows=torch.full((1, 4), 3), widths=[3])
    assert only.size(W, 0) == choice("grid", "symmetric").size(W, 3)


@pytest.mark.parametrize("name", GRIDS)
def test_column_by_column_is_the_whole(choice, name: str) -> None:
    problem = random_problem(6, 15, groups=2)
    spec = RowWidths(inner=choice("grid", name), rows=some_rows(2, 6), widths=WIDTHS)
    grid = spec.fit(problem.W, 3, 4 if name != "symmetric_tensor" else None, problem.H)
    codes = grid.round(problem.W)
    columns = torch.arange(12).reshape(2, 6) % 15
    code, value = grid.round_column(problem.W.gather(-1, columns[..., None])[..., 0], columns)
    assert_close(value, grid.values(codes).gather(-1, columns[..., None])[..., 0])
    assert_close(code.double(), codes.gather(-1, columns[..., None])[..., 0].double())
    for j in range(15):
        code, value = grid.round_column(problem.W[..., j], j)
        assert torch.equal(code.to(codes.dtype), codes[..., j])
        assert_close(value, grid.values(codes)[..., j])


def test_refit_where_and_scaled_follow_the_inner_grids(choice) -> None:
    problem = random_problem(7, 16, groups=2)
    spec = RowWidths(inner=choice("grid", "affine_float"), rows=some_rows(2, 7), widths=WIDTHS)
    grid = spec.fit(problem.W, 3)
    codes = grid.round(problem.W)
    refitted = grid.refit(codes, problem.W, problem.H)
    before, after = (problem.error(g.values(codes)) for g in (grid, refitted))
    assert bool((after <= before * (1 + 1e-9)).all())
    assert float(after.sum()) < float(before.sum())
    better = torch.arange(14).reshape(2, 7) % 2 == 0
    mixed = refitted.where(better, grid).values(codes)
    assert_close(mixed, torch.where(better[..., None], refitted.values(codes), grid.values(codes)))
    assert_close(grid.scaled(0.5).values(codes), 0.5 * grid.values(codes), rtol=1e-3, atol=1e-6)
    assert grid.code_span()[..., 0].tolist() == (2**spec.rows - 1).tolist()


def test_a_code_beyond_its_rows_range_is_the_end_of_it(choice) -> None:
    problem = random_problem(6, 12)
    spec = RowWidths(inner=choice("grid", "affine"), rows=some_rows(1, 6), widths=WIDTHS)
    grid = spec.fit(problem.W, 3)
    beyond, ends = torch.full((1, 6, 12), 255), 2 ** spec.rows[..., None].expand(1, 6, 12) - 1
    assert torch.equal(grid.values(beyond), grid.values(ends))
    tensors, facts = grid.storage(beyond)
    assert torch.equal(RowWidthsGrid.from_storage(tensors, facts)[1].long(), ends)


def test_parameters_can_be_trained(choice) -> None:
    problem = random_problem(6, 12)
    spec = RowWidths(inner=choice("grid", "affine_float"), rows=some_rows(1, 6), widths=WIDTHS)
    grid = spec.fit(problem.W, 3)
    codes = grid.round(problem.W)
    free = {name: value.clone().requires_grad_() for name, value in grid.parameters().items()}
    grid.with_parameters(free).values(codes).square().sum().backward()
    assert sorted(free) == sorted(f"w{b}_{p}" for b in (2, 3, 8) for p in ("scale", "offset"))
    assert all(float(value.grad.abs().min()) > 0 for value in free.values())


def test_a_layer_on_it_is_saved_and_loaded(choice, tmp_path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 9))
    x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for index, shape in ((0, (2, 3)), (2, (1, 9))):
        layer = model[index]
        W = layer.weight.detach().reshape(*shape, -1)
        grid = RowWidths(inner=choice("grid", "affine"), rows=some_rows(*shape), widths=WIDTHS).fit(W, 3)
        model[index] = quantized_layer(layer, grid, grid.round(W))
    checkpoint.save(model.eval(), tmp_path)
    fresh = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 9))
    loaded = checkpoint.load(tmp_path, fresh)
    assert isinstance(loaded[2], QuantizedLayer)
    assert torch.equal(loaded(x), model(x))


def test_wrong_rows_are_refused(choice) -> None:
    inner = choice("grid", "affine")
    with pytest.raises(ValueError, match=r"\[9\] that are not among"):
        RowWidths(inner=inner, rows=torch.tensor([[9, 2]]), widths=WIDTHS)
    with pytest.raises(InputError, match=r"known for \[1, 2\] rows, and the layer has \[1, 3\]"):
        RowWidths(inner=inner, rows=torch.tensor([[3, 2]]), widths=WIDTHS).fit(torch.ones(1, 3, 4), 3)
