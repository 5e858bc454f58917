"""One contract for every method in conf/, and the golden results of the authors' own code."""

from __future__ import annotations

import re

import pytest
import torch

from ptq.config import build, choices, companion, load_choice
from ptq.errors import InputError
from ptq.grids.affine import Affine, Granularity
from ptq.grids.entropy import Entropy, Steps
from ptq.grids.scaled import ColumnScaled
from ptq.methods.method import GridChecker, LayerMethod, RatedGridSpec, check_pair, wants
from ptq.methods.selecting import SelectingMethod
from ptq.problem import LayerProblem
from tests.conftest import Golden, random_problem

METHODS = [m for m in choices("method") if isinstance(build(load_choice("method", m), "method"), LayerMethod)]


def fits_layers(name: str) -> bool:
    """Not so rtn, methods that choose by the task and then round each weight by itself, and those that fit a
    whole block later.
    """
    method = build(load_choice("method", name), "method")
    return name != "rtn" and not isinstance(method, SelectingMethod) and not wants(method).blocks


THAT_FIT = [m for m in METHODS if fits_layers(m)]
# as published it takes ten thousand steps
SHORTENED = {"adaround": {"iterations": 300, "rounding_rate": 0.02}}
# every candidate is a fit of the whole grid, which some grids take seconds for
FEW_CANDIDATES = {"awq": {"exponents": 2, "shrink": []}, **SHORTENED}
GOLDEN_COMQ = [
    (order, sweeps, shrink, bits)
    for order, sweeps in (("natural", 1), ("natural", 3), ("greedy", 1), ("greedy", 3))
    for shrink in ((1.0,) if sweeps == 1 else (1.0, 0.7))
    for bits in (4, 3, 2)
]
GOLDEN_GPTQ = [
    (group_size, act_order, mse, bits)
    for group_size, act_order, mse in (
        (-1, False, False),
        (-1, True, False),
        (-1, True, True),
        (32, False, False),
    )
    for bits in (4, 3, 2)
]


def method_grid(name: str) -> str:
    return companion("method", name, "grid") or "affine"


@pytest.mark.parametrize(("order", "sweeps", "shrink", "bits"), GOLDEN_COMQ)
def test_comq_release_gives_the_golden_codes(
    choice, golden: Golden, order: str, sweeps: int, shrink: float, bits: int
) -> None:
    method = choice("method", "comq_release", order=order, sweeps=sweeps, shrink=[shrink])
    codes, grid = method.quantize_layer(golden.problem, choice("grid", "affine_release"), bits, None)
    stored = golden.results[f"comq|order={order},sweeps={sweeps},lambda={shrink}|{bits}"]
    assert torch.equal(grid.round(stored[None]), codes)
    torch.testing.assert_close(grid.values(codes)[0], stored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("group_size", "act_order", "mse", "bits"), GOLDEN_GPTQ)
def test_gptq_error_equals_the_golden_one(
    choice, golden: Golden, group_size: int, act_order: bool, mse: bool, bits: int
) -> None:
    method = choice("method", "gptq_paper", act_order=act_order, refit_groups=group_size > 0)
    grid = choice("grid", "affine", range="l2_4" if mse else "min_max", parameter_bits=32)
    codes, fitted = method.quantize_layer(golden.problem, grid, bits, None if group_size < 0 else group_size)
    key = f"gptq|group_size={group_size},act_order={act_order},mse={mse}|{bits}"
    assert golden.error(fitted.values(codes)[0]) == pytest.approx(golden.error(golden.results[key]), rel=5e-3)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_our_comq_is_close_to_decoupleq_and_ahead_of_gptq(choice, golden: Golden, bits: int) -> None:
    codes, grid = choice("method", "comq").quantize_layer(
        golden.problem, choice("grid", "affine_float"), bits, None
    )
    error = golden.error(grid.values(codes)[0])
    for key in ("level1,rounds=4,M=50,K=50", "level2,rounds=4"):
        assert error <= 1.05 * golden.error(golden.results[f"decoupleq|group_size=-1,rounding={key}|{bits}"])
    assert error < golden.error(golden.results[f"gptq|group_size=-1,act_order=True,mse=True|{bits}"])
    assert bits > 2 or error <= 0.175


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("group_size", [None, 8, 5], ids=["row", "eight", "ragged"])
def test_contract(choice, name: str, group_size: int | None) -> None:
    problem = random_problem(9, 24, dtype=torch.float32)
    W, H = problem.W.clone(), problem.H.clone()
    spec = choice("grid", method_grid(name))
    if group_size is not None and name == "watersic_paper":
        with pytest.raises(InputError, match=f"takes no group_size; got {group_size}"):
            choice("method", name).quantize_layer(problem, spec, 4, group_size)
        return
    one_scale = isinstance(spec, Affine) and spec.granularity is Granularity.tensor
    one_scale = one_scale or (isinstance(spec, Entropy) and spec.steps is Steps.layer)
    if group_size is not None and one_scale:
        with pytest.raises(InputError, match=f"takes no group_size; got {group_size}"):
            spec.check(4, group_size)
        return
    for bits in (4, 2):
        method = choice("method", name, **SHORTENED.get(name, {}))
        codes, grid = method.quantize_layer(problem, spec, bits, group_size)
        again, grid_again = choice("method", name, **SHORTENED.get(name, {})).quantize_layer(
            problem, spec, bits, group_size
        )
        W_hat = grid.values(codes)
        assert codes.shape == W.shape
        assert codes.dtype == torch.int16
        assert W_hat.dtype == W.dtype
        assert torch.equal(W_hat, grid_again.values(again))
        assert torch.equal(problem.W, W)
        assert torch.equal(problem.H, H)
        if isinstance(spec, RatedGridSpec):  # as many values as the rate affords
            continue
        # column scales multiply what a unit shares
        shared = grid.inner.values(codes) if isinstance(grid, ColumnScaled) else W_hat
        for unit in shared.split(group_size or 24, dim=-1):
            assert max(len(row.unique()) for row in unit.flatten(0, 1)) <= 2**bits


@pytest.mark.parametrize("name", THAT_FIT)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_methods_that_fit_beat_nearest_rounding(choice, golden: Golden, name: str, bits: int) -> None:
    spec = choice("grid", method_grid(name))
    codes, grid = choice("method", name, **SHORTENED.get(name, {})).quantize_layer(
        golden.problem, spec, bits, None
    )
    plain = spec.fit(golden.problem.W, bits, None, golden.problem.H)
    nearest_error = golden.error(plain.values(plain.round(golden.problem.W))[0])
    assert golden.error(grid.values(codes)[0]) < 0.8 * nearest_error


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grid_name", choices("grid"))
def test_every_grid_under_every_method(choice, name: str, grid_name: str) -> None:
    problem = random_problem(6, 20)
    method = choice("method", name, **FEW_CANDIDATES.get(name, {}))
    spec = choice("grid", grid_name)
    if grid_name != method_grid(name) and isinstance(method, GridChecker):
        try:
            check_pair(method, spec)
        except InputError:
            return
    errors = []
    for bits in (8, 3, 2):
        codes, grid = method.quantize_layer(problem, spec, bits, None)
        errors.append(problem.relative_error(grid.values(codes)))
    assert errors == sorted(errors)
    assert errors[0] < 0.03


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "case",
    ["zero inputs", "one zero input", "constant rows", "zero weights", "one row", "one column", "one each"],
)
def test_odd_layers_work(choice, name: str, case: str) -> None:
    out, inputs = {"one row": (1, 12), "one column": (5, 1), "one each": (1, 1)}.get(case, (5, 12))
    base = random_problem(out, inputs, dtype=torch.float32)
    W, H = base.W.clone(), base.H.clone()
    if case == "zero inputs":
        H = torch.zeros_like(H)
    elif case == "one zero input":
        H[:, 3], H[:, :, 3] = 0, 0
    elif case == "constant rows":
        W = torch.full_like(W, 0.25)
    elif case == "zero weights":
        W = torch.zeros_like(W)
    problem = LayerProblem(case, W, H)
    codes, grid = choice("method", name, **SHORTENED.get(name, {})).quantize_layer(
        problem, choice("grid", method_grid(name)), 4, None
    )
    W_hat = grid.values(codes)
    assert bool(torch.isfinite(W_hat).all())
    assert problem.relative_error(W_hat) < 0.2
    exact = not isinstance(choice("grid", method_grid(name)), RatedGridSpec)
    if case == "zero weights" or (exact and case == "constant rows"):
        torch.testing.assert_close(W_hat, W, rtol=1e-3, atol=1e-6)


def test_paper_version_beats_the_release(choice, golden: Golden) -> None:
    spec = choice("grid", "affine_release")
    errors = {}
    for name in ("comq_release", "comq_paper"):
        codes, grid = choice("method", name, sweeps=3).quantize_layer(golden.problem, spec, 2, None)
        errors[name] = golden.error(grid.values(codes)[0])
    assert errors["comq_paper"] < errors["comq_release"]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gptq", {"act_order": True, "refit_groups": True}, "act_order=false"),
        ("gptq", {"damping": -1.0}, "damping.*got -1"),
        ("gptq", {"block_size": 0}, "block_size.*got 0"),
        ("comq", {"sweeps": 0}, "at least 1; got 0"),
        ("comq", {"shrink": []}, "one positive factor"),
        ("comq", {"sweps": 3}, re.escape("unknown key method.sweps for COMQ") + ".*did you mean 'sweeps'"),
        ("comq", {"order": "random"}, "ill-typed value for method.order"),
        ("comq", {"sweeps": 1.5}, "ill-typed value for method.sweeps"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_hyperparameters(choice, name: str, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("method", name, **overrides)
