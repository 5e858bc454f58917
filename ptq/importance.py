"""What a layer's codes of b bits cost the network: the candidate scores for mixed precision behind one
function.

Each score is a cost per layer, width and row, in its own unit: only costs of one score are compared. R is
W − Ŵ_b, KL the divergence from the float network's prediction, and L the loss with labels drawn from that
prediction, so that no score needs labels:

| score | cost of a row |
|---|---|
| weight_error | Σ R² |
| taylor | Σ abs(∂L/∂w · R): for R = W, magnitude × gradient |
| integrated_gradient | Σ abs(mean over t of ∂KL(t W)/∂w · R), t in {1/T … 1}, all layers together |
| fisher | Σ (∂L/∂w)² · R² |
| hessian | tr(H_l) / n_l · Σ R², H_l the Hessian of KL, its trace by Hutchinson's estimate |
| output_error | R H Rᵀ over the energy of the layer's output |
| output_fisher | Σ (∂L/∂y)² · R H Rᵀ, y the row's output: how much it moves × how much that matters (ours) |
| probe | KL when the layer alone has b bits; of a layer, not of its rows |

Shapes: W, R [groups, out, in]; H [groups, in, in]; costs [widths, groups, out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptq.calibration import GramAccumulator
from ptq.errors import InputError
from ptq.grids.grid import Grid
from ptq.layers import names_of, quantized_layer, replace_module, weight_matrix
from ptq.models.adapter import Conv1D, ModelAdapter, is_embedding
from ptq.plan import first_tensor, hooks
from ptq.problem import LayerProblem

GRAM_BYTES = 2**30  # Gram matrices held at once
DRAW_SAMPLES = 16  # samples that one gradient is taken over: more gradients make a steadier mean square
PATH_STEPS = 8  # T of the integrated gradient
TRACE_DRAWS = 4  # random directions per batch of Hutchinson's estimate

Rounding = Callable[[LayerProblem, float], tuple[Tensor, Grid]]  # codes and grid at a width


class Score(Enum):
    """How the cost of few bits is foretold; the table above."""

    weight_error = "weight_error"
    taylor = "taylor"
    integrated_gradient = "integrated_gradient"
    fisher = "fisher"
    hessian = "hessian"
    output_error = "output_error"
    output_fisher = "output_fisher"
    probe = "probe"


NEED_GRAM = (Score.output_error, Score.output_fisher)
NEED_NO_DATA = (Score.weight_error,)


@dataclass(kw_only=True)
class FloatNetwork:
    """The float network and the calibration samples that scores are measured on."""

    adapter: ModelAdapter
    module: nn.Module
    batches: list[Any]
    positions_per_image: int | None
    seed: int

    def layer(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)

    def outputs(self, batch: Any) -> Tensor:
        """Logits [rows, classes], rows counting samples and tokens."""
        output: Any = self.adapter.forward(self.module, batch)
        if not isinstance(output, Tensor):
            output = _first(output)
        if output is None:
            raise InputError(
                f"the outputs of model {self.adapter.name!r} hold no tensor to measure scores on; "
                "use bits.score=weight_error or bits.score=output_error"
            )
        return output.float().reshape(-1, output.shape[-1])


def costs(
    score: Score,
    network: FloatNetwork,
    names: list[str],
    widths: list[int],
    round_weights: Rounding,
    *,
    needs_gram: bool,
) -> dict[str, Tensor]:
    """Cost of each width in each row of the named layers, [widths, groups, out] float64.

    `needs_gram`: the rounding reads H. The probe gives every row of a layer an equal share of its cost.
    """
    weights = _sensitivities(score, network, names)
    targets = [network.outputs(b).log_softmax(-1) for b in network.batches] if score is Score.probe else []
    found: dict[str, Tensor] = {}
    for part in _parts(network, names):
        grams = _grams(network, part) if needs_gram or score in NEED_GRAM else {}
        for name in part:
            layer = network.layer(name)
            W = weight_matrix(layer).float()
            H = grams.get(name)
            if H is None:
                H = torch.eye(W.shape[-1], dtype=torch.float64, device=W.device).expand(W.shape[0], -1, -1)
            problem = LayerProblem(name, W, H)
            rows = []
            for width in widths:
                codes, grid = round_weights(problem, width)
                if score is Score.probe:
                    loss = _probe(network, name, grid, codes, targets)
                    rows.append(W.new_full(W.shape[:2], loss / W.shape[:2].numel(), dtype=torch.float64))
                else:
                    rows.append(_row_costs(score, problem, grid.values(codes), weights.get(name)))
            found[name] = torch.stack(rows)
    bad = [name for name, cost in found.items() if not torch.isfinite(cost).all()]
    if bad:
        raise InputError(
            f"bits.score={score.value} is not finite in layer {bad[0]!r}; choose another bits.score"
        )
    return found


def _row_costs(score: Score, problem: LayerProblem, W_hat: Tensor, weight: Tensor | None) -> Tensor:
    R = (problem.W - W_hat).double()
    if score is Score.weight_error:
        return R.square().sum(-1)
    if score is Score.output_error:
        energy = problem.error(torch.zeros_like(W_hat)).sum()
        return problem.error(W_hat) / energy.clamp_min(torch.finfo(torch.float64).tiny)
    assert weight is not None
    if score is Score.output_fisher:
        return problem.error(W_hat) * weight
    if score in (Score.taylor, Score.integrated_gradient):
        return (R.abs() * weight).sum(-1)
    return (R.square() * weight).sum(-1)


def _parts(network: FloatNetwork, names: list[str]) -> Iterator[list[str]]:
    """The names in order, so many at a time that their Gram matrices stay below the limit."""
    part: list[str] = []
    held = 0
    for name in names:
        W = weight_matrix(network.layer(name))
        size = 8 * W.shape[0] * W.shape[-1] ** 2
        if part and held + size > GRAM_BYTES:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    if part:
        yield part


@torch.no_grad()
def _grams(network: FloatNetwork, names: list[str]) -> dict[str, Tensor]:
    """H of the named layers in the float network."""
    accumulators = {
        name: GramAccumulator(network.layer(name), network.positions_per_image, network.seed)
        for name in names
    }

    def receive(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            accumulators[name].add(args[0])

        return hook

    with hooks([network.layer(name).register_forward_pre_hook(receive(name)) for name in names]):
        for batch in network.batches:
            network.adapter.forward(network.module, batch)
    return {name: accumulator.gram() for name, accumulator in accumulators.items()}


def _sensitivities(score: Score, network: FloatNetwork, names: list[str]) -> dict[str, Tensor]:
    """What the score multiplies the error by: per weight [groups, out, in], or per row [groups, out] for
    output_fisher; empty for scores without gradients.
    """
    if score in (Score.taylor, Score.fisher):
        return _weight_gradients(score, network, names)
    if score is Score.integrated_gradient:
        return _path_gradients(network, names)
    if score is Score.hessian:
        return _hessian_traces(network, names)
    if score is Score.output_fisher:
        return _output_gradients(network, names)
    return {}


@contextmanager
def _differentiable(network: FloatNetwork, names: list[str]) -> Iterator[list[nn.Parameter]]:
    """The named layers' weights as leaves of the graph, every other parameter a constant."""
    asked = {name: p.requires_grad for name, p in network.module.named_parameters()}
    weights = [network.layer(name).weight for name in names]
    for parameter in network.module.parameters():
        parameter.requires_grad_(False)
    leaves = [w for w in weights if isinstance(w, nn.Parameter)]
    for leaf in leaves:
        leaf.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield leaves
    finally:
        for name, parameter in network.module.named_parameters():
            parameter.requires_grad_(asked[name])


def _pieces(network: FloatNetwork) -> list[Any]:
    """The batches cut to the samples of one gradient where they are plain tensors."""
    return [
        piece
        for batch in network.batches
        for piece in (batch.split(DRAW_SAMPLES) if isinstance(batch, Tensor) else [batch])
    ]


def _sampled_loss(network: FloatNetwork, batch: Any, generator: torch.Generator) -> Tensor:
    """Σ −log p(label) over the rows of a batch, each label drawn from the network's own prediction."""
    logits = network.outputs(batch)
    odds = logits.detach().softmax(-1).cpu()
    labels = torch.multinomial(odds, 1, generator=generator)[:, 0].to(logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")


def _as_matrices(network: FloatNetwork, names: list[str], gradients: list[Tensor]) -> dict[str, Tensor]:
    """Tensors in the shapes of the weights as [groups, out, in] float64."""
    return {
        name: _like_matrix(network.layer(name), g).double() for name, g in zip(names, gradients, strict=True)
    }


def _like_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    shape = weight_matrix(layer).shape
    return x.t().reshape(shape) if isinstance(layer, Conv1D) else x.reshape(shape)


def _weight_gradients(score: Score, network: FloatNetwork, names: list[str]) -> dict[str, Tensor]:
    """Mean square (fisher) or mean size (taylor) of the loss's gradient.

    Labels drawn from the prediction make gradients of different samples uncorrelated and zero in the mean, so
    that the square of their sum is the sum of their squares, but for noise.
    """
    generator = torch.Generator().manual_seed(network.seed)
    with _differentiable(network, names) as weights:
        totals = [torch.zeros_like(w) for w in weights]
        for piece in _pieces(network):
            gradients = torch.autograd.grad(_sampled_loss(network, piece, generator), weights)
            for total, g in zip(totals, gradients, strict=True):
                total += g.square() if score is Score.fisher else g.abs()
    return _as_matrices(network, names, totals)


def _path_gradients(network: FloatNetwork, names: list[str]) -> dict[str, Tensor]:
    """|mean of the gradients on the way from zero weights to these|, of the KL divergence to the float
    outputs.
    """
    pieces = _pieces(network)
    with torch.no_grad():
        targets = [network.outputs(piece).log_softmax(-1) for piece in pieces]
    with _differentiable(network, names) as weights:
        originals = [w.detach().clone() for w in weights]
        totals = [torch.zeros_like(w) for w in weights]
        try:
            for step in range(1, PATH_STEPS + 1):
                for weight, original in zip(weights, originals, strict=True):
                    weight.data = original * (step / PATH_STEPS)
                for piece, target in zip(pieces, targets, strict=True):
                    loss = divergence(target, network.outputs(piece)).sum()
                    for total, g in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                        total += g
        finally:
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original
    return _as_matrices(network, names, [total.abs() for total in totals])


def _hessian_traces(network: FloatNetwork, names: list[str]) -> dict[str, Tensor]:
    """tr(H_l) / n_l in every place, by the mean of v·Hv over vectors v of random signs."""
    generator = torch.Generator().manual_seed(network.seed)
    traces = torch.zeros(len(names), dtype=torch.float64)
    with _differentiable(network, names) as weights, sdpa_kernel(SDPBackend.MATH):
        for batch in network.batches:
            logits = network.outputs(batch)
            loss = divergence(logits.detach().log_softmax(-1), logits).sum()
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            for draw in range(TRACE_DRAWS):
                signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
                products = torch.autograd.grad(gradients, weights, signs, retain_graph=draw + 1 < TRACE_DRAWS)
                traces += torch.stack(
                    [(v * p).double().sum().cpu() for v, p in zip(signs, products, strict=True)]
                )
    traces = (traces / TRACE_DRAWS).clamp_min(0)
    return {
        name: (trace / w.numel()).to(w.device).expand(weight_matrix(network.layer(name)).shape)
        for name, trace, w in zip(names, traces, weights, strict=True)
    }


def _output_gradients(network: FloatNetwork, names: list[str]) -> dict[str, Tensor]:
    """Σ over samples and positions of the squared gradient in each output of the layers, [groups, out]; for a
    row of an embedding, over the positions that look it up, and on average over its outputs.
    """
    generator = torch.Generator().manual_seed(network.seed)
    found = {
        name: torch.zeros(
            weight_matrix(layer).shape[:2], dtype=torch.float64, device=weight_matrix(layer).device
        )
        for name, layer in ((name, network.layer(name)) for name in names)
    }

    def watch(name: str) -> Callable[..., None]:
        def receive(ids: Tensor, gradient: Tensor) -> None:
            if is_embedding(network.layer(name)):
                squares = gradient.double().square().mean(-1).flatten()
                ids = ids.expand(gradient.shape[:-1]).flatten()
                found[name][0].index_add_(0, ids, squares)
                return
            convolution = isinstance(network.layer(name), nn.Conv2d)
            per_output = gradient.movedim(-3, -1) if convolution else gradient
            squares = per_output.reshape(-1, per_output.shape[-1]).double().square().sum(0)
            found[name] += squares.reshape(found[name].shape)

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(partial(receive, args[0]))

        return hook

    with (
        _differentiable(network, names) as weights,
        hooks([network.layer(name).register_forward_hook(watch(name)) for name in names]),
    ):
        for batch in network.batches:
            torch.autograd.grad(_sampled_loss(network, batch, generator), weights)
    return found


@torch.no_grad()
def _probe(network: FloatNetwork, name: str, grid: Grid, codes: Tensor, targets: list[Tensor]) -> float:
    """Mean KL divergence to the float outputs with one layer replaced."""
    layer = network.layer(name)
    aliases = names_of(network.module, layer)
    quantized = quantized_layer(layer, grid, codes).to(codes.device)
    try:
        for alias in aliases:
            replace_module(network.module, alias, quantized)
        total, count = 0.0, 0
        for batch, target in zip(network.batches, targets, strict=True):
            total += float(divergence(target, network.outputs(batch)).double().sum())
            count += len(target)
    finally:
        for alias in aliases:
            replace_module(network.module, alias, layer)
    return total / count


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of softmax(logits) from the log-probabilities `target` in each row."""
    return (target.exp() * (target - logits.log_softmax(-1))).sum(-1)


def limited(batches: list[Any], samples: int) -> list[Any]:
    """The first batches that hold `samples` samples, the last of them cut where it is a plain tensor."""
    taken = 0
    result: list[Any] = []
    for batch in batches:
        if taken >= samples:
            break
        result.append(batch[: samples - taken] if isinstance(batch, Tensor) else batch)
        first = batch if isinstance(batch, Tensor) else _first(batch)
        taken += 1 if first is None else len(first)
    return result


def _first(value: Any) -> Tensor | None:
    """The first tensor among several arguments or outputs."""
    return first_tensor(tuple(value.values()) if isinstance(value, Mapping) else value)
