"""PTNQ's functions: inverses, guards, slopes, and which of them keep the sign."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ptq.grids.functions import SLOPES, Function, carries_sign, code_range, maps, sign_report

POSITIVE = torch.linspace(0.15, 0.95, 33, dtype=torch.float64)
LOSE_SIGN = ["square", "cube", "log", "sqrt", "cbrt", "cos", "cosh", "arccosh"]


@pytest.mark.parametrize("function", Function, ids=lambda f: f.value)
@pytest.mark.parametrize("faithful", [True, False], ids=["printed", "signed"])
def test_the_inverse_returns_the_argument_on_the_domain(function: Function, faithful: bool) -> None:
    forward, inverse = maps(function, faithful)
    x = POSITIVE + 1 if function is Function.arccosh else POSITIVE
    if faithful and function is Function.square:
        x = x[x**2 > 0.1]  # the root's guard
    assert_close(inverse(forward(x)), x, rtol=1e-9, atol=1e-9)
    if carries_sign(function, faithful):
        assert_close(inverse(forward(-x)), -x, rtol=1e-9, atol=1e-9)


def test_eight_functions_of_the_pool_lose_the_sign() -> None:
    report = sign_report(list(Function), faithful_guards=True)
    assert report["unsigned_only"] == LOSE_SIGN
    assert len(report["signed"]) == 11
    mended = sign_report(list(Function), faithful_guards=False)
    assert mended["unsigned_only"] == ["log", "cos", "cosh", "arccosh"]


def test_printed_guards() -> None:
    x = torch.tensor([-3.0, 0.0, 0.05, 1.0, 2.0], dtype=torch.float64)

    def forward(name: str) -> torch.Tensor:
        return maps(Function[name], True)[0](x)

    assert_close(forward("log"), x.clamp_min(1e-5).log())
    assert_close(forward("sqrt"), x.clamp_min(0.1).sqrt())
    assert_close(forward("arcsin"), x.clamp(-0.99999, 0.99999).arcsin())
    assert_close(forward("arctanh"), x.clamp(-0.9999, 0.9999).arctanh())
    assert_close(forward("arccosh"), x.clamp_min(1).arccosh())
    assert_close(forward("arcsinh"), x.arcsinh())
    assert_close(forward("sinh"), x.sinh())
    assert_close(forward("cosh"), x.cosh())
    assert_close(forward("cbrt"), x.clamp_min(0).pow(1 / 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", Function, ids=lambda f: f.value)
@pytest.mark.parametrize("faithful", [True, False], ids=["printed", "signed"])
def test_no_argument_gives_nan_or_infinity(function: Function, faithful: bool) -> None:
    x = torch.tensor([0.0, 1e-30, 0.5, 1.0, 7.0, 1e4, 1e10])
    for value in (fn(torch.cat([-x, x])) for fn in maps(function, faithful)):
        assert bool(torch.isfinite(value).all())
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert_close(maps(Function.tan, faithful)[0](infinite), torch.tensor([1.0, -1.0]).tan())


@pytest.mark.parametrize("function", Function, ids=lambda f: f.value)
@pytest.mark.parametrize("faithful", [True, False], ids=["printed", "signed"])
def test_slopes_equal_automatic_derivatives(function: Function, faithful: bool) -> None:
    for each in maps(function, faithful):
        for x in (POSITIVE, POSITIVE + 1, -POSITIVE):
            z = x.clone().requires_grad_()
            y = each(z)
            (expected,) = torch.autograd.grad(y.sum(), z)
            assert_close(SLOPES[each](x, y.detach()), expected, rtol=1e-6, atol=1e-9)


def test_codes_are_unsigned_where_the_function_is_never_negative() -> None:
    assert code_range(Function.sinh, True, 4) == (-8, 7)
    assert code_range(Function.exp, True, 4) == (0, 15)
    assert code_range(Function.arccos, True, 3) == (0, 7)
    assert code_range(Function.square, True, 3) == (0, 7)
    assert code_range(Function.square, False, 3) == (-4, 3)
