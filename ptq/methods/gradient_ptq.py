"""Gradient PTQ: codes learned by gradient descent through a relaxation, for a layer, a block, a stage of
blocks or the network.

One engine for a family: AdaRound (arXiv 2004.10568; a layer, on its Gram), BRECQ (arXiv 2102.05426; a block),
QDrop (arXiv 2203.05740; a block, inputs mixed with the float ones), AutoRound (arXiv 2309.05516; a block,
signed gradient descent on offsets and ranges), TesseraQ (arXiv 2410.19103; a block, progressive hardening).
Yvinec et al., "Challenging the Status Quo" (arXiv 2308.07662), of which only the abstract is known to us,
compare the choices that such a method makes: each of them is a field here, and the options are ours where no
source is named.
With unit=layer the loss is tr((T − Ŵ) H (T − Ŵ)ᵀ), the expectation of what others sample: the same minimum,
all rows and all inputs at once, and no stored activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq.block_calls import Float32
from ptq.block_problem import BlockProblem
from ptq.capture import unit_outputs
from ptq.config import build, choices, load_choice
from ptq.descent import Descent, Optimizer, Schedule
from ptq.errors import InputError, suggestion
from ptq.grids.grid import Grid
from ptq.layer_reconstruction import reconstruct_layer
from ptq.losses import Loss, mean_square
from ptq.methods.method import GridSpec, LayerMethod, Wants, check_pair, stored_size, wants
from ptq.models.adapter import ModelAdapter
from ptq.problem import LayerProblem
from ptq.reconstruction import Rates, Recipe, Selection, Trainer, Variable
from ptq.report import TuningReport
from ptq.resume import Resume
from ptq.solvers.grid_variables import GridForm
from ptq.solvers.soft_rounding import Kind, Softening
from ptq.unit_loss import Augmentation, BlockLoss, NetworkLoss


class Unit(Enum):
    """What is reconstructed as one."""

    layer = "layer"
    block = "block"  # and each layer outside all blocks
    stage = "stage"  # blocks of one Sequential, as in ResNets; and each block and layer outside all stages
    network = "network"


@dataclass(kw_only=True, slots=True)
class GradientPTQ:
    """Start from the codes of another method, then descend."""

    unit: Unit
    start: str  # a layer-wise choice of conf/method: whose codes and grid learning starts from
    relaxation: Kind
    variables: list[Variable]
    grid_form: GridForm
    loss: Loss
    p: float  # exponent of loss=lp
    fisher_rank: int  # directions of loss=fisher_low_rank, fewer where the gradients have a smaller rank
    low_rank_fraction: float  # of loss=fisher_low_rank: weight of the directions; the diagonal has the rest
    regularisation: float  # λ of relaxation=sigmoid, for a loss of the size that l2 has at the start
    # λ in units of the mean square of what the unit shall give, per channel: its weight does not hang on the
    # size of outputs, which is 1 for few networks without norms
    relative_regularisation: bool
    beta: list[float]  # its exponent, after the warm-up and at the end
    warmup: float  # fraction of the iterations without it
    soft_fractions: list[float]  # of relaxation=progressive: still soft in each of as many parts of the run
    optimizer: Optimizer
    betas: list[float]  # of the Adam family
    momentum: float  # of sgd
    weight_decay: float
    iterations: int  # of each unit
    rounding_rate: float
    grid_rate: float  # relative to each parameter's size
    bias_rate: float  # of biases and norms
    activation_rate: float
    schedule: Schedule  # of the rounding's rate
    other_schedule: Schedule  # of the other rates
    batch_size: int  # samples a step, at most those of a calibration batch; unit=layer takes all
    augmentation: Augmentation
    probability: float  # for augmentation=qdrop: of an element being the float network's, or unquantized
    # of noise, in root mean squares of what quantization does to the input; of mixup, twice the most that a
    # sample takes of another
    strength: float
    float_target: bool  # units give what the float unit gives on the float network's inputs, not on their own
    selection: Selection
    selected: float  # fraction of each layer's weights that are learned
    checks: int  # times that hard codes are measured, the last one at the end
    keep_best: bool  # end with the best measured, the start included
    seed: int

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.beta) != 2 or len(self.betas) != 2:
            raise InputError(f"beta and betas are pairs of numbers; got {self.beta} and {self.betas}")
        if self.batch_size < 1 or self.p < 1 or not 0 <= self.probability <= 1 or self.strength < 0:
            raise InputError(
                "batch_size and p must be at least 1, probability in [0, 1], strength not negative; got "
                f"{self.batch_size}, {self.p}, {self.probability} and {self.strength}"
            )
        self.recipe()
        if self.augmentation is Augmentation.mixup and self.strength > 2:
            raise InputError(
                f"augmentation=mixup takes up to strength / 2 of another sample; got {self.strength}, "
                "use at most 2"
            )
        if self.unit is Unit.layer and self.loss is not Loss.l2:
            raise InputError(
                "unit=layer descends on the layer's Gram, which knows squared errors only; got "
                f"loss={self.loss.value}; use l2, or unit=block"
            )
        if self.unit is Unit.layer and self.float_target:
            raise InputError(
                "unit=layer takes its target from calibration.target: leave float_target=false and choose "
                "calibration.target=float_path"
            )
        if not self.by_blocks and self.augmentation is not Augmentation.none:
            raise InputError(
                f"augmentation={self.augmentation.value} changes a block's inputs; unit={self.unit.value} "
                "takes augmentation=none"
            )
        if not self.by_blocks and self.loss.reads_gradients:
            raise InputError(f"loss={self.loss.value} weighs the outputs of a block; use unit=block or stage")
        if self.selected < 1 and self.selection is Selection.all:
            raise InputError(
                f"selected={self.selected} needs a selection that says which weights: "
                f"{', '.join(s.value for s in Selection if s is not Selection.all)}"
            )
        if self.fisher_rank < 1 or not 0 <= self.low_rank_fraction <= 1:
            raise InputError(
                "fisher_rank must be at least 1 and low_rank_fraction in [0, 1]; got "
                f"{self.fisher_rank} and {self.low_rank_fraction}"
            )
        if self.unit is Unit.layer and set(self.variables) - {Variable.rounding, Variable.grid}:
            raise InputError("unit=layer trains rounding and grid only; use unit=block for other variables")
        moving = (Kind.signed_offset, Kind.weights, Kind.division)
        if self.grid_form is GridForm.range and self.relaxation not in moving:
            raise InputError(
                "grid_form=range moves zero points, so codes must be rounded anew in each step: use "
                f"relaxation {', '.join(k.value for k in moving)}; got {self.relaxation.value}"
            )
        known = choices("method")
        if self.start not in known:
            raise InputError(f"unknown method.start {self.start!r}{suggestion(self.start, known)}")
        first = self.start_method()
        if not isinstance(first, LayerMethod) or wants(first).blocks or wants(first).network:
            raise InputError(
                f"method.start={self.start} does not solve layer by layer; use rtn, gptq, comq, adaround or "
                "another method that does"
            )

    def start_method(self) -> Any:
        """The method of `start`."""
        return _built(self.start)

    def check_grid(self, grid: GridSpec) -> None:
        """Refuse what the method of `start` refuses."""
        check_pair(self.start_method(), grid)

    def size(self, grid: GridSpec, W: Tensor, bits: float, group_size: int | None) -> dict[str, int]:
        """Bits that W will take by the method of `start`, {"codes", "parameters"}."""
        return stored_size(self.start_method(), grid, W, bits, group_size)

    @property
    def by_blocks(self) -> bool:
        """Whether parts of the network are reconstructed, each from its own inputs."""
        return self.unit in (Unit.block, Unit.stage)

    def recipe(self, mean_square: float = 1.0) -> Recipe:
        """The part of the configuration that is about training alone. `mean_square` is that of the target,
        per channel.
        """
        unit = mean_square if self.relative_regularisation else 1.0
        return Recipe(
            softening=Softening(
                kind=self.relaxation,
                regularisation=self.regularisation * unit,
                beta=(self.beta[0], self.beta[-1]),
                warmup=self.warmup,
                soft_fractions=self.soft_fractions,
            ),
            variables=self.variables,
            grid_form=self.grid_form,
            descent=Descent(
                optimizer=self.optimizer,
                betas=(self.betas[0], self.betas[-1]),
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                iterations=self.iterations,
            ),
            schedule=self.schedule,
            other_schedule=self.other_schedule,
            rates=Rates(
                rounding=self.rounding_rate,
                grid=self.grid_rate,
                bias=self.bias_rate,
                activation=self.activation_rate,
            ),
            selection=self.selection,
            selected=self.selected,
            dropped=self.probability if self.augmentation is Augmentation.qdrop else 0.0,
            checks=self.checks,
            keep_best=self.keep_best,
        )

    def wants(self) -> Wants:
        """What the pipeline is to call, and with what."""
        block = self.by_blocks
        mixed = self.augmentation in (Augmentation.qdrop, Augmentation.noise, Augmentation.mixup)
        return Wants(
            blocks=block,
            network=self.unit is Unit.network,
            stages=self.unit is Unit.stage,
            float_inputs=block and (mixed or self.float_target),
            output_gradients=block and self.loss.reads_gradients,
        )

    def quantize_layer(
        self, problem: LayerProblem, grid: GridSpec, bits: float, group_size: int | None
    ) -> tuple[Tensor, Grid]:
        codes, fitted = self.start_method().quantize_layer(problem, grid, bits, group_size)
        if self.unit is not Unit.layer:
            return codes, fitted
        recipe = self.recipe(float(problem.error(torch.zeros_like(problem.T)).mean()))
        with torch.enable_grad():
            codes, fitted, tuned = reconstruct_layer(problem, fitted, codes, recipe, self.seed)
        problem.trained.append((codes, tuned))
        return codes, fitted

    def tune_block(self, problem: BlockProblem) -> TuningReport:
        """Learn the codes of all layers of the block, or stage of blocks, at once."""
        targets = problem.targets
        device = next((t.device for t in problem.block.buffers()), torch.device("cpu"))
        if self.float_target:
            assert problem.float_calls is not None
            with torch.no_grad():
                targets = unit_outputs(problem.original, problem.float_calls, device)
        with Float32(problem.block), Float32(problem.original), torch.enable_grad():
            loss = BlockLoss(
                problem,
                targets,
                kind=self.loss,
                p=self.p,
                batch_size=self.batch_size,
                augmentation=self.augmentation,
                probability=self.probability,
                strength=self.strength,
                float_target=self.float_target,
                fisher_rank=self.fisher_rank,
                low_rank_fraction=self.low_rank_fraction,
                device=device,
                seed=problem.seed + self.seed,
            )
            trainer = Trainer(
                problem.block,
                problem.original,
                self.recipe(mean_square(targets)),
                name=problem.name,
                seed=problem.seed + self.seed,
            )
            return trainer.run(
                loss.pieces,
                loss.training,
                loss.plain,
                resume=problem.resume,
                progress=problem.progress,
                generators=[loss.generator],
            )

    def tune_network(
        self,
        adapter: ModelAdapter,
        teacher: nn.Module | None,
        samples: Iterable[tuple[Any, Tensor | None]],
        *,
        device: torch.device,
        seed: int,
        progress: bool,
        resume: Resume,
    ) -> TuningReport:
        """Learn the codes of all layers of the network at once, from the float network's output."""
        assert teacher is not None
        with Float32(adapter.module), torch.enable_grad():
            loss = NetworkLoss(
                adapter, teacher, samples, kind=self.loss, p=self.p, batch_size=self.batch_size, device=device
            )
            recipe = self.recipe(mean_square(wanted for _, wanted in loss.pieces))
            trainer = Trainer(adapter.module, teacher, recipe, name="network", seed=seed + self.seed)
            return trainer.run(loss.pieces, loss.training, loss.training, resume=resume, progress=progress)


@cache
def _built(method: str) -> Any:
    """A method of conf/method, built once: mixed precision asks its size for every layer and width."""
    return build(load_choice("method", method), "method.start")
