"""The 19 scalar functions of PTNQ: code = round(f(x · a) · s), x̂ = f⁻¹(code / s) / a.

Paper: Venâncio and Lopes, "PTNQ: Post-Training Non-Linear Quantization", OpenReview AEvu2ifH1r, its list of
primitives and its table of domain guards. Arguments are clipped into the domain before evaluation, in both
directions alike.
Beyond the paper: exponentials and hyperbolic functions see arguments within ±80, so that nothing overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

LARGEST_EXPONENT = 80.0  # exp of it is a float32
SMALLEST_LOG = 1e-5
SMALLEST_SQRT = 0.1
SMALLEST_ROOT = 1e-20  # below it the gradient of a root is no longer a float32
LARGEST_ROOTED = 1e18  # its square is a float32
ARC_LIMIT = 0.99999  # of arcsin and arccos
ARCTANH_LIMIT = 0.9999

Map = Callable[[Tensor], Tensor]
Slope = Callable[[Tensor, Tensor], Tensor]  # derivative of a map from its argument and its value


class Function(Enum):
    """Names of the pool, in the paper's order of columns."""

    linear = "linear"
    square = "square"
    cube = "cube"
    exp = "exp"
    log = "log"
    sqrt = "sqrt"
    cbrt = "cbrt"
    sin = "sin"
    cos = "cos"
    tan = "tan"
    sinh = "sinh"
    cosh = "cosh"
    tanh = "tanh"
    arcsin = "arcsin"
    arccos = "arccos"
    arctan = "arctan"
    arcsinh = "arcsinh"
    arccosh = "arccosh"
    arctanh = "arctanh"

    @property
    def has_inner_scale(self) -> bool:
        """Whether `a` stands inside f: x s, x² s and x³ s have none, and start with a = 1 for good."""
        return self not in (Function.linear, Function.square, Function.cube)


def _bounded(z: Tensor) -> Tensor:
    return z.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)


def _exp(z: Tensor) -> Tensor:
    return _bounded(z).exp()


def _log(z: Tensor) -> Tensor:
    return z.clamp_min(SMALLEST_LOG).log()


def _sinh(z: Tensor) -> Tensor:
    """By expm1, which is exact near 0 and several times faster than torch.sinh on a CPU."""
    grown = _bounded(z).abs().expm1()
    return z.sign() * (grown + grown / (grown + 1)) / 2


def _cosh(z: Tensor) -> Tensor:
    grown = _bounded(z).exp()
    return (grown + 1 / grown) / 2


def _arcsinh(z: Tensor) -> Tensor:
    """log(|z| + √(z² + 1)), written so that nothing cancels near 0; faster than torch.arcsinh on a CPU."""
    size = z.abs().clamp_max(LARGEST_ROOTED)
    square = size * size
    return z.sign() * torch.log1p(size + square / (1 + (1 + square).sqrt()))


def _tan(z: Tensor) -> Tensor:
    return torch.where(torch.isinf(z), z.sign(), z).tan()


def _arcsin(z: Tensor) -> Tensor:
    return z.clamp(-ARC_LIMIT, ARC_LIMIT).arcsin()


def _arccos(z: Tensor) -> Tensor:
    return z.clamp(-ARC_LIMIT, ARC_LIMIT).arccos()


def _arccosh(z: Tensor) -> Tensor:
    above = z.clamp(1.0, LARGEST_ROOTED) - 1
    return torch.log1p(above + (above * (above + 2)).sqrt())


def _arctanh(z: Tensor) -> Tensor:
    return z.clamp(-ARCTANH_LIMIT, ARCTANH_LIMIT).arctanh()


def _sqrt(z: Tensor) -> Tensor:
    return z.clamp_min(SMALLEST_SQRT).sqrt()


def _cbrt(z: Tensor) -> Tensor:
    """With the printed guard x ≥ 0 or y ≥ 1 of x^y: a negative argument becomes 0."""
    return z.clamp_min(SMALLEST_ROOT).pow(1 / 3)


def _square(z: Tensor) -> Tensor:
    return z * z


def _cube(z: Tensor) -> Tensor:
    return z * z * z


def _signed_square(z: Tensor) -> Tensor:
    return z * z.abs()


def _signed_sqrt(z: Tensor) -> Tensor:
    return z.sign() * z.abs().clamp_min(SMALLEST_ROOT).sqrt()


def _signed_cbrt(z: Tensor) -> Tensor:
    return z.sign() * z.abs().clamp_min(SMALLEST_ROOT).pow(1 / 3)


def _identity(z: Tensor) -> Tensor:
    return z


PRINTED: dict[Function, tuple[Map, Map]] = {  # f and f⁻¹
    Function.linear: (_identity, _identity),
    Function.square: (_square, _sqrt),
    Function.cube: (_cube, _cbrt),
    Function.exp: (_exp, _log),
    Function.log: (_log, _exp),
    Function.sqrt: (_sqrt, _square),
    Function.cbrt: (_cbrt, _cube),
    Function.sin: (torch.sin, _arcsin),
    Function.cos: (torch.cos, _arccos),
    Function.tan: (_tan, torch.arctan),
    Function.sinh: (_sinh, _arcsinh),
    Function.cosh: (_cosh, _arccosh),
    Function.tanh: (torch.tanh, _arctanh),
    Function.arcsin: (_arcsin, torch.sin),
    Function.arccos: (_arccos, torch.cos),
    Function.arctan: (torch.arctan, _tan),
    Function.arcsinh: (_arcsinh, _sinh),
    Function.arccosh: (_arccosh, _cosh),
    Function.arctanh: (_arctanh, torch.tanh),
}
SIGN_PRESERVING: dict[Function, tuple[Map, Map]] = {
    **PRINTED,
    Function.square: (_signed_square, _signed_sqrt),
    Function.cube: (_cube, _signed_cbrt),
    Function.sqrt: (_signed_sqrt, _signed_square),
    Function.cbrt: (_signed_cbrt, _cube),
}


def _within(slope: Tensor, inside: Tensor) -> Tensor:
    """A guard makes the map constant outside its domain."""
    return torch.where(inside, slope, torch.zeros_like(slope))


def _arc_slope(z: Tensor) -> Tensor:
    return _within((1 - z * z).clamp_min(1e-12).rsqrt(), z.abs() <= ARC_LIMIT)


SLOPES: dict[Map, Slope] = {
    _identity: lambda z, y: torch.ones_like(z),
    _square: lambda z, y: 2 * z,
    _signed_square: lambda z, y: 2 * z.abs(),
    _cube: lambda z, y: 3 * z * z,
    _exp: lambda z, y: y,
    _log: lambda z, y: _within(1 / z, z > SMALLEST_LOG),
    _sqrt: lambda z, y: _within(0.5 / y, z > SMALLEST_SQRT),
    _signed_sqrt: lambda z, y: _within(0.5 / y.abs(), z.abs() > SMALLEST_ROOT),
    _cbrt: lambda z, y: _within(1 / (3 * y * y), z > SMALLEST_ROOT),
    _signed_cbrt: lambda z, y: _within(1 / (3 * y * y), z.abs() > SMALLEST_ROOT),
    torch.sin: lambda z, y: z.cos(),
    torch.cos: lambda z, y: -z.sin(),
    _tan: lambda z, y: 1 + y * y,
    _sinh: lambda z, y: (1 + y * y).sqrt(),
    _cosh: lambda z, y: z.sign() * (y * y - 1).clamp_min(0).sqrt(),
    torch.tanh: lambda z, y: 1 - y * y,
    _arcsin: lambda z, y: _arc_slope(z),
    _arccos: lambda z, y: -_arc_slope(z),
    torch.arctan: lambda z, y: 1 / (1 + z * z),
    _arcsinh: lambda z, y: (1 + z * z).rsqrt(),
    _arccosh: lambda z, y: _within((z * z - 1).clamp_min(1e-12).rsqrt(), z > 1),
    _arctanh: lambda z, y: _within(1 / (1 - z * z).clamp_min(1e-12), z.abs() <= ARCTANH_LIMIT),
}


def maps(function: Function, faithful_guards: bool) -> tuple[Map, Map]:
    """f and f⁻¹, with the printed guards or with powers and roots that keep the sign."""
    return (PRINTED if faithful_guards else SIGN_PRESERVING)[function]


def code_range(function: Function, faithful_guards: bool, bits: int) -> tuple[int, int]:
    """Least and greatest code: unsigned where f is nowhere negative, else signed."""
    forward, _ = maps(function, faithful_guards)
    if bool((forward(_probe()) < 0).any()):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def carries_sign(function: Function, faithful_guards: bool) -> bool:
    """Whether f⁻¹(f(x)) has the sign of x on either side of 0."""
    forward, inverse = maps(function, faithful_guards)
    x = _probe()
    return bool((inverse(forward(x)) * x > 0).all())


def sign_report(functions: list[Function], faithful_guards: bool) -> dict[str, list[str]]:
    """Names of the functions that can and that cannot carry weights of both signs."""
    able = [f for f in functions if carries_sign(f, faithful_guards)]
    return {
        "signed": [f.value for f in able],
        "unsigned_only": [f.value for f in functions if f not in able],
    }


def _probe() -> Tensor:
    """Arguments of both signs inside every two-sided domain."""
    positive = torch.linspace(0.01, 0.9, 90, dtype=torch.float64)
    return torch.cat([-positive, positive])
