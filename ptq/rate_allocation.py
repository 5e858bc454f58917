"""One budget for all layers: rates of equal slope, and the account that makes the file meet the budget.

Theory: a layer is a Gaussian source (ptq/limit.py) whose components have variances σ_r² λ_i, and a squared
error D at its output costs the network w D. Least Σ w_l D_l for a given Σ N_l R_l is where the slope of every
layer's w D by its bits is the same: one water level for all sources times their w (Cover and Thomas, Theorem
10.3.3). Practical codes lie about a quarter of a bit above the limit at every rate, which leaves the slopes
as they are.
w for `network_loss`: to second order KL(float ‖ quantized) of the predictions is ½ E[⟨G, Ŵ − W⟩²], where G is
the gradient, for one sample, of the log-likelihood of a label drawn from the float prediction (Fisher
information). G is summed over positions first: the error of a weight is the same at all of them and adds up
behind a global pooling. Errors of rows are taken as independent, with the covariance D / in · H⁻¹ that error
feedback leaves, and the loss is ½ w D with w = E Σ_r G_r H⁻¹ G_rᵀ / (in · out).
At low rates the error is no longer random: a share D / E of the weights themselves is missing. What that
costs is measured by taking each layer away, and enters as the square of the share. Without it a layer whose
noise hardly matters (the last before a global pooling) would get nothing at all.
Measured (ResNet-20, 1.5 bits, one seed): worse than equal rates, with that term and without. Perhaps the
Fisher information on training images, of which the network is certain, is too small beside what errors of
real size cost.
Shapes: H, F [groups, in, in]; X [groups, tokens, in]; G [groups, samples, tokens, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq.allocation import Allocation, Bits
from ptq.calibration import Calibration, NoCalibration
from ptq.errors import InputError
from ptq.layers import input_matrix, layer_bias, weight_matrix, weight_order
from ptq.limit import GaussianLimit
from ptq.methods.method import GridSpec, RatedGridSpec
from ptq.models.adapter import ModelAdapter, is_embedding
from ptq.plan import Call, first_tensor, hooks

LOWEST_RATE = 0.02  # bits: below it a stream's own bytes weigh more than its codes
REMOVAL_SAMPLES = 64  # that each layer is taken away on, one after the other
DAMPING = 0.03  # of H, as a fraction of its mean diagonal: errors are not larger than the weights themselves
POINTS = 512  # of a layer's curve
PART = 16  # samples of one pass with gradients
BISECTIONS = 80
MOST_SHIFT = 0.05  # bits that what earlier layers missed may move a layer's rate by, if it is no more
SLACK = 0.002  # than this of the whole budget, in bits per weight


@dataclass(kw_only=True)
class Source:
    """A layer as the allocation sees it: what an error of D at its output costs, weight · D + removal ·
    (D/E)² with E the output's energy, and the errors it can have (ptq/limit.py).
    """

    limit: GaussianLimit
    weight: float
    removal: float = 0.0  # cost beyond weight · E where the layer gives nothing
    log_slopes: Tensor = field(init=False)  # ascending, of the cost by the bits spent, up to a common factor
    rates: Tensor = field(init=False)  # bits per weight at those slopes

    def __post_init__(self) -> None:
        levels, distortion, rates = (t.cpu() for t in self.limit.curve(POINTS))
        # on the Gaussian curve dD by dbits is −2 ln 2 times the water level
        price = self.weight + 2 * self.removal * distortion / max(self.limit.model_energy, 1e-300) ** 2
        self.log_slopes = (price.clamp_min(1e-300).log2() + levels).flip(0)
        self.rates = rates.flip(0)

    def rate(self, log_slope: float) -> float:
        """Bits per weight down to where another one saves less than 2^log_slope."""
        if (self.weight <= 0 and self.removal <= 0) or len(self.rates) == 0:
            return 0.0
        return float(np.interp(log_slope, self.log_slopes.numpy(), self.rates.numpy(), right=0.0))


@dataclass(kw_only=True)
class Budget:
    """Rates that were planned and what of their sum is left; what a layer misses goes to those after it, but
    for the little that would move the last layers' rates by much where these are small.

    Codes that are learned after the layer was quantized take other bits than before: what that adds is paid
    for by the layers that come after, and expected of them too; what is expected stays reserved until the
    layer was trained, and does not go to others of its unit.
    """

    rates: dict[str, float]  # bits per weight of every layer that shares the budget
    counts: dict[str, int]  # its weights
    most_bits: float
    carried: float = 0.0  # bits that the layers so far have left (below zero: overdrawn)
    grown: float = 0.0  # bits that training has added to layers so far
    trained: int = 0  # weights of these
    left: int = field(init=False)  # weights still to come
    reserved: dict[str, float] = field(default_factory=dict)  # bits that layers are still to grow by

    def __post_init__(self) -> None:
        self.left = sum(self.counts.values())

    def ask(self, name: str, otherwise: float, *, trained: bool = False) -> float:
        """Rate for the layer that comes next, whose codes may be `trained` then; `otherwise` for one outside
        the budget.
        """
        if name not in self.rates:
            return otherwise
        growth = self.grown / self.trained if trained and self.trained else 0.0
        self.reserved[name] = growth * self.counts[name]
        rate = self.rates[name] + self._shift() - growth
        return min(max(rate, LOWEST_RATE), self.most_bits)

    def _shift(self) -> float:
        """What is carried, over all weights to come: to MOST_SHIFT, or until the total misses by SLACK."""
        size = abs(self.carried)
        needed = (size - SLACK * sum(self.counts.values())) / self.left
        return math.copysign(min(size / self.left, max(MOST_SHIFT, needed)), self.carried)

    def spend(self, name: str, stored_bits: int) -> None:
        """Enter what the layer took."""
        if name in self.rates:
            self.carried += self.rates[name] * self.counts[name] - stored_bits - self.reserved.get(name, 0.0)
            self.left -= self.counts[name]

    def grow(self, name: str, bits: int) -> None:
        """Enter what training added to the layer."""
        if name in self.rates:
            self.carried += self.reserved.pop(name, 0.0) - bits
            self.grown += bits
            self.trained += self.counts[name]


def check_allocation(grid: GridSpec, calibration: Calibration | NoCalibration) -> None:
    """Raise InputError where layers shall have rates by their data and there is none."""
    if not isinstance(grid, RatedGridSpec) or grid.allocation is Allocation.equal_rate:
        return
    if isinstance(calibration, NoCalibration):
        raise InputError(
            f"grid.allocation={grid.allocation.value} measures layers on calibration data, and "
            "calibration=none has none: choose another, or grid.allocation=equal_rate"
        )


def budget(
    adapter: ModelAdapter,
    batches: list[Any],
    allocation: dict[str, float | None],
    bits: Bits,
    grid: GridSpec,
    *,
    seed: int,
) -> Budget | None:
    """The budget of a float model on a rated grid; None on a grid of fixed width.

    `allocation` holds each layer's bits as the config has them: layers with bits.weight share what those with
    bits of their own leave.
    """
    if not isinstance(grid, RatedGridSpec):
        return None
    shared = [name for name, width in allocation.items() if width == bits.weight]
    counts = {name: weight_matrix(adapter.module.get_submodule(name)).numel() for name in shared}
    rate = common_rate(adapter, allocation, bits.weight)
    rates = dict.fromkeys(shared, rate)
    if grid.allocation is not Allocation.equal_rate and shared:
        sources = measure(adapter, batches, shared, grid.allocation, grid.allocation_samples, seed)
        rates = equal_slopes(sources, counts, rate, grid.most_bits)
    return Budget(rates=rates, counts=counts, most_bits=grid.most_bits)


def common_rate(adapter: ModelAdapter, allocation: dict[str, float | None], mean_rate: float) -> float:
    """Bits per weight of the layers without bits of their own, for `mean_rate` over all quantized layers.

    Raises InputError where the others leave nothing.
    """
    widths = {name: width for name, width in allocation.items() if width is not None}
    counts = {name: weight_matrix(adapter.module.get_submodule(name)).numel() for name in widths}
    own = {name: width for name, width in widths.items() if width != mean_rate}
    shared = sum(counts.values()) - sum(counts[name] for name in own)
    if not shared:
        return mean_rate
    taken = sum(width * counts[name] for name, width in own.items())
    rate = (mean_rate * sum(counts.values()) - taken) / shared
    if rate < min(LOWEST_RATE, mean_rate):
        raise InputError(
            f"bits.weight={mean_rate:g} is the mean of all quantized layers here, and "
            f"{', '.join(sorted(own)[:4])} with bits of their own take {taken / sum(counts.values()):.3f} of "
            "it: raise bits.weight, or lower bits.first_last and bits.layers"
        )
    return rate


def equal_slopes(
    sources: dict[str, Source], counts: dict[str, int], mean_rate: float, most_bits: float
) -> dict[str, float]:
    """Rate of each layer at one slope, `mean_rate` on average over all weights.

    Rates stay between LOWEST_RATE and `most_bits`; sources that cost nothing get the lowest.
    """
    total = sum(counts.values())
    least = min(LOWEST_RATE, mean_rate)

    def rates_at(log_slope: float) -> dict[str, float]:
        return {name: min(max(source.rate(log_slope), least), most_bits) for name, source in sources.items()}

    def mean(rates: dict[str, float]) -> float:
        return sum(rates[name] * counts[name] for name in rates) / total

    low, high = -400.0, 400.0  # log₂ of the slope
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(rates_at(middle)) > mean_rate else (low, middle)
    rates = rates_at(high)
    short = mean_rate - mean(rates)  # not zero only where no slope has that rate: a model of dead layers
    return {name: min(rate + short, most_bits) for name, rate in rates.items()}


@torch.no_grad()
def measure(
    adapter: ModelAdapter,
    batches: list[Any],
    names: list[str],
    allocation: Allocation,
    samples: int,
    seed: int,
) -> dict[str, Source]:
    """Each layer's source, on the float network's inputs for the first `samples` of `batches`."""
    layers = {name: adapter.module.get_submodule(name) for name in names}
    statistics = {name: _Statistics(layer) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    probe = torch.zeros((), requires_grad=True)
    by_loss = allocation is Allocation.network_loss

    def hook(name: str) -> Callable[..., Tensor | None]:
        def receive(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            X = statistics[name].add_inputs(args[0].detach())
            if not by_loss:
                return None
            with_gradient = output + probe.to(output)
            with_gradient.register_hook(partial(statistics[name].add_gradients, X))
            return with_gradient

        return receive

    seen = 0
    with hooks(layer.register_forward_hook(hook(name)) for name, layer in layers.items()):
        for part in _parts(batches, samples):
            seen += _count(part)
            for statistic in statistics.values():
                statistic.samples = _count(part)
            if by_loss:
                with torch.enable_grad():
                    loss = _drawn_loss(adapter.forward(adapter.module, part), generator)
                    torch.autograd.grad(loss, probe)
            else:
                adapter.forward(adapter.module, part)
    removals = _removals(adapter, _parts(batches, min(samples, REMOVAL_SAMPLES)), layers) if by_loss else {}
    sources = {}
    for name, layer in layers.items():
        limit = GaussianLimit(statistics[name].gram(), weight_matrix(layer).float())
        weight, removal = (1 / limit.energy if limit.energy > 0 else 0.0), 0.0
        if by_loss:
            weight = 0.5 * statistics[name].weight() / seen
            removal = max(0.0, removals[name] - weight * limit.model_energy)
        sources[name] = Source(limit=limit, weight=weight, removal=removal)
    return sources


def _removals(adapter: ModelAdapter, parts: list[Any], layers: dict[str, nn.Module]) -> dict[str, float]:
    """KL(float ‖ without the layer's products) per sample, for each layer alone."""

    def remove(layer: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        nothing, bias = torch.zeros_like(output), layer_bias(layer)
        if bias is None:
            return nothing
        return nothing + (bias[:, None, None] if isinstance(layer, nn.Conv2d) else bias)

    divergences = dict.fromkeys(layers, 0.0)
    for part in parts:
        reference = adapter.forward(adapter.module, part).float().log_softmax(-1)
        for name, layer in layers.items():
            with hooks([layer.register_forward_hook(remove)]):
                without = adapter.forward(adapter.module, part).float().log_softmax(-1)
            divergences[name] += float((reference.exp() * (reference - without)).sum())
    seen = sum(_count(part) for part in parts)
    return {name: divergence / seen for name, divergence in divergences.items()}


class _Statistics:
    """Sums over what a layer receives and over the gradients of its weight, sample by sample."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.order = weight_order(layer)
        self.samples = 1  # of the pass that is under way
        self.tokens = 0
        self.H: Tensor | None = None  # Σ x xᵀ, [groups, in, in] float64
        self.F: Tensor | None = None  # Σ over samples and rows of gᵀ g, g a row of a sample's gradient

    def add_inputs(self, x: Tensor) -> Tensor:
        """The layer's inputs as [groups, tokens, in], once they are counted; an embedding's ids as they are,
        with the identity for H.
        """
        if is_embedding(self.layer):
            dim = weight_matrix(self.layer).shape[-1]
            self.H, self.tokens = torch.eye(dim, dtype=torch.float64, device=x.device)[None], 1
            return x
        X = input_matrix(self.layer, x.float())
        self.tokens += X.shape[1]
        product = (X.mT @ X).double()
        self.H = product if self.H is None else self.H + product
        return X

    def add_gradients(self, X: Tensor, gradient: Tensor) -> None:
        if is_embedding(self.layer):
            product = self._row_products(X, gradient)
            self.F = product if self.F is None else self.F + product
            return
        groups = X.shape[0]
        if isinstance(self.layer, nn.Conv2d):
            gradient = gradient.movedim(1, -1)  # [samples, height, width, out]
        G = gradient.float().reshape(self.samples, -1, groups, gradient.shape[-1] // groups)
        G = G.permute(2, 0, 1, 3)  # [groups, samples, tokens, out]
        X = X.reshape(groups, self.samples, -1, X.shape[-1])
        if G.shape[2] < G.shape[3]:  # fewer tokens than rows: the gradient itself would be larger
            product = (X.mT @ (G @ G.mT) @ X).sum(1).double()
        else:
            rows = (G.mT @ X).flatten(1, 2)  # [groups, samples · out, in]
            product = (rows.mT @ rows).double()
        self.F = product if self.F is None else self.F + product

    def _row_products(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Σ over samples and rows of gᵀ g, [1, dim, dim], g a row of one sample's gradient of the table."""
        ids = ids.expand(gradient.shape[:-1]).reshape(len(gradient), -1)
        product = torch.zeros(1, gradient.shape[-1], gradient.shape[-1], device=gradient.device)
        for sample, g in zip(ids, gradient.float().flatten(1, -2), strict=True):
            looked_up, row = sample.unique(return_inverse=True)
            rows = g.new_zeros(len(looked_up), g.shape[-1]).index_add_(0, row, g)
            product[0] += rows.T @ rows
        return product.double()

    def gram(self) -> Tensor:
        """H [groups, in, in], inputs in the order of the weights."""
        assert self.H is not None
        H = self.H / max(1, self.tokens)
        return H if self.order is None else H[:, self.order][:, :, self.order]

    def weight(self) -> float:
        """Σ tr(F (H + d I)⁻¹) / (in · out): what an error of one at the output costs, on average over errors
        that error feedback leaves, whose covariance is about (H + d I)⁻¹ for every row.
        """
        assert self.H is not None
        if self.F is None:
            return 0.0
        H = self.H / max(1, self.tokens)
        mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)
        damped = H + torch.diag_embed((DAMPING * mean).clamp_min(1e-30)[:, None].expand(H.shape[:2]))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed.any()):
            raise InputError("the inputs' statistics are not positive definite; use more calibration samples")
        traces = torch.cholesky_solve(self.F, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
        return float(traces.sum()) / weight_matrix(self.layer).numel()


def _parts(batches: list[Any], samples: int) -> list[Any]:
    """The first `samples` of the batches, in pieces small enough for a pass with gradients."""
    parts = []
    for batch in batches:
        call = Call((batch,), {})
        count = min(_count(batch), samples)
        parts += [call.rows(slice(k, min(k + PART, count))).args[0] for k in range(0, count, PART)]
        samples -= count
    return parts


def _count(batch: Any) -> int:
    first = first_tensor(batch)
    return 1 if first is None else len(first)


def _drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Σ −log p(label), labels drawn from p itself: its gradient's covariance is the Fisher information."""
    logarithm = logits.flatten(0, -2).float().log_softmax(-1)  # [predictions, classes]
    drawn = torch.multinomial(logarithm.detach().exp().cpu(), 1, generator=generator)
    return -logarithm.gather(-1, drawn.to(logits.device)).sum()
