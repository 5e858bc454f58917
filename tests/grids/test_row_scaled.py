"""Row-scaled grids: the inner grid on W / t, storage to the bit, rows that cannot be mixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq.grids.scaled import ColumnScaled, RowScaled
from tests.conftest import random_problem


def rows(groups: int, out: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(groups, out, 1, generator=generator).mul(0.7).exp()


@pytest.mark.parametrize("inner", ["affine", "entropy", "entropy_columns"])
def test_values_come_back_exactly_and_through_storage(choice, inner: str) -> None:
    problem = random_problem(7, 13, groups=2, dtype=torch.float32)
    t = rows(2, 7)
    spec = choice("grid", inner)
    grid = RowScaled(inner=spec.fit(problem.W / t, 3, None, problem.H), scale=t, scale_bits=16).as_stored()
    codes = grid.round(problem.W)
    values = grid.values(codes)
    torch.testing.assert_close(values, grid.inner.values(codes) * grid.scale)
    for column in (0, 12):
        code, value = grid.round_column(problem.W[..., column], column)
        assert torch.equal(code.to(codes.dtype), codes[..., column])
        assert torch.equal(value, values[..., column])
    tensors, facts = grid.storage(codes)
    again, codes_again = RowScaled.from_storage(tensors, facts)
    assert torch.equal(codes_again, codes)
    assert torch.equal(again.values(codes_again), values)
    assert ("decode_once" in facts) == (inner != "affine")
    inner_bits, bits = grid.inner.storage_bits(codes), grid.storage_bits(codes)
    assert bits == {"codes": inner_bits["codes"], "parameters": inner_bits["parameters"] + 2 * 7 * 16}


def test_rows_and_columns_together(choice) -> None:
    """T Z A Γ, the form of published WaterSIC."""
    W = random_problem(5, 8).W.float()
    c = torch.linspace(0.5, 2, 8).expand(1, 1, 8)
    inner = choice("grid", "entropy").fit(W / rows(1, 5) / c, 4)
    columns = ColumnScaled(inner=inner, scale=c, scale_bits=16)
    grid = RowScaled(inner=columns, scale=rows(1, 5), scale_bits=16).as_stored()
    codes = grid.round(W)
    again, codes_again = RowScaled.from_storage(*grid.storage(codes))
    assert torch.equal(again.values(codes_again), grid.values(codes))
    assert float((W - grid.values(codes)).abs().max()) < float((inner.step * rows(1, 5) * c).max())


def test_tuning_may_train_both(choice) -> None:
    W = random_problem(5, 96).W.float()  # wide enough to pay for row scales
    grid = choice("grid", "entropy_rows").fit(W, 3)
    codes = grid.round(W)
    parameters = {name: p.clone().requires_grad_() for name, p in grid.parameters().items()}
    grid.with_parameters(parameters).values(codes).square().sum().backward()
    assert set(parameters) == {"step", "row_scale"}
    assert all(float(p.grad.abs().sum()) > 0 for p in parameters.values())


def test_rows_choose_for_themselves_only_where_they_share_nothing(choice) -> None:
    W, t = random_problem(4, 6).W.float(), rows(1, 4)
    better = torch.tensor([[True, False, True, False]])
    one, two = (
        RowScaled(inner=choice("grid", "affine").fit(W, b), scale=k * t, scale_bits=32)
        for b, k in ((3, 1), (3, 2))
    )
    mixed = one.where(better, two)
    assert torch.equal(mixed.scale[0, :, 0], torch.where(better[0], t[0, :, 0], 2 * t[0, :, 0]))
    shared = choice("grid", "entropy_rows").fit(W, 3)
    other = shared.scaled(2)
    assert shared.where(better, other) is other
    assert shared.where(better | True, other) is shared
