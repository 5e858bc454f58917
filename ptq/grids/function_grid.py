"""The grid of PTNQ: x̂ = f⁻¹(code / s) / a with f one of 19 scalar functions and (a, s) for every unit.

Fitting is in ptq/grids/function_fit. Values are tables of 2^b levels computed from (a, s), so that every
solver finds the nearest one whether or not f⁻¹ is monotone over the codes.
Shapes: W, codes [groups, out, in]; a, s [groups, out, units]; levels [groups, out, units, L].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptq.errors import InputError
from ptq.grids.affine import normal_equations, solve_ridged
from ptq.grids.function_fit import LARGEST_VALUE, Initialisation, Schedule, Start, Units, initialise, train
from ptq.grids.functions import Function, carries_sign, code_range, maps, sign_report
from ptq.grids.grid import check_bits, check_group_size, code_dtype
from ptq.grids.lookup import nearest_level
from ptq.storage import pack_codes, pack_parameter, unpack_codes, unpack_parameter

FUNCTIONS = list(Function)
ID_BITS = 8  # of the function id that every unit position of a layer has


@dataclass(kw_only=True, slots=True)
class FunctionPool:
    """How to fit PTNQ's functions to a weight matrix.

    One function, initialisation and schedule is one of the paper's methods. Of several, a method that selects
    by the task takes one of the `candidates`; a fit by itself, which has no task, takes the function with the
    least weight error before training, under the space search where that is listed, and trains it under the
    first schedule.
    """

    functions: list[Function]
    initialisations: list[Initialisation]
    schedules: list[Schedule]
    steps: int  # of training
    restarts: int  # of schedule cosine_restarts
    search_rounds: int
    search_candidates: int  # drawn in each round
    faithful_guards: bool  # false = powers and roots keep the sign of their argument
    nearest: bool  # false = round f(x · a) · s, the paper's; true = the nearest level
    normalise: bool  # fit each unit divided by its largest magnitude
    parameter_bits: int  # 16 or 32
    seed: int  # of the random initialisations

    def __post_init__(self) -> None:
        if not self.functions or not self.initialisations or not self.schedules:
            raise InputError(
                "functions, initialisations and schedules need one name or more each; got "
                f"{len(self.functions)}, {len(self.initialisations)} and {len(self.schedules)}"
            )
        if self.steps < 0 or self.restarts < 0:
            raise InputError(f"steps and restarts must not be negative; got {self.steps} and {self.restarts}")
        if self.search_rounds < 1 or self.search_candidates < 1:
            raise InputError(
                "search_rounds and search_candidates must be at least 1; "
                f"got {self.search_rounds} and {self.search_candidates}"
            )
        if self.parameter_bits not in (16, 32):
            raise InputError(f"parameter_bits must be 16 or 32; got {self.parameter_bits}")

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        if check_bits(bits) < 2:
            raise InputError(
                "bits must be at least 2 on PTNQ's functions: of one signed bit's codes −1 and 0, none is "
                f"positive; got {bits:g}; choose grid=affine for one bit"
            )
        check_group_size(group_size)

    def candidates(self) -> dict[str, FunctionPool]:
        """Every function × initialisation × schedule by name, as a pool of one."""
        return {
            f"{f.value}/{i.value}/{s.value}": replace(self, functions=[f], initialisations=[i], schedules=[s])
            for f, i, s in product(self.functions, self.initialisations, self.schedules)
        }

    def report(self) -> dict[str, Any]:
        """Which functions can and which cannot carry weights of both signs."""
        return {"signs": sign_report(self.functions, self.faithful_guards)}

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W will take on this grid, {"codes", "parameters"}, without solving anything."""
        self.check(bits, group_size)
        units = -(-W.shape[-1] // (group_size or W.shape[-1]))
        parameters = 2 * W.shape[0] * W.shape[1] * units * self.parameter_bits + units * ID_BITS
        return {"codes": W.numel() * int(bits), "parameters": parameters}

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> FunctionGrid:
        """Grid fitted to W [groups, out, in]; H is not looked at."""
        self.check(bits, group_size)
        groups, out, in_features = W.shape
        size = group_size or in_features
        units = -(-in_features // size)
        X = pad(W, (0, units * size - in_features), value=0.0)
        inside = torch.arange(units * size, device=W.device) < in_features
        X = torch.where(inside, X, W[..., -1:]).reshape(-1, size)  # filled up with the last weight
        counted = inside.to(W.dtype).reshape(units, size).repeat(groups * out, 1)
        largest = X.abs().amax(-1)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        if not self.normalise:
            largest = torch.ones_like(largest)
        problem = Units(
            X=X / largest[:, None],
            counted=counted,
            ragged=units * size > in_features,
            size=largest,
            function=self.functions[0],
            faithful_guards=self.faithful_guards,
            bits=int(bits),
        )
        problem, start = self._start(problem)
        best = train(problem, start, self.schedules[0], self.steps, self.restarts)
        shape = (groups, out, units)
        return FunctionGrid(
            a=(best.a / largest).reshape(shape),
            s=best.s.reshape(shape),
            functions=[problem.function] * units,
            faithful_guards=self.faithful_guards,
            nearest=self.nearest,
            bits=int(bits),
            in_features=in_features,
            group_size=group_size,
            parameter_bits=self.parameter_bits,
        ).as_stored()

    def _start(self, problem: Units) -> tuple[Units, Start]:
        """The function with the least error and its start; functions that lose the sign are not compared
        where both signs occur.
        """
        functions = self.functions
        if len(functions) > 1 and bool((problem.X < 0).any() & (problem.X > 0).any()):
            functions = [f for f in functions if carries_sign(f, self.faithful_guards)] or functions
        search = Initialisation.search
        kind = search if search in self.initialisations else self.initialisations[0]
        starts = []
        for function in functions:
            mapped = problem.mapped(function)
            start = initialise(mapped, kind, self.search_rounds, self.search_candidates, self.seed)
            starts.append((mapped, start))
        return min(starts, key=lambda pair: pair[1].total())


@dataclass(kw_only=True, slots=True)
class FunctionGrid:
    """Fitted functions. All unit positions of a layer have the same function unless their units were fitted
    one at a time.
    """

    a: Tensor  # [groups, out, units]
    s: Tensor
    functions: list[Function]  # of each unit position
    faithful_guards: bool
    nearest: bool
    bits: int
    in_features: int
    group_size: int | None
    parameter_bits: int
    levels: Tensor = field(init=False)  # [groups, out, units, L], by code
    ordered: Tensor = field(init=False)  # the same, increasing
    order: Tensor = field(init=False)  # [groups, out, units, L] code − code_min of each ordered level
    code_min: int = field(init=False)
    code_max: int = field(init=False)

    def __post_init__(self) -> None:
        ranges = [code_range(f, self.faithful_guards, self.bits) for f in self.functions]
        # positions may differ in sign; codes are counted from the first one's minimum
        self.code_min, self.code_max = ranges[0]
        columns = []
        for unit, (function, (low, high)) in enumerate(zip(self.functions, ranges, strict=True)):
            _, inverse = maps(function, self.faithful_guards)
            codes = torch.arange(low, high + 1, device=self.s.device, dtype=self.s.dtype)
            x = inverse(codes / self.s[..., unit, None]) / self.a[..., unit, None]
            columns.append(x.clamp(-LARGEST_VALUE, LARGEST_VALUE))
        self.levels = torch.stack(columns, -2)
        self.ordered, self.order = self.levels.detach().sort(dim=-1, stable=True)

    @property
    def shared(self) -> bool:
        """Every row has its own parameters."""
        return False

    def _units(self, x: Tensor) -> list[Tensor]:
        """x [groups, out, in] unit by unit."""
        return list(x.split(self.group_size or self.in_features, dim=-1))

    def round(self, W: Tensor) -> Tensor:
        """Codes of f(w · a) · s rounded, or of the nearest levels, [groups, out, in]."""
        parts = []
        for unit, x in enumerate(self._units(W)):
            if self.nearest:
                index = nearest_level(x, self.ordered[..., unit, :])
                parts.append(self.order[..., unit, :].gather(-1, index))
                continue
            forward, _ = maps(self.functions[unit], self.faithful_guards)
            low, high = code_range(self.functions[unit], self.faithful_guards, self.bits)
            u = forward(x * self.a[..., unit, None]) * self.s[..., unit, None]
            parts.append(u.round().clamp(low, high) - low)
        return (torch.cat(parts, -1) + self.code_min).to(code_dtype(self))

    def values(self, codes: Tensor) -> Tensor:
        index = codes.long() - self.code_min
        parts = [self.levels[..., unit, :].gather(-1, c) for unit, c in enumerate(self._units(index))]
        return torch.cat(parts, -1)

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        """The nearest level, whatever `nearest` says: solvers choose values, not codes."""
        size = self.group_size or self.in_features
        if isinstance(column, int):
            ordered, order = self.ordered[..., column // size, :], self.order[..., column // size, :]
        else:
            unit = (column // size)[..., None, None].expand(*column.shape, 1, self.ordered.shape[-1])
            ordered = self.ordered.gather(-2, unit)[..., 0, :]
            order = self.order.gather(-2, unit)[..., 0, :]
        index = nearest_level(w[..., None], ordered)
        code = order.gather(-1, index)[..., 0] + self.code_min
        return code.to(w.dtype), ordered.gather(-1, index)[..., 0]

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> FunctionGrid:
        """Least squares for a factor on the values of each unit, jointly over a row: a becomes a / factor.

        A row keeps its parameters where the stored result would not lower its objective.
        """
        H = H.double()
        W_hat = self.values(codes).double()
        M, v = normal_equations([W_hat], W.double(), H, self.group_size)
        factor = solve_ridged(M, v, torch.ones_like(self.a, dtype=torch.float64))
        usable = torch.isfinite(factor).all(-1, keepdim=True) & (factor.abs() > 1e-6).all(-1, keepdim=True)
        a = torch.where(usable, self.a / factor.to(self.a.dtype), self.a)
        new = replace(self, a=a).as_stored()
        before, after = W.double() - W_hat, W.double() - new.values(codes).double()
        lower = ((after @ H) * after).sum(-1) < ((before @ H) * before).sum(-1)
        return new.where(lower, self)

    def where(self, better: Tensor, other: FunctionGrid) -> FunctionGrid:
        """Both grids are of one function: parameters of one, or of the other."""
        mask = better[..., None]
        return replace(self, a=torch.where(mask, self.a, other.a), s=torch.where(mask, self.s, other.s))

    def scaled(self, factor: float) -> FunctionGrid:
        return replace(self, a=self.a / factor).as_stored()

    def replace_unit(self, unit: int, other: FunctionGrid) -> FunctionGrid:
        a, s = self.a.clone(), self.s.clone()
        a[..., unit], s[..., unit] = other.a[..., 0], other.s[..., 0]
        functions = [*self.functions[:unit], other.functions[0], *self.functions[unit + 1 :]]
        return replace(self, a=a, s=s, functions=functions)

    def parameters(self) -> dict[str, Tensor]:
        return {"a": self.a, "s": self.s}

    def with_parameters(self, parameters: dict[str, Tensor]) -> FunctionGrid:
        return replace(self, a=parameters["a"], s=parameters["s"])

    def as_stored(self) -> FunctionGrid:
        def stored(parameter: Tensor) -> Tensor:
            return unpack_parameter(*pack_parameter(parameter, self.parameter_bits)).to(parameter.dtype)

        return replace(self, a=_nonzero(stored(self.a), self.a), s=_nonzero(stored(self.s), self.s))

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        a, a_exponent = pack_parameter(self.a, self.parameter_bits)
        s, s_exponent = pack_parameter(self.s, self.parameter_bits)
        ids = torch.tensor([FUNCTIONS.index(f) for f in self.functions], dtype=torch.uint8)
        tensors = {
            "codes": pack_codes(codes.to(torch.int32) - self.code_min, self.bits),
            "a": a,
            "s": s,
            "function": ids.to(self.a.device),
        }
        facts: dict[str, Any] = {
            "grid": "ptq.grids.function_grid.FunctionGrid",
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(codes.shape),
            "parameter_shape": list(self.a.shape),
            "parameter_bits": self.parameter_bits,
            "a_exponent": a_exponent,
            "s_exponent": s_exponent,
            "faithful_guards": self.faithful_guards,
            "nearest": self.nearest,
        }
        return tensors, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[FunctionGrid, Tensor]:
        """The grid and the codes that `storage` wrote."""
        shape: tuple[int, ...] = tuple(facts["shape"])
        unit_shape: tuple[int, ...] = tuple(facts["parameter_shape"])
        bits = int(facts["bits"])
        grid = cls(
            a=unpack_parameter(tensors["a"], facts["a_exponent"]).reshape(unit_shape),
            s=unpack_parameter(tensors["s"], facts["s_exponent"]).reshape(unit_shape),
            functions=[FUNCTIONS[i] for i in tensors["function"].tolist()],
            faithful_guards=bool(facts["faithful_guards"]),
            nearest=bool(facts["nearest"]),
            bits=bits,
            in_features=shape[-1],
            group_size=facts["group_size"],
            parameter_bits=int(facts["parameter_bits"]),
        )
        codes = unpack_codes(tensors["codes"], bits, shape) + grid.code_min
        return grid, codes.to(code_dtype(grid))

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        parameters = 2 * self.a.numel() * self.parameter_bits + len(self.functions) * ID_BITS
        return {"codes": codes.numel() * self.bits, "parameters": parameters}


def _nonzero(stored: Tensor, exact: Tensor) -> Tensor:
    """A parameter too small beside the layer's largest for 16 bits becomes the least one that is not 0."""
    if bool((stored != 0).all()):
        return stored
    least = stored.abs()[stored != 0].min() if bool((stored != 0).any()) else exact.abs().max()
    sign = torch.where(exact < 0, -torch.ones_like(exact), torch.ones_like(exact))
    return torch.where(stored == 0, sign * least, stored)
