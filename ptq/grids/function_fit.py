"""Fitting (a, s) of every unit to its weights: four initialisations, then gradient descent.

Paper: PTNQ (OpenReview AEvu2ifH1r), sections on initialisation and training. It leaves open the optimiser,
the number of steps, how rounding is differentiated and which parameters are searched; here plain gradient
descent on each unit's summed squared error in log |a| and log |s|, a straight-through gradient, and a search
over a with s = the largest factor that keeps every f(x · a) inside the codes.
Shapes: X [units, n] the weights of a unit in a row; a, s, errors [units]; P points of a unit's sorted
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from ptq.grids.functions import SLOPES, Function, code_range, maps

CHUNK = 2**17  # values of the space search held at once: they stay in the cache
TRAINED_AT_ONCE = 2**15  # weights whose temporaries stay in the cache
SEARCH_RADIUS = 1000.0  # of the first round, over the unit's largest magnitude
SEARCH_KEPT = 0.1  # fraction of the candidates that a round keeps
SEARCH_POINTS = 64  # sorted weights of a unit that stand for all of it in search and regression
REGRESSION_STEPS = 12
LARGEST_STEP = 0.1  # of log |a| and log |s| in one training step
LARGEST_VALUE = 1e30
LARGEST_LOG = 46.0  # |a| and s stay within e^±46, about 1e±20


class Initialisation(Enum):
    """Where (a, s) start."""

    ones = "ones"  # a = 1
    normal = "normal"  # a from the standard normal distribution restricted to [−1, 1]
    search = "search"  # the space search
    regression = "regression"  # the best of the other three, then regression of the sorted weights ("nlr")


class Schedule(Enum):
    """How the learning rate runs."""

    linear = "linear"  # down to 0
    cosine_restarts = "cosine_restarts"  # cosine annealing with warm restarts
    constant = "constant"


@dataclass(kw_only=True, slots=True)
class Units:
    """The weights of all units of a layer, and the function they are mapped by."""

    X: Tensor  # [units, n], divided by `size`; a ragged unit is filled up with its last weight
    counted: Tensor  # [units, n], 0 where filled up, else 1
    ragged: bool  # whether some unit is filled up
    size: Tensor  # [units] largest magnitude, or 1
    function: Function
    faithful_guards: bool
    bits: int

    @property
    def codes(self) -> tuple[int, int]:
        """Least and greatest code."""
        return code_range(self.function, self.faithful_guards, self.bits)

    def mapped(self, function: Function) -> Units:
        """The same weights under another function."""
        return replace(self, function=function)

    def errors(self, a: Tensor, s: Tensor) -> Tensor:
        """Sum of squared errors [units] over the counted weights."""
        R = self.X - reconstruct(self, self.X, a[:, None], s[:, None])
        return torch.nan_to_num((R.square() * self.counted).sum(-1), nan=math.inf)

    def points(self) -> Tensor:
        """At most SEARCH_POINTS of each unit's weights, sorted, evenly spaced in rank: [units, P]."""
        ordered = self.X.sort(-1).values
        n = ordered.shape[-1]
        if n <= SEARCH_POINTS:
            return ordered
        rank = torch.linspace(0, n - 1, SEARCH_POINTS, device=ordered.device).round().long()
        return ordered[:, rank]


def reconstruct(units: Units, X: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """f⁻¹(code / s) / a with code = round(f(X · a) · s) kept in range."""
    forward, inverse = maps(units.function, units.faithful_guards)
    code = (forward(X * a) * s).clamp_(*units.codes).round_()
    return (inverse(code / s) / a).clamp(-LARGEST_VALUE, LARGEST_VALUE)


def full_range(units: Units, X: Tensor, a: Tensor) -> Tensor:
    """The largest s with f(X · a) · s inside the codes: X [units, n], a [units] → [units]."""
    forward, _ = maps(units.function, units.faithful_guards)
    return _range_of(units, forward(X * a[:, None]))


def _range_of(units: Units, y: Tensor) -> Tensor:
    low, high = units.codes
    top, bottom = y.amax(-1), y.amin(-1)
    infinite = torch.full_like(top, math.inf)
    s = torch.where(top > 0, high / top.clamp_min(1e-30), infinite)
    if low < 0:
        s = torch.minimum(s, torch.where(bottom < 0, low / bottom.clamp_max(-1e-30), infinite))
    return torch.where(torch.isfinite(s), s, torch.ones_like(s)).clamp(1e-20, 1e20)


def initialise(units: Units, kind: Initialisation, rounds: int, candidates: int, seed: int) -> Start:
    """(a, s) of one initialisation with their error. Functions without an inner scale keep a = 1."""
    ones = torch.ones_like(units.size)
    if kind is Initialisation.regression:
        kinds = (Initialisation.ones, Initialisation.normal, Initialisation.search)
        best = initialise(units, kinds[0], rounds, candidates, seed)
        for other in kinds[1:]:
            best = best.or_better(initialise(units, other, rounds, candidates, seed))
        return regress(units, best)
    if not units.function.has_inner_scale or kind is Initialisation.ones:
        a = ones
    elif kind is Initialisation.normal:
        generator = torch.Generator().manual_seed(seed)
        # the inverse cdf of a uniform draw between the cdf's values at −1 and 1
        uniform = torch.rand(len(ones), generator=generator, dtype=torch.float64)
        reach = math.erf(1 / math.sqrt(2))
        a = (math.sqrt(2) * torch.erfinv(reach * (2 * uniform - 1))).to(ones)
        a = torch.where(a.abs() < 1e-3, torch.full_like(a, 1e-3), a)
    else:
        a = space_search(units, rounds, candidates, seed)
    return Start.of(units, a, full_range(units, units.X, a))


def space_search(units: Units, rounds: int, candidates: int, seed: int) -> Tensor:
    """a [units]: each round keeps the best tenth of its draws and redraws within ± (their mean + maximum).

    All units share the draws of a round, each at its own radius; magnitudes are averaged, so that the radius
    is positive. The best of the last round wins.
    """
    generator = torch.Generator().manual_seed(seed)
    points = units.points()  # [units, P]
    forward, inverse = maps(units.function, units.faithful_guards)
    kept = max(1, round(SEARCH_KEPT * candidates))
    draws = 2 * torch.rand(rounds, candidates, generator=generator, dtype=torch.float64) - 1
    # the wide first range is drawn evenly in the logarithm, or a few draws would all be far too large
    draws[0] = draws[0].sign() * SEARCH_RADIUS ** (2 * draws[0].abs() - 2)
    draws = draws.to(points)
    radius = torch.full_like(units.size, SEARCH_RADIUS)
    rows = max(1, CHUNK // (candidates * points.shape[-1]))
    a = torch.ones_like(radius)
    for part in torch.arange(len(radius), device=points.device).split(rows):
        X = points[part, None]  # [part, 1, P]
        reach = radius[part]
        for draw in draws:
            drawn = draw * reach[:, None]  # [part, candidates]
            drawn = torch.where(drawn.abs() < 1e-6, torch.full_like(drawn, 1e-6), drawn)
            y = forward(X * drawn[..., None])  # [part, candidates, P]
            s = _range_of(units, y)[..., None]
            values = inverse((y * s).clamp_(*units.codes).round_() / s) / drawn[..., None]
            error = (X - values).square().sum(-1)
            order = torch.nan_to_num(error, nan=math.inf).argsort(dim=-1, stable=True)
            best = drawn.gather(-1, order[:, :kept]).abs()
            a[part] = drawn.gather(-1, order[:, :1])[:, 0]
            reach = best.mean(-1) + best.amax(-1)
    return a


def regress(units: Units, start: Start) -> Start:
    """Least squares of the sorted weights against f⁻¹ of evenly spaced codes, by Levenberg–Marquardt.

    Units whose regression does not end in finite parameters keep their start.
    """
    target = units.points()  # [units, P]
    _, inverse = maps(units.function, units.faithful_guards)
    low, high = units.codes
    code = torch.linspace(low, high, target.shape[-1], device=target.device, dtype=target.dtype)
    sign = start.a.sign()

    def model(theta: Tensor, order: Tensor) -> Tensor:
        a, s = sign * theta[:, 0].exp(), theta[:, 1].exp()
        return (inverse(order / s[:, None]) / a[:, None]).clamp(-1e6, 1e6)

    theta = torch.stack([start.a.abs().log(), start.s.log()], -1)  # [units, 2]
    rising = model(theta, code.expand_as(target))
    falls = (rising[:, -1] < rising[:, 0])[:, None]
    order = torch.where(falls, code.flip(0), code)  # [units, P]
    free = torch.tensor([float(units.function.has_inner_scale), 1.0], device=theta.device, dtype=theta.dtype)
    damping = torch.full_like(units.size, 1e-2)
    eye = torch.eye(2, dtype=theta.dtype, device=theta.device)
    fitted = model(theta, order)
    for _ in range(REGRESSION_STEPS):
        J = torch.stack(
            [(model(theta + 1e-3 * eye[k], order) - fitted) / 1e-3 * free[k] for k in (0, 1)], -1
        )  # [units, P, 2]
        R = target - fitted
        N = J.mT @ J
        scale = N.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-12)
        step, _ = torch.linalg.solve_ex(
            N + (damping * scale)[:, None, None] * eye + 1e-12 * eye, J.mT @ R[..., None]
        )
        tried = (theta + step[..., 0].clamp(-1, 1) * free).clamp(-LARGEST_LOG, LARGEST_LOG)
        tried_fit = model(tried, order)
        lower = (target - tried_fit).square().sum(-1) < R.square().sum(-1)
        theta = torch.where(lower[:, None], tried, theta)
        fitted = torch.where(lower[:, None], tried_fit, fitted)
        damping = torch.where(lower, damping / 4, damping * 8).clamp(1e-8, 1e4)
    sound = torch.isfinite(theta).all(-1)
    a = torch.where(sound, sign * theta[:, 0].exp(), start.a)
    return Start.of(units, a, torch.where(sound, theta[:, 1].exp(), start.s))


def rates(schedule: Schedule, initial: float, steps: int, restarts: int) -> Iterator[float]:
    """The learning rate of each step."""
    period = max(1, -(-steps // (restarts + 1)))
    for t in range(steps):
        if schedule is Schedule.linear:
            yield initial * (1 - t / steps)
        elif schedule is Schedule.cosine_restarts:
            yield initial * (1 + math.cos(math.pi * (t % period) / period)) / 2
        else:
            yield initial


def initial_rate(loss: float) -> float:
    """10^(E / 2 − 1), E the decimal exponent of the initial loss: 1e-4 for a loss of 3e-6."""
    exponent = math.floor(math.log10(loss)) if 0 < loss < math.inf else 0
    return 10 ** (exponent / 2 - 1)


def train(units: Units, start: Start, schedule: Schedule, steps: int, restarts: int) -> Start:
    """Gradient descent on the units' squared errors from `start`; every unit ends with the best it met."""
    finite = torch.where(torch.isfinite(start.error), start.error, torch.zeros_like(start.error))
    rate = initial_rate(float(finite.sum() / units.counted.sum()))
    a, s, errors = start.a.clone(), start.s.clone(), start.error.clone()
    rows = max(1, TRAINED_AT_ONCE // units.X.shape[-1])
    for part in torch.arange(len(a), device=a.device).split(rows):
        few = replace(units, X=units.X[part], counted=units.counted[part], size=units.size[part])
        sign = a[part].sign()
        theta = torch.stack([a[part].abs().log(), s[part].log()])  # [2, part]
        best, best_error = theta.clone(), errors[part]
        for step_rate in [*rates(schedule, rate, steps, restarts), 0.0]:
            error, gradient = errors_and_gradient(few, sign * theta[0].exp(), theta[1].exp())
            lower = error < best_error  # False for NaN
            best = torch.where(lower, theta, best)
            best_error = torch.where(lower, error, best_error)
            step = torch.nan_to_num(step_rate * gradient, nan=0.0).clamp(-LARGEST_STEP, LARGEST_STEP)
            theta = (theta - step).clamp(-LARGEST_LOG, LARGEST_LOG)
        moved = best_error < errors[part]
        a[part] = torch.where(moved, sign * best[0].exp(), a[part])
        s[part] = torch.where(moved, best[1].exp(), s[part])
        errors[part] = best_error
    return Start(a=a, s=s, error=errors)


def errors_and_gradient(units: Units, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Summed squared errors [units] and their straight-through gradient [2, units] in log |a| and log s.

    The derivative of x̂ = g(q / s) / a, g = f⁻¹, takes that of u = f(x a) s for that of q where u is inside
    the codes and 0 where it is clipped.
    """
    forward, inverse = maps(units.function, units.faithful_guards)
    X, a, s = units.X, a[:, None], s[:, None]
    Z = X * a
    Y = forward(Z)
    U = Y * s
    clipped = U.clamp(*units.codes)
    Q = clipped.round()
    V = Q / s
    G = inverse(V)
    R = G / a - X
    if units.ragged:
        R = R * units.counted
    inside = clipped == U
    P = R * SLOPES[inverse](V, G)
    by_s = (P * (U * inside - Q)).sum(-1) / (a * s)[:, 0]
    if units.function.has_inner_scale:
        by_a = (P * SLOPES[forward](Z, Y) * X * inside).sum(-1) - (R * G).sum(-1) / a[:, 0]
    else:
        by_a = torch.zeros_like(by_s)
    return R.square().sum(-1), 2 * torch.stack([by_a, by_s])


@dataclass(kw_only=True, slots=True)
class Start:
    """Parameters of every unit and their summed squared error."""

    a: Tensor
    s: Tensor
    error: Tensor

    @classmethod
    def of(cls, units: Units, a: Tensor, s: Tensor) -> Start:
        """With the error computed."""
        return cls(a=a, s=s, error=units.errors(a, s))

    def or_better(self, other: Start) -> Start:
        """Each unit's better one."""
        lower = other.error < self.error
        return Start(
            a=torch.where(lower, other.a, self.a),
            s=torch.where(lower, other.s, self.s),
            error=torch.where(lower, other.error, self.error),
        )

    def total(self) -> float:
        """Summed squared error of all units, in the units of their normalised weights."""
        return float(self.error.double().sum())
