"""The shapes of level tables: g(v; t) for v in [−1, 1] and one shape parameter t, normalised so that g(±1) =
±1.

A shape bends the equally spaced positions v of the codes; scale and offset are the grid's business.
Compressive shapes (sinh, artanh, tan, arcsin, mu_law, probit, power above 1, pwl2) put more levels near zero,
their inverses (arcsinh, tanh, arctan, sin, power below 1) put more near the ends. The forward maps behind
them are in Venâncio & Lopes, "PTNQ" (OpenReview AEvu2ifH1r), whose inner scale t is here, and in PowerQuant
(arXiv 2301.09858). Two published tables stand beside the shapes: NormalFloat (arXiv 2305.14314) and additive
powers of two (arXiv 1909.13144).
Shapes: t [steps]; tables [steps, levels], float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Function(Enum):
    """A member of the pool: how equally spaced positions become levels."""

    affine = "affine"  # v
    sinh = "sinh"  # sinh(t v) / sinh t
    artanh = "artanh"  # artanh(v tanh t) / t
    tan = "tan"  # tan(v arctan t) / t
    arcsin = "arcsin"  # arcsin(v sin t) / t
    power = "power"  # sign(v) |v|^t
    mu_law = "mu_law"  # sign(v) ((1 + t)^|v| − 1) / t
    probit = "probit"  # Φ⁻¹(1/2 + v (Φ(t) − 1/2)) / t
    pwl2 = "pwl2"  # straight from 0 to (1/2, t) and from there to (1, 1)
    arcsinh = "arcsinh"  # arcsinh(v sinh t) / t
    tanh = "tanh"  # tanh(t v) / tanh t
    arctan = "arctan"  # arctan(t v) / arctan t
    sin = "sin"  # sin(t v) / sin t
    exp_skew = "exp_skew"  # (exp(t v) − cosh t) / sinh t: finer at one end, not odd
    normal_float = "normal_float"  # a table of its own: quantiles of a Gaussian
    powers_of_two = "powers_of_two"  # a table of its own: sums of powers of two


class Layout(Enum):
    """Where on [−1, 1] the codes of a shape lie, equally spaced."""

    odd = "odd"  # 2^b − 1 positions, 0 in the middle
    full = "full"  # one more at the negative end: −1, …, 0, …, 1 − 2^(1−b)
    midrise = "midrise"  # 2^b positions from −1 to 1, none at 0
    table = "table"  # the function has levels of its own


class Spacing(Enum):
    """How the values of t lie in their range."""

    linear = "linear"
    geometric = "geometric"


@dataclass(frozen=True)
class Shape:
    """g(v; t), the range of t, and the t at which, or in whose limit, the shape is affine."""

    g: Callable[[Tensor, Tensor], Tensor]
    least: float
    most: float
    spacing: Spacing
    affine_at: float


def _ndtr(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _probit(v: Tensor, t: Tensor) -> Tensor:
    return torch.special.ndtri(0.5 + v * (_ndtr(t) - 0.5)) / t


def _pwl2(v: Tensor, t: Tensor) -> Tensor:
    u = v.abs()
    return v.sign() * torch.where(u < 0.5, 2 * t * u, t + (1 - t) * (2 * u - 1))


def _exp_skew(v: Tensor, t: Tensor) -> Tensor:
    flat = t.abs() < 1e-9
    t = torch.where(flat, torch.ones_like(t), t)
    # (exp(t v) − cosh t) / sinh t without the cancellation at small t
    return torch.where(flat, v, (torch.expm1(t * v) - 2 * torch.sinh(t / 2).square()) / torch.sinh(t))


LIMIT_OF_SINE = math.pi / 2

SHAPES = {
    Function.affine: Shape(lambda v, t: v + 0 * t, 0.0, 0.0, Spacing.linear, 0.0),
    Function.sinh: Shape(lambda v, t: torch.sinh(t * v) / torch.sinh(t), 0.1, 8.0, Spacing.geometric, 0.0),
    Function.artanh: Shape(lambda v, t: torch.atanh(v * torch.tanh(t)) / t, 0.1, 4.0, Spacing.geometric, 0.0),
    Function.tan: Shape(lambda v, t: torch.tan(v * torch.atan(t)) / t, 0.1, 30.0, Spacing.geometric, 0.0),
    Function.arcsin: Shape(
        lambda v, t: torch.asin(v * torch.sin(t)) / t, 0.1, LIMIT_OF_SINE, Spacing.linear, 0.0
    ),
    Function.power: Shape(lambda v, t: v.sign() * v.abs() ** t, 0.5, 3.0, Spacing.linear, 1.0),
    Function.mu_law: Shape(
        lambda v, t: v.sign() * torch.expm1(v.abs() * torch.log1p(t)) / t, 0.1, 255.0, Spacing.geometric, 0.0
    ),
    Function.probit: Shape(_probit, 0.5, 3.5, Spacing.linear, 0.0),
    Function.pwl2: Shape(_pwl2, 0.1, 0.5, Spacing.linear, 0.5),
    Function.arcsinh: Shape(
        lambda v, t: torch.asinh(v * torch.sinh(t)) / t, 0.1, 8.0, Spacing.geometric, 0.0
    ),
    Function.tanh: Shape(lambda v, t: torch.tanh(t * v) / torch.tanh(t), 0.1, 4.0, Spacing.geometric, 0.0),
    Function.arctan: Shape(lambda v, t: torch.atan(t * v) / torch.atan(t), 0.1, 30.0, Spacing.geometric, 0.0),
    Function.sin: Shape(
        lambda v, t: torch.sin(t * v) / torch.sin(t), 0.1, LIMIT_OF_SINE, Spacing.linear, 0.0
    ),
    Function.exp_skew: Shape(_exp_skew, -3.0, 3.0, Spacing.linear, 0.0),
}

TABLES = (Function.normal_float, Function.powers_of_two)


def t_values(function: Function, steps: int) -> Tensor:
    """The values of t that a grid may choose from, [steps] float64; a single 0 for a shape without t."""
    if function is Function.affine or function in TABLES:
        return torch.zeros(1, dtype=torch.float64)
    shape = SHAPES[function]
    if steps == 1:
        return torch.tensor([(shape.least + shape.most) / 2], dtype=torch.float64)
    fraction = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    if shape.spacing is Spacing.geometric:
        return shape.least * (shape.most / shape.least) ** fraction
    return shape.least + (shape.most - shape.least) * fraction


def positions(bits: int, layout: Layout) -> Tensor:
    """v of every code, increasing, [levels] float64."""
    half = 2 ** (bits - 1)
    if layout is Layout.odd:
        return torch.arange(1 - half, half, dtype=torch.float64) / max(half - 1, 1)
    if layout is Layout.full:
        return torch.arange(-half, half, dtype=torch.float64) / half
    return torch.arange(1 - 2 * half, 2 * half, 2, dtype=torch.float64) / (2 * half - 1)


def table(function: Function, bits: int, layout: Layout, steps: int) -> Tensor:
    """Levels of one function for each of its values of t, increasing, [steps, levels] float64."""
    if function is Function.normal_float:
        return normal_float(bits)[None]
    if function is Function.powers_of_two:
        return powers_of_two(bits)[None]
    return SHAPES[function].g(positions(bits, layout), t_values(function, steps)[:, None])


def normal_float(bits: int) -> Tensor:
    """NormalFloat levels [2^bits], NF4 exactly at 4 bits (arXiv 2305.14314; the constants of the released
    code).

    2^(b−1) quantiles of the upper half of a Gaussian at probabilities equally spaced from 1 − δ down to, but
    not at, 1/2; as many less one of the lower half, mirrored; and 0; all divided by the largest. δ is the
    mean of half an interval with 2^b and with 2^b − 1 levels: δ = (1 / 2^(b+1) + 1 / (2 (2^b − 1))) / 2,
    0.0323 at 4 bits.
    """
    half = 2 ** (bits - 1)
    delta = (1 / (4 * half) + 1 / (2 * (2 * half - 1))) / 2
    upper = torch.special.ndtri(torch.linspace(1 - delta, 0.5, half + 1, dtype=torch.float64)[:-1])
    lower = torch.special.ndtri(torch.linspace(1 - delta, 0.5, half, dtype=torch.float64)[:-1])
    return torch.cat([-lower, lower.new_zeros(1), upper.flip(0)]) / upper[0]


def powers_of_two(bits: int) -> Tensor:
    """Additive powers of two with a sign, [2^bits − 1] levels (arXiv 1909.13144, base width k = 2, as
    released).

    b − 1 bits of magnitude are m terms of two bits, each 0 or one of three powers of two, and at even b one
    more term of one bit. The powers 1/2, 1/4, 1/8, … are dealt to the m terms in turn, but for the (2m +
    1)-th, which is the one-bit term's. The release goes to 7 bits; 8 bits follow the same rule.
    """
    terms, odd = divmod(bits - 1, 2)
    single = 2 * terms + 1 if odd else 0
    exponents = [e for e in range(1, 3 * terms + odd + 1) if e != single]
    choices = [[0.0, *(2.0**-e for e in exponents[term::terms])] for term in range(terms)]
    if odd:
        choices.append([0.0, 2.0**-single])
    sums = torch.zeros(1, dtype=torch.float64)
    for choice in choices:
        sums = (sums[:, None] + torch.tensor(choice, dtype=torch.float64)).flatten()
    magnitudes = sums.sort().values / sums.max()
    return torch.cat([-magnitudes[1:].flip(0), magnitudes])
