"""Relaxations of the choice of codes: a real variable per weight, the soft Ŵ it gives, the codes it ends as.

All of them work in code space, so that they serve every grid: a weight's place is the code below it plus the
fraction of the way to the next code's value, both values being the grid's own. A soft Ŵ is differentiable in
the variables V and in whatever parameters the grid has been given, so that scales, offsets, levels and
exponents can be trained along with the codes. The codes between which a weight chooses are those of the grid
as it was at the start, except where a relaxation says that they move.

Sources: AdaRound (Nagel et al., arXiv 2004.10568) for the rectified sigmoid, with the constants of its public
implementations; SignRound (arXiv 2309.05516) for the offset V in [−½, ½]; TesseraQ (arXiv 2410.19103) for
progressive hardening; AdaQuant (arXiv 2006.10518) for moved weights; FlexRound (arXiv 2306.00317) for
division; NUPES (arXiv 2308.05600), summary only, for codes that go over the whole range.
Shapes: T, V, codes, Ŵ [groups, out, in].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ptq.errors import InputError
from ptq.grids.grid import Grid, code_dtype
from ptq.grids.row_widths import RowWidthsGrid

ZETA, GAMMA = 1.1, -0.1  # the stretched sigmoid reaches 0 and 1 at finite V
UNDECIDED = 0.05  # a weight is undecided while its h is farther than this from 0 and from 1
MOST_WAY = 0.4999  # a place rounds to the nearest code, whatever a grid calls nearest
TINY = 1e-12  # least |2h − 1| that a power is taken of
FARTHEST_START = 0.45  # of a place from its starting code, where the codes are given


class Kind(Enum):
    """A relaxation."""

    sigmoid = "sigmoid"  # h(V) between two codes, pushed apart by a regulariser (AdaRound)
    progressive = "progressive"  # the same without regulariser: the most decided are settled bit by bit
    clipped_offset = "clipped_offset"  # h = V itself, clipped to [0, 1], rounded straight-through
    signed_offset = "signed_offset"  # place + V with V in [−½, ½], rounded straight-through (SignRound)
    full_range = "full_range"  # the place itself, rounded straight-through: may move by several codes
    weights = "weights"  # place of W + V, rounded straight-through (AdaQuant)
    division = "division"  # place of W / exp V, rounded straight-through (FlexRound)


@dataclass(frozen=True, kw_only=True)
class Softening:
    """Which relaxation, and its constants."""

    kind: Kind
    regularisation: float  # λ, of the sum over weights of 1 − |2h − 1|^β
    beta: tuple[float, float]  # β after the warm-up and at the end, linear between
    warmup: float  # fraction of the steps without regulariser
    soft_fractions: list[float]  # still unsettled in each of as many equal parts of a progressive run

    def __post_init__(self) -> None:
        if self.regularisation < 0 or not 0 <= self.warmup < 1 or min(self.beta) <= 0:
            raise InputError(
                "regularisation must not be negative, warmup in [0, 1) and both betas positive; got "
                f"{self.regularisation}, {self.warmup} and {list(self.beta)}"
            )
        falling = sorted(self.soft_fractions, reverse=True)
        if self.kind is Kind.progressive and (
            not falling or falling != self.soft_fractions or falling[0] > 1 or falling[-1] < 0
        ):
            raise InputError(
                "relaxation=progressive needs soft_fractions that fall within [0, 1]; "
                f"got {self.soft_fractions}"
            )


def place(grid: Grid, T: Tensor) -> Tensor:
    """Where T lies among the grid's codes, [groups, out, in] in T's dtype.

    The nearest code plus at most half the way to a neighbour on T's other side. Beyond the ends the last step
    goes on, so that a clipped weight lies outside [code_min, code_max].
    """
    codes = grid.round(T)
    value = grid.values(codes)
    rest = T - value
    least, most = _limits(grid)
    way = torch.zeros_like(T)
    for direction in (-1, 1):
        end = most if direction > 0 else least
        neighbour = grid.values((codes + direction).clamp(least, most)) - value
        inwards = grid.values((codes - direction).clamp(least, most)) - value
        fraction = _ratio(rest, neighbour)
        way = torch.where((fraction > 0) & (way == 0), direction * fraction.clamp_max(MOST_WAY), way)
        beyond = -_ratio(rest, inwards)  # in steps of the last pair of codes
        way = torch.where((codes == end) & (beyond > 0), direction * beyond, way)
    return codes.to(T.dtype) + way


def _limits(grid: Grid) -> tuple[Any, Any]:
    """The least and the greatest code: two numbers, or two tensors [groups, out, 1] where rows differ."""
    return grid.code_limits() if isinstance(grid, RowWidthsGrid) else (grid.code_min, grid.code_max)


def _last_below(least: Any, most: Any) -> Any:
    """The greatest code that has another above it."""
    return torch.maximum(most - 1, least) if isinstance(most, Tensor) else max(most - 1, least)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def start_place(grid: Grid, T: Tensor, codes: Tensor) -> Tensor:
    """A place that rounds to `codes` and lies from there towards T: T's own where T rounds to them."""
    own = place(grid, T)
    given = codes.to(T.dtype)
    away = (own - given).clamp(-FARTHEST_START, FARTHEST_START)
    return torch.where(grid.round(T) == codes, own, given + away)


class Relaxation(ABC):
    """One layer's weights on the way to their codes.

    Weights outside `learned`, and those that have been settled, have the value of `settled`.
    """

    def __init__(self, grid: Grid, T: Tensor, codes: Tensor, learned: Tensor | None) -> None:
        self.least, self.most = _limits(grid)
        self.dtype = code_dtype(grid)
        self.settled = codes.clone()
        self.learn(learned)
        self.V = torch.zeros_like(T)  # the variables; the trainer asks for their gradient

    def learn(self, mask: Tensor | None) -> None:
        """From now on learn the weights of the mask, None for all; the others keep their codes."""
        self.learned = mask
        self.count = self.settled.numel() if mask is None else int(mask.sum())

    def values(self, grid: Grid) -> Tensor:
        """Soft Ŵ [groups, out, in] on a grid that started as the one given."""
        soft = self._soft(grid)
        return soft if self.learned is None else torch.where(self.learned, soft, grid.values(self.settled))

    def codes(self, grid: Grid) -> Tensor:
        """The codes that the weights would end as now."""
        hard = self._hard(grid).clamp(self.least, self.most).to(self.dtype)
        return hard if self.learned is None else torch.where(self.learned, hard, self.settled)

    def state(self) -> list[Tensor]:
        """All that training changes, in place."""
        return [self.V]

    @abstractmethod
    def _soft(self, grid: Grid) -> Tensor:
        """Soft Ŵ of all weights."""

    @abstractmethod
    def _hard(self, grid: Grid) -> Tensor:
        """Codes of all weights, not yet clipped."""

    def regulariser(self, progress: float) -> Tensor | None:
        """What is added to the loss at this fraction of the steps."""
        return None

    @abstractmethod
    def advance(self, progress: float, grid: Grid) -> None:
        """After a step: variables back into their range, decided weights settled."""

    def undecided(self) -> float:
        """Of the weights to learn, the fraction whose soft value is not that of a code."""
        return 0.0


class Between(Relaxation):
    """h of the way from one code to the next: by a stretched sigmoid, or by V itself, straight-through."""

    def __init__(
        self,
        grid: Grid,
        T: Tensor,
        codes: Tensor,
        learned: Tensor | None,
        softening: Softening,
        start: Tensor,
    ) -> None:
        self.softening = softening
        super().__init__(grid, T, codes, learned)
        self.lower = start.floor()
        h = start - self.lower
        # clipped after h is added: what lies outside the range stays at its end, whatever h is
        self.below, self.above = (
            c.clamp(self.least, self.most).to(self.dtype) for c in (self.lower, self.lower + 1)
        )
        self.free = self.below != self.above
        self.ends = grid, grid.values(self.below), grid.values(self.above)  # kept while the grid stays
        self.sigmoid = softening.kind is not Kind.clipped_offset
        self.used: tuple[int, Tensor] | None = None  # h of the last soft values, and the version of V then
        self.V = -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1) if self.sigmoid else h
        if softening.kind is Kind.progressive:
            self.advance(0.0, grid)

    def learn(self, mask: Tensor | None) -> None:
        if self.softening.kind is Kind.progressive:  # which takes weights out of the mask as it goes
            mask = torch.ones_like(self.settled, dtype=torch.bool) if mask is None else mask.clone()
        super().learn(mask)

    def state(self) -> list[Tensor]:
        if self.softening.kind is Kind.progressive and self.learned is not None:
            return [self.V, self.settled, self.learned]
        return [self.V]

    def h(self) -> Tensor:
        """Fraction of the way, [groups, out, in] in [0, 1]."""
        if self.sigmoid:
            function: Any = _StretchedSigmoid.apply
            stretched: Tensor = function(self.V)
            return stretched
        h = self.V.clamp(0, 1)
        return (h >= 0.5).to(h.dtype) + h - h.detach()

    def _soft(self, grid: Grid) -> Tensor:
        h = self.h()
        self.used = (self.V._version, h) if h.requires_grad else None
        if grid is self.ends[0]:
            return torch.lerp(self.ends[1], self.ends[2], h)
        return torch.lerp(grid.values(self.below), grid.values(self.above), h)

    def _hard(self, grid: Grid) -> Tensor:
        return torch.where(self.h() >= 0.5, self.above, self.below)

    def regulariser(self, progress: float) -> Tensor | None:
        s = self.softening
        if s.kind is not Kind.sigmoid or s.regularisation == 0 or progress < s.warmup:
            return None
        start, end = s.beta
        beta = start + (end - start) * (progress - s.warmup) / (1 - s.warmup)
        used, self.used = self.used, None
        h = used[1] if used is not None and used[0] == self.V._version else self.h()
        function: Any = _Undecidedness.apply
        total: Tensor = function(h, self.learned, beta)
        return s.regularisation * total

    @torch.no_grad()
    def advance(self, progress: float, grid: Grid) -> None:
        if not self.sigmoid:
            self.V.clamp_(0, 1)
        if self.softening.kind is not Kind.progressive:
            return
        parts = self.softening.soft_fractions
        wanted = parts[int(progress * len(parts))] if progress < 1 else 0.0
        learned = self.learned
        assert learned is not None
        excess = int(learned.sum()) - math.ceil(wanted * self.count)
        if excess > 0:
            decided = torch.where(learned, (self.h() - 0.5).abs(), -torch.ones_like(self.V)).flatten()
            chosen = torch.zeros_like(learned).flatten()
            chosen[decided.topk(excess).indices] = True
            chosen = chosen.reshape(learned.shape)
            self.settled[chosen] = self._hard(grid)[chosen]
            learned &= ~chosen

    def undecided(self) -> float:
        if not self.sigmoid:
            return 0.0
        h = self.h()
        open_ = self.free & (h > UNDECIDED) & (h < 1 - UNDECIDED)
        if self.learned is not None:
            open_ = open_ & self.learned
        return float(open_.sum()) / max(1, self.count)


class _StretchedSigmoid(torch.autograd.Function):
    """clip(σ(V) (ζ − γ) + γ, 0, 1), with one pass fewer over the weights than its parts take each way."""

    @staticmethod
    def forward(ctx: Any, V: Tensor) -> Tensor:
        s = torch.sigmoid(V)
        h = (s * (ZETA - GAMMA)).add_(GAMMA)
        ctx.save_for_backward(s, (h > 0) & (h < 1))
        return h.clamp_(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # one input
        s, inside = ctx.saved_tensors
        return (1 - s).mul_(s).mul_(ZETA - GAMMA).mul_(inside).mul_(gradient)


class _Undecidedness(torch.autograd.Function):
    """Σ 1 − |2h − 1|^β over the learned weights; a power by logarithm costs a tenth of a general one."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, learned: Tensor | None, beta: float) -> Tensor:
        u = 2 * h - 1
        size = u.abs().clamp_min_(TINY)
        power = size.log().mul_(beta).exp_()
        away = 1 - power
        slope = power.div_(size).mul_(u.sign_()).mul_(-2 * beta)
        if learned is not None:
            away, slope = away * learned, slope * learned
        ctx.save_for_backward(slope)
        return away.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # one output
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None


class FullRange(Relaxation):
    """The place itself is the variable: codes may move as far as the range goes."""

    def __init__(self, grid: Grid, T: Tensor, codes: Tensor, learned: Tensor | None, start: Tensor) -> None:
        super().__init__(grid, T, codes, learned)
        self.V = start.clamp(self.least, self.most)

    def _soft(self, grid: Grid) -> Tensor:
        with torch.no_grad():
            below = self.V.floor().clamp(self.least, _last_below(self.least, self.most))
            above = (below + 1).clamp(self.least, self.most)
            hard = (self.V - below >= 0.5).to(self.V.dtype)
        low, high = grid.values(below.to(self.dtype)), grid.values(above.to(self.dtype))
        step = (high - low).detach()
        return low + hard * (high - low) + step * (self.V - self.V.detach())

    def _hard(self, grid: Grid) -> Tensor:
        below = self.V.floor()
        return below + (self.V - below >= 0.5).to(self.V.dtype)  # halves up, as in the soft value

    @torch.no_grad()
    def advance(self, progress: float, grid: Grid) -> None:
        self.V.clamp_(self.least, self.most)


class Moving(Relaxation):
    """Rounded anew in every step on the grid as it then is, straight-through for V and for the parameters.

    The straight-through gradient of a parameter is that of the rounding error: with a code's value a(p) and
    the value b(p) of the place before rounding, ∂a/∂p − ∂b/∂p inside the range, ∂a/∂p where it clips. On an
    affine grid that is the gradient of LSQ (arXiv 1902.08153).
    """

    def __init__(
        self,
        grid: Grid,
        T: Tensor,
        codes: Tensor,
        learned: Tensor | None,
        softening: Softening,
        start: Tensor,
    ) -> None:
        super().__init__(grid, T, codes, learned)
        self.T, self.kind = T, softening.kind
        # V = 0 rounds T to the nearest code; other starting codes stay this far from it
        self.shift = start - place(grid, T)

    def _moved(self) -> Tensor:
        """The weights that are rounded."""
        if self.kind is Kind.weights:
            return self.T + self.V
        return self.T * torch.exp(-self.V) if self.kind is Kind.division else self.T

    def _place(self, grid: Grid, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Place of the moved weights by themselves, and with shift and offset."""
        own = place(grid, moved)
        return own, own + self.shift + (self.V if self.kind is Kind.signed_offset else 0)

    def _soft(self, grid: Grid) -> Tensor:
        moved = self._moved()
        with torch.no_grad():
            own, whole = self._place(grid, moved)
            hard = _nearest_code(whole, self.least, self.most)
            inside = (whole >= self.least - 0.5) & (whole <= self.most + 0.5)
        before = _value_at(grid, own)
        soft = grid.values(hard.to(self.dtype)) - torch.where(inside, before - before.detach(), 0.0)
        if self.kind is Kind.signed_offset:
            with torch.no_grad():
                step = _step(grid, whole)
            through = step * (self.V - self.V.detach())
        else:
            through = moved - moved.detach()
        return soft + torch.where(inside, through, 0.0)

    def _hard(self, grid: Grid) -> Tensor:
        return _nearest_code(self._place(grid, self._moved())[1], self.least, self.most)

    @torch.no_grad()
    def advance(self, progress: float, grid: Grid) -> None:
        if self.kind is Kind.signed_offset:
            self.V.clamp_(-0.5, 0.5)


def _nearest_code(whole: Tensor, least: Any, most: Any) -> Tensor:
    return whole.round().clamp(least, most)


def _pair(grid: Grid, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes on both sides of a place within the range, and the way from the first."""
    least, most = _limits(grid)
    below = whole.floor().clamp(least, _last_below(least, most))
    above = (below + 1).clamp(least, most)
    return below.to(code_dtype(grid)), above.to(code_dtype(grid)), whole - below


def _value_at(grid: Grid, whole: Tensor) -> Tensor:
    """Value at a place, on the line through its two codes."""
    below, above, way = _pair(grid, whole.detach())
    low = grid.values(below)
    return low + way * (grid.values(above) - low)


def _step(grid: Grid, whole: Tensor) -> Tensor:
    """Difference of the values on both sides of a place."""
    below, above, _ = _pair(grid, whole)
    return grid.values(above) - grid.values(below)


def relax(
    softening: Softening, grid: Grid, T: Tensor, codes: Tensor, learned: Tensor | None = None
) -> Relaxation:
    """The relaxation of `softening` for target weights T on a fitted grid, starting from `codes`.

    Where these are the nearest codes the soft weights start at T; elsewhere they start near the codes'
    values, on T's side. Weights outside the mask `learned` keep the given codes.
    """
    start = start_place(grid, T, codes)
    if softening.kind in (Kind.sigmoid, Kind.progressive, Kind.clipped_offset):
        return Between(grid, T, codes, learned, softening, start)
    if softening.kind is Kind.full_range:
        return FullRange(grid, T, codes, learned, start)
    return Moving(grid, T, codes, learned, softening, start)
