"""Training of codes: the quantized layers of a module made soft, trained so that the module gives what it is
wanted to give, hardened, and put back.

Only hard codes on grids as stored are ever compared or kept.
Shapes: W, T, codes [groups, out, in].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptq.activations import ActivationQuantizer
from ptq.descent import Descent, Schedule, Stepper
from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.layers import QuantizedLayer, apply_weight, names_of, replace_module, shaped, weight_matrix
from ptq.report import TuningReport
from ptq.solvers.grid_variables import GridForm, GridVariables
from ptq.solvers.soft_rounding import Softening, place, relax
from ptq.tuning import is_norm

CURVE_POINTS = 100  # of the losses that a record keeps
PROBED = 4  # pieces that the gradients of a selection are taken from


class Variable(Enum):
    """What is trained."""

    rounding = "rounding"  # the choice of codes
    grid = "grid"  # scales, offsets, levels, exponents
    bias = "bias"  # of the quantized layers, and of the norms, into which a bias before them can be folded
    norm = "norm"  # the norms' weights
    activation = "activation"  # steps of the input quantizers


class Selection(Enum):
    """Which weights get a learned rounding; the others keep their first codes."""

    all = "all"
    ambiguous = "ambiguous"  # those nearest to the middle between two codes
    magnitude = "magnitude"  # the largest
    gradient = "gradient"  # those whose quantized value has the largest gradient
    random = "random"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rate of each kind of variable; grids' are relative to the parameters' size."""

    rounding: float
    grid: float
    bias: float
    activation: float

    def __post_init__(self) -> None:
        if min(self.rounding, self.grid, self.bias, self.activation) <= 0:
            raise InputError(f"learning rates must be positive; got {self}; leave out variables instead")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the codes of a module are trained."""

    softening: Softening
    variables: list[Variable]
    grid_form: GridForm
    descent: Descent
    schedule: Schedule  # of the rounding
    other_schedule: Schedule  # of everything else
    rates: Rates
    selection: Selection
    selected: float  # fraction of each layer's weights
    checks: int  # times that the hard codes are measured, the last one at the end
    keep_best: bool  # end with the best of what was measured, the start included

    def __post_init__(self) -> None:
        if Variable.rounding not in self.variables:
            raise InputError("variables must name rounding; tuning=block trains all but the codes")
        if not 0 < self.selected <= 1:
            raise InputError(f"selected must be a fraction in (0, 1]; got {self.selected}")
        if self.checks < 1:
            raise InputError(f"checks must be at least 1; got {self.checks}")

    def trains(self, variable: Variable) -> bool:
        return variable in self.variables


class SoftLayer(nn.Module):
    """A quantized layer whose codes are still being chosen."""

    def __init__(self, layer: QuantizedLayer, W: Tensor, recipe: Recipe, generator: torch.Generator) -> None:
        super().__init__()
        start, codes = layer.grid_and_codes()
        self.geometry, self.bias = layer.facts["geometry"], layer.bias
        self.input_quantizer = layer.input_quantizer
        self.W = W.to(codes.device, torch.float32)
        self.grid_variables = GridVariables(start, recipe.grid_form, recipe.trains(Variable.grid))
        learned = selected(recipe.selection, recipe.selected, start, self.W, None, generator)
        self.relaxation = relax(recipe.softening, start, self.W, codes, learned)
        self.fixed: tuple[Tensor, Grid] | None = codes, start  # hard codes, where they are asked for
        self.first = self.fixed
        self.slope: Tensor | None = None  # where the gradient of Ŵ is asked for
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """Soft, or where `fixed` is set hard, Ŵ in the shape of the float layer's weight."""
        if self.fixed is not None:
            return shaped(self.fixed[1].values(self.fixed[0]), self.geometry)
        W_hat = self.relaxation.values(self.grid_variables.grid())
        if self.slope is not None:
            W_hat.register_hook(self.slope.add_)
        return shaped(W_hat, self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return apply_weight(x, self.weight, self.bias, self.geometry)

    @torch.no_grad()
    def hard(self) -> tuple[Tensor, Grid]:
        """Codes and stored grid that the layer would end with now."""
        grid = self.grid_variables.stored()
        return self.relaxation.codes(self.grid_variables.grid()), grid

    def quantized(self) -> QuantizedLayer:
        """The layer with the codes and the grid of `fixed`."""
        assert self.fixed is not None
        codes, grid = self.fixed
        tensors, facts = grid.storage(codes)
        facts["geometry"] = self.geometry
        made = QuantizedLayer(tensors, facts, self.bias, self.input_quantizer)
        return made.to(codes.device).train(self.training)


def selected(
    selection: Selection,
    fraction: float,
    grid: Grid,
    W: Tensor,
    slope: Tensor | None,
    generator: torch.Generator,
) -> Tensor | None:
    """Mask of the weights to learn, None for all; by gradient only once `slope`, that of Ŵ, is known."""
    if selection is Selection.all or fraction >= 1 or (selection is Selection.gradient and slope is None):
        return None
    if selection is Selection.ambiguous:
        score = 0.5 - (place(grid, W) % 1 - 0.5).abs()
    elif selection is Selection.magnitude:
        score = W.abs()
    elif selection is Selection.gradient:
        assert slope is not None
        score = slope.abs()
    else:
        score = torch.rand(W.shape, generator=generator).to(W.device)
    count = max(1, round(fraction * W.numel()))
    mask = torch.zeros(W.numel(), dtype=torch.bool, device=W.device)
    mask[score.flatten().topk(count).indices] = True
    return mask.reshape(W.shape)


class Trainer:
    """Trains the soft layers of one module; the module is changed in place."""

    def __init__(
        self, module: nn.Module, original: nn.Module, recipe: Recipe, *, name: str, seed: int, progress: bool
    ) -> None:
        self.module, self.recipe, self.name, self.seed, self.progress = module, recipe, name, seed, progress
        generator = torch.Generator().manual_seed(seed)
        self.layers: list[SoftLayer] = []
        for layer_name, layer in list(module.named_modules()):
            if isinstance(layer, QuantizedLayer):
                W = weight_matrix(original.get_submodule(layer_name))
                soft = SoftLayer(layer, W, recipe, generator)
                self.layers.append(soft)
                for alias in names_of(module, layer):
                    replace_module(module, alias, soft)
        self.generator = generator

    def others(self) -> dict[Variable, list[nn.Parameter]]:
        """Float parameters that are trained beside codes and grids, each once."""
        found: dict[Variable, list[nn.Parameter]] = {v: [] for v in Variable}
        for part in self.module.modules():
            if isinstance(part, SoftLayer) and part.bias is not None:
                found[Variable.bias].append(part.bias)
            elif isinstance(part, ActivationQuantizer) and part.scale is not None:
                found[Variable.activation].append(part.scale)
            elif is_norm(part):
                for name, p in part.named_parameters(recurse=False):
                    found[Variable.bias if name == "bias" else Variable.norm].append(p)
        return {v: list({id(p): p for p in ps}.values()) for v, ps in found.items()}

    def run(
        self, pieces: Sequence[Any], loss: Callable[[Any], Tensor], plain: Callable[[Any], Tensor]
    ) -> TuningReport:
        """Train on random pieces; `loss` is lowered, `plain`, the loss without augmentation, is measured.

        Soft layers are replaced by quantized ones at the end.
        """
        started = time.perf_counter()
        recipe = self.recipe
        flags = {p: p.requires_grad for p in self.module.parameters()}
        for p in self.module.parameters():
            p.requires_grad_(False)
        others = self.others()
        free = [p for v in recipe.variables for p in others[v]]
        best_loss = before = self.measure(pieces, plain)
        best = first = self._state(free)
        if recipe.selection is Selection.gradient and recipe.selected < 1:
            self._select(pieces[:PROBED], plain)
        stepper = self._stepper(others)
        losses: list[float] = []
        total = recipe.descent.iterations
        checks = {round(total * (k + 1) / recipe.checks) for k in range(recipe.checks)}
        bar = tqdm(total=total, desc=f"round {self.name}", unit="step", disable=not self.progress, delay=1)
        order: list[int] = []
        after, undecided, steps = before, 0.0, 0
        for layer in self.layers:
            layer.fixed = None
        for step in range(total):
            if not order:
                order = torch.randperm(len(pieces), generator=self.generator).tolist()
            value = self._step(stepper, step, loss(pieces[order.pop()]))
            if not math.isfinite(value):
                break
            losses.append(value)
            steps += 1
            bar.update()
            bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            if step + 1 in checks:
                undecided = max((layer.relaxation.undecided() for layer in self.layers), default=0.0)
                for layer in self.layers:
                    layer.fixed = layer.hard()
                after = self.measure(pieces, plain)
                if not recipe.keep_best or after < best_loss:
                    best_loss, best = after, self._state(free)
                for layer in self.layers:
                    layer.fixed = None
        bar.close()
        self._restore(best, free)
        for p in self.module.parameters():
            p.requires_grad_(flags.get(p, False))
        for layer in self.layers:
            quantized = layer.quantized()
            for alias in names_of(self.module, layer):
                replace_module(self.module, alias, quantized)
        return TuningReport(
            unit=self.name,
            loss_before=before,
            loss_after=best_loss,
            kept=best is not first,
            steps=steps,
            seconds=time.perf_counter() - started,
            losses=curve(losses),
            undecided=undecided,
        )

    def _stepper(self, others: dict[Variable, list[nn.Parameter]]) -> Stepper:
        recipe, rates = self.recipe, self.recipe.rates
        rounding = [layer.relaxation.V.requires_grad_(True) for layer in self.layers]
        grids = [v for layer in self.layers for v in layer.grid_variables.requires_grad()]
        groups: list[tuple[list[Tensor], float, Schedule]] = [
            (rounding, rates.rounding, recipe.schedule),
            (grids, rates.grid, recipe.other_schedule),
        ]
        rate = {
            Variable.bias: rates.bias,
            Variable.norm: rates.bias,
            Variable.activation: rates.activation,
        }
        for variable, at in rate.items():
            if recipe.trains(variable):
                trained: list[Tensor] = [p.requires_grad_(True) for p in others[variable]]
                groups.append((trained, at, recipe.other_schedule))
        return recipe.descent.start(groups)

    def _step(self, stepper: Stepper, step: int, value: Tensor) -> float:
        """One descent step; returns the loss without the regulariser."""
        total = max(1, self.recipe.descent.iterations)
        objective = value
        for layer in self.layers:
            extra = layer.relaxation.regulariser(step / total)
            if extra is not None:
                objective = objective + extra
        plain = float(value.detach())
        if not math.isfinite(plain):
            return plain
        stepper.zero_grad()
        objective.backward()
        stepper.step(step)
        with torch.no_grad():
            for layer in self.layers:
                layer.grid_variables.advance()
                layer.relaxation.advance((step + 1) / total, layer.grid_variables.grid())
        return plain

    def _select(self, pieces: Sequence[Any], plain: Callable[[Any], Tensor]) -> None:
        """Learn the weights whose soft value has the largest gradient at the start."""
        for layer in self.layers:
            layer.fixed, layer.slope = None, torch.zeros_like(layer.W)
            layer.relaxation.V.requires_grad_(True)
        for piece in pieces:
            plain(piece).backward()
        for layer in self.layers:
            layer.relaxation.V.grad = None
            layer.relaxation.learned = selected(
                self.recipe.selection,
                self.recipe.selected,
                layer.grid_variables.start,
                layer.W,
                layer.slope,
                self.generator,
            )
            layer.slope, layer.fixed = None, layer.first

    @torch.no_grad()
    def measure(self, pieces: Sequence[Any], plain: Callable[[Any], Tensor]) -> float:
        """Mean loss over all pieces with the hard codes that are set."""
        return sum(float(plain(piece)) for piece in pieces) / max(1, len(pieces))

    def _state(self, free: list[nn.Parameter]) -> tuple[list[tuple[Tensor, Grid]], list[Tensor]]:
        hard = []
        for layer in self.layers:
            assert layer.fixed is not None
            hard.append(layer.fixed)
        return hard, [p.detach().clone() for p in free]

    @torch.no_grad()
    def _restore(
        self, state: tuple[list[tuple[Tensor, Grid]], list[Tensor]], free: list[nn.Parameter]
    ) -> None:
        for layer, fixed in zip(self.layers, state[0], strict=True):
            layer.fixed = fixed
        for p, value in zip(free, state[1], strict=True):
            p.copy_(value)


def curve(losses: list[float]) -> list[float]:
    """At most CURVE_POINTS means of equally long stretches."""
    if len(losses) <= CURVE_POINTS:
        return losses
    size = len(losses) / CURVE_POINTS
    parts = [losses[int(k * size) : int((k + 1) * size)] for k in range(CURVE_POINTS)]
    return [sum(part) / len(part) for part in parts]
