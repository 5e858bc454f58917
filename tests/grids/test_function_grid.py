"""PTNQ's grid: fitting, codes, storage, and what solvers ask of it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.grids.affine import normal_equations
from ptq.grids.function_fit import (
    Initialisation,
    Schedule,
    Start,
    Units,
    errors_and_gradient,
    full_range,
    initial_rate,
    initialise,
    rates,
    regress,
    train,
)
from ptq.grids.function_grid import FunctionGrid
from ptq.grids.functions import Function, carries_sign, maps
from tests.conftest import random_problem

SIGNED = [f for f in Function if carries_sign(f, True)]
SHORT = {"steps": 20, "search_rounds": 8, "search_candidates": 20}


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(choice, function: str, **overrides):
    lists = {"functions": [function], "initialisations": ["search"], "schedules": ["linear"]}
    return choice("grid", "ptnq_paper", **{**lists, **SHORT, **overrides})


def units(function: Function = Function.tanh, bits: int = 4) -> Units:
    X = weights(5, 40)
    X = X / X.abs().amax(-1, keepdim=True)
    return Units(
        X=X,
        counted=torch.ones_like(X),
        ragged=False,
        size=torch.ones(5, dtype=X.dtype),
        function=function,
        faithful_guards=True,
        bits=bits,
    )


@pytest.mark.parametrize("function", [f.value for f in Function])
@pytest.mark.parametrize("group_size", [None, 5], ids=["row", "ragged"])
def test_values_come_back_through_storage_to_the_bit(choice, function: str, group_size: int | None) -> None:
    W = weights(2, 3, 13).float()
    spec = one(choice, function)
    grid = spec.fit(W, 3, group_size)
    codes = grid.round(W)
    values = grid.values(codes)
    assert bool(torch.isfinite(values).all())
    assert grid.code_min <= int(codes.min()) <= int(codes.max()) <= grid.code_max
    tensors, facts = grid.storage(codes)
    again, codes_again = FunctionGrid.from_storage(tensors, facts)
    assert torch.equal(codes_again, codes)
    assert torch.equal(again.values(codes_again), values)
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    expected = grid.storage_bits(codes)
    assert sum(expected.values()) <= stored < sum(expected.values()) + 8 * len(tensors)
    assert spec.size(W, 3, group_size) == expected


@pytest.mark.parametrize("function", [f.value for f in SIGNED])
def test_codes_are_rounded_in_code_space_or_to_the_nearest_level(choice, function: str) -> None:
    W = weights(1, 4, 60)
    grid = one(choice, function, parameter_bits=32).fit(W, 4)
    forward, inverse = maps(Function(function), True)
    a, s = grid.a, grid.s
    by_hand = (forward(W * a) * s).round().clamp(grid.code_min, grid.code_max)
    assert torch.equal(grid.round(W).double(), by_hand)
    assert_close(grid.values(grid.round(W)), inverse(by_hand / s) / a)
    near = one(choice, function, parameter_bits=32, nearest=True).fit(W, 4)
    table = near.levels[0, :, 0]  # [out, L]
    distance = (W[0][..., None] - table[:, None]).abs()
    error = (W - near.values(near.round(W))).abs()[0]
    assert_close(error, distance.amin(-1))
    code, value = near.round_column(W[..., 7], 7)
    assert_close(value, near.values(near.round(W))[..., 7])
    assert_close(code, near.round(W)[..., 7].to(code.dtype))


def test_linear_from_ones_without_training_is_the_plain_symmetric_quantizer(choice) -> None:
    W = weights(1, 3, 50)
    spec = one(choice, "linear", initialisations=["ones"], steps=0, parameter_bits=32)
    grid = spec.fit(W, 4)
    step = torch.maximum(W.amax(-1) / 7, -W.amin(-1) / 8)[..., None]
    assert_close(grid.values(grid.round(W)), (W / step).round() * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [f.value for f in SIGNED])
def test_training_never_raises_the_error_and_lowers_it_on_the_whole(function: str) -> None:
    problem = units(Function(function))
    start = initialise(problem, Initialisation.ones, 8, 20, 0)
    for schedule in Schedule:
        trained = train(problem, start, schedule, 60, 3)
        assert bool((trained.error <= start.error).all())
        assert trained.total() < start.total()
        assert_close(problem.errors(trained.a, trained.s), trained.error)


@pytest.mark.parametrize("function", [f.value for f in SIGNED])
def test_the_gradient_is_the_straight_through_one(function: str) -> None:
    problem = units(Function(function))
    logs = torch.zeros(2, 5, dtype=torch.float64)
    a = torch.full((5,), 0.9, dtype=torch.float64)
    logs[0], logs[1] = a.log(), (0.8 * full_range(problem, problem.X, a)).log()
    logs.requires_grad_()
    forward, inverse = maps(problem.function, True)
    if function in ("sinh", "arcsinh"):  # ours are written with sign(z), whose automatic derivative is 0 at 0
        forward, inverse = getattr(torch, function), {"sinh": torch.arcsinh, "arcsinh": torch.sinh}[function]
    a, s = logs[0].exp()[:, None], logs[1].exp()[:, None]
    u = (forward(problem.X * a) * s).clamp(*problem.codes)
    errors = (inverse((u + (u.round() - u).detach()) / s) / a - problem.X).square().sum(-1)
    (expected,) = torch.autograd.grad(errors.sum(), logs)
    if not problem.function.has_inner_scale:
        expected[0] = 0
    found_errors, gradient = errors_and_gradient(problem, a[:, 0].detach(), s[:, 0].detach())
    assert_close(found_errors, errors.detach())
    assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_initialisations() -> None:
    problem = units(Function.arctan)
    starts = {kind: initialise(problem, kind, 20, 40, 0) for kind in Initialisation}
    assert torch.equal(starts[Initialisation.ones].a, torch.ones(5, dtype=torch.float64))
    assert bool((starts[Initialisation.normal].a.abs() <= 1).all())
    assert starts[Initialisation.search].total() < starts[Initialisation.ones].total()
    for start in starts.values():
        assert bool(torch.isfinite(start.error).all())
    # the regression of weights that are the function of evenly spaced codes finds the function
    code = torch.linspace(*problem.codes, 40, dtype=torch.float64)
    problem.X = ((code / 8).tan() / 2).expand(5, -1)
    a, s = torch.full((5,), 1.2, dtype=torch.float64), torch.full((5,), 7.0, dtype=torch.float64)
    found = regress(problem, Start.of(problem, a, s))
    assert_close(found.a, torch.full_like(a, 2.0), rtol=1e-3, atol=0)
    assert_close(found.s, torch.full_like(s, 8.0), rtol=1e-3, atol=0)


def test_learning_rates() -> None:
    assert initial_rate(3e-6) == pytest.approx(1e-4)
    assert initial_rate(0.0) == initial_rate(float("nan")) == pytest.approx(0.1)
    linear, restarts, constant = (list(rates(s, 1.0, 8, 1)) for s in Schedule)
    assert linear == [1 - t / 8 for t in range(8)]
    assert restarts[:4] == restarts[4:] == sorted(restarts[:4], reverse=True)
    assert set(constant) == {1.0}


def test_scaling_and_permuting_rows(choice) -> None:
    W = weights(1, 6, 40)
    spec = one(choice, "arcsinh", parameter_bits=32)

    def quantized(V: torch.Tensor) -> torch.Tensor:
        grid = spec.fit(V, 4)
        return grid.values(grid.round(V))

    assert_close(quantized(2 * W), 2 * quantized(W), rtol=1e-5, atol=1e-6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(quantized(W[:, order]), quantized(W)[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group_size", [None, 7], ids=["row", "ragged"])
def test_refit_solves_the_normal_equations_and_never_raises_the_error(choice, group_size: int | None) -> None:
    problem = random_problem(5, 24)
    grid = one(choice, "tanh", parameter_bits=32).fit(problem.W, 3, group_size)
    codes = grid.round(problem.W)
    new = grid.refit(codes, problem.W, problem.H)
    assert bool((problem.error(new.values(codes)) <= problem.error(grid.values(codes))).all())
    assert float(problem.error(new.values(codes)).sum()) < float(problem.error(grid.values(codes)).sum())
    M, v = normal_equations([new.values(codes).double()], problem.W, problem.H, group_size)
    assert_close(M.sum(-1), v, rtol=1e-3, atol=1e-4)


def test_a_pool_takes_the_function_with_the_least_weight_error(choice) -> None:
    W = weights(1, 8, 200).float() ** 3  # heavy tails
    names = ["linear", "square", "arcsinh"]
    pool = choice("grid", "ptnq_paper", functions=names, schedules=["linear"], **SHORT)
    chosen = pool.fit(W, 4)
    assert chosen.functions == [Function.arcsinh]
    assert list(pool.candidates())[:2] == ["linear/ones/linear", "linear/normal/linear"]
    assert len(pool.candidates()) == 12
    assert pool.report()["signs"]["unsigned_only"] == ["square"]
    grouped = pool.fit(W, 4, 100)
    mixed = grouped.replace_unit(1, one(choice, "exp").fit(W[..., 100:], 4))
    codes = mixed.round(W)
    assert mixed.functions == [Function.arcsinh, Function.exp]
    tensors, facts = mixed.storage(codes)
    assert_close(FunctionGrid.from_storage(tensors, facts)[0].values(codes), mixed.values(codes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"functions": []}, "one name or more"),
        ({"steps": -1}, "must not be negative; got -1"),
        ({"search_rounds": 0}, "at least 1; got 0"),
        ({"parameter_bits": 8}, "16 or 32; got 8"),
        ({"functions": ["sinus"]}, "ill-typed value for grid.functions"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_wrong_settings(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("grid", "ptnq_paper", **overrides)


def test_one_bit_is_refused(choice) -> None:
    with pytest.raises(InputError, match=r"at least 2.*got 1"):
        choice("grid", "ptnq_paper").check(1, None)
