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

from ptq.activations import ActivationQuantizer, LearnedSteps
from ptq.descent import Descent, Schedule, Stepper
from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.layers import QuantizedLayer, apply_weight, names_of, replace_module, shaped, weight_matrix
from ptq.precision import learning
from ptq.report import TuningReport
from ptq.resume import Resume
from ptq.seeding import coin_flips
from ptq.solvers.grid_variables import GridForm, GridVariables
from ptq.solvers.soft_rounding import Softening, place, relax
from ptq.training import TrainingRun
from ptq.tuning import is_norm

ROUND = 100  # steps after which an interrupted run can go on
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
    dropped: float  # share of each layer's input elements that are left unquantized in training (QDrop)
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
        self.fixed: tuple[Tensor, Grid] | None = None  # hard codes, where they are asked for
        self.dropped = recipe.dropped
        self.slope: Tensor | None = None  # sum of the gradients of a hard Ŵ, where these are asked for
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """Soft, or where `fixed` is set hard, Ŵ in the shape of the float layer's weight."""
        if self.fixed is None:
            return shaped(self.relaxation.values(self.grid_variables.grid()), self.geometry)
        W_hat = self.fixed[1].values(self.fixed[0])
        if self.slope is not None:
            W_hat = W_hat.detach().requires_grad_(True)
            W_hat.register_hook(self.slope.add_)
        return shaped(W_hat, self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            drops = self.fixed is None and self.dropped > 0
            x = self.input_quantizer(x, coin_flips(x.shape, self.dropped, x.device) if drops else None)
        return apply_weight(x, self.weight, self.bias, self.geometry)

    @torch.no_grad()
    def hard(self) -> tuple[Tensor, Grid]:
        """Codes and stored grid that the layer would end with now."""
        return self.relaxation.codes(self.grid_variables.grid()), self.grid_variables.stored()

    def state(self) -> list[Tensor]:
        """All that training changes, in place."""
        return [*self.relaxation.state(), *self.grid_variables.variables.values()]

    def quantized(self) -> QuantizedLayer:
        """The layer with the codes and the grid that it has now."""
        codes, grid = self.hard()
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
        self, module: nn.Module, original: nn.Module, recipe: Recipe, *, name: str, seed: int
    ) -> None:
        self.module, self.recipe, self.name = module, recipe, name
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
        self.steps = LearnedSteps([])  # of inputs

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
        self,
        pieces: Sequence[Any],
        loss: Callable[[Any], Tensor],
        plain: Callable[[Any], Tensor],
        *,
        resume: Resume,
        progress: bool,
        generators: Sequence[torch.Generator] = (),
    ) -> TuningReport:
        """Train on random pieces; `loss` is lowered, `plain`, the loss without augmentation, is measured.

        `generators` are those that `loss` draws from. Soft layers are replaced by quantized ones at the end.
        """
        started = time.perf_counter()
        recipe, total = self.recipe, self.recipe.descent.iterations
        flags = {p: p.requires_grad for p in self.module.parameters()}
        for p in self.module.parameters():
            p.requires_grad_(False)
        others = self.others()
        before = self.measure(pieces, plain)
        if recipe.selection is Selection.gradient and recipe.selected < 1:
            self._select(pieces[:PROBED], plain)
        stepper = self._stepper(others)
        self.steps = LearnedSteps(others[Variable.activation] if recipe.trains(Variable.activation) else [])
        changing: list[Tensor] = [t for layer in self.layers for t in layer.state()]
        changing += [p for v in recipe.variables for p in others[v]]
        best = [t.detach().clone() for t in changing]
        # loss of `best`, loss and undecided fraction of the last check, whether a check was taken as the best
        numbers = torch.tensor([before, before, 0.0, 0.0], dtype=torch.float64)
        order = torch.zeros(len(pieces), dtype=torch.int64)
        run = TrainingRun(
            f"round {self.name}",
            total,
            resume=resume,
            progress=progress,
            tensors=[*changing, *best, numbers, order],
            parts=[stepper.optimizer],
            generators=[self.generator, *generators],
        )
        checks = {round(total * (k + 1) / recipe.checks) for k in range(recipe.checks)}
        for index in run.rounds(-(-total // ROUND)):
            for _ in range(index * ROUND, min((index + 1) * ROUND, total)):
                if run.step % len(pieces) == 0:
                    order.copy_(torch.randperm(len(pieces), generator=self.generator))
                piece = pieces[int(order[run.step % len(pieces)])]
                with learning():
                    value = loss(piece)
                if not run.record(self._step(stepper, run.step, value)):
                    break
                if run.step in checks:
                    self._check(pieces, plain, changing, best, numbers)
            if run.step < min((index + 1) * ROUND, total):
                break  # a loss that is not finite
        with torch.no_grad():
            for t, value in zip(changing, best, strict=True):
                t.copy_(value)
        for p in self.module.parameters():
            p.requires_grad_(flags.get(p, False))
        for layer in self.layers:
            quantized = layer.quantized()
            for alias in names_of(self.module, layer):
                replace_module(self.module, alias, quantized)
        return TuningReport(
            unit=self.name,
            loss_before=before,
            loss_after=float(numbers[0]),
            kept=bool(numbers[3]),
            steps=run.step,
            seconds=time.perf_counter() - started,
            losses=run.losses,
            undecided=float(numbers[2]),
        )

    @torch.no_grad()
    def _check(
        self,
        pieces: Sequence[Any],
        plain: Callable[[Any], Tensor],
        changing: list[Tensor],
        best: list[Tensor],
        numbers: Tensor,
    ) -> None:
        """Measure the hard codes, and take them as the best where they are."""
        numbers[1] = self.measure(pieces, plain)
        numbers[2] = max((layer.relaxation.undecided() for layer in self.layers), default=0.0)
        if not self.recipe.keep_best or bool(numbers[1] < numbers[0]):
            numbers[0], numbers[3] = numbers[1], 1.0
            for kept, t in zip(best, changing, strict=True):
                kept.copy_(t)

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
        """One descent step, none where the loss is not finite; returns the loss without the regulariser."""
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
        self.steps.keep_positive()
        return plain

    def _select(self, pieces: Sequence[Any], plain: Callable[[Any], Tensor]) -> None:
        """Learn the weights whose quantized value has the largest gradient at the start."""
        for layer in self.layers:
            layer.slope, layer.fixed = torch.zeros_like(layer.W), layer.hard()
        for piece in pieces:
            plain(piece).backward()
        for layer in self.layers:
            recipe, start = self.recipe, layer.grid_variables.start
            mask = selected(recipe.selection, recipe.selected, start, layer.W, layer.slope, self.generator)
            layer.relaxation.learn(mask)
            layer.slope = layer.fixed = None

    @torch.no_grad()
    def measure(self, pieces: Sequence[Any], plain: Callable[[Any], Tensor]) -> float:
        """Mean loss over all pieces with the codes that the layers would end with now."""
        for layer in self.layers:
            layer.fixed = layer.hard()
        mean = sum(float(plain(piece)) for piece in pieces) / max(1, len(pieces))
        for layer in self.layers:
            layer.fixed = None
        return mean
