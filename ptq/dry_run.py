"""What a job would do: layers, exact bits, memory and time to expect, without quantizing anything."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptq.calibration import Calibration, Inputs, Target
from ptq.layers import weight_matrix
from ptq.methods.method import LayerMethod, RatedGridSpec, stored_size, units_of
from ptq.mixed_precision import MixedBits, Rounding, budget_bits
from ptq.plan import Plan, allocate, allocate_activations, skipped_parameters, trace
from ptq.problem import LayerProblem
from ptq.rate import quantize_to_rate
from ptq.rate_allocation import common_rate
from ptq.training_time import training_seconds
from ptq.whole_network import WholeNetworkMethod

if TYPE_CHECKING:
    from ptq.runner import Parts

PROBE_TOKENS = 512  # inputs that the timed layer's stand-in Gram is made from


@torch.no_grad()
def describe(parts: Parts, directory: Path) -> str:
    """A table of the layers, then totals: bits per coefficient (exact), memory and time (estimates)."""
    adapter = parts.adapter
    module = adapter.module.to(parts.device)
    batch = parts.batches[0].to(parts.device)
    tokens, forward_seconds, plan = _trace(parts, module, batch)
    allocation = allocate(adapter, plan, parts.bits)
    inputs = allocate_activations(adapter, plan, parts.bits, allocation)
    if isinstance(parts.grid, RatedGridSpec):
        rate = common_rate(adapter, allocation, parts.bits.weight)
        allocation = {name: rate if w == parts.bits.weight else w for name, w in allocation.items()}
    lines = [
        f"{'layer':40} {'groups × out × in':>20} {'bits':>6} {'input bits':>11} {'bits/coefficient':>17}"
    ]
    weights = stored = 0
    work: dict[str, float] = {}
    grams = 0.0
    for name in plan.layers():
        W = weight_matrix(adapter.module.get_submodule(name)).float()
        width = allocation[name]
        if width is None:
            continue
        size = sum(stored_size(parts.method, parts.grid, W, width, parts.bits.group_size).values())
        weights, stored = weights + W.numel(), stored + size
        work[name] = W.numel() * W.shape[-1]
        grams = max(grams, W.shape[0] * W.shape[-1] ** 2 * 8)
        shape = " × ".join(str(n) for n in W.shape)
        lines.append(
            f"{name:40} {shape:>20} {width:>6g} {inputs[name] or 'float':>11} {size / W.numel():>17.4f}"
        )
    for skipped in skipped_parameters(adapter, plan, allocation):
        lines.append(f"float: {skipped['name']} {skipped['shape']}: {skipped['reason']}")
    paths = _paths(parts)
    model_bytes = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    inputs_bytes = sum(b.numel() * b.element_size() for b in parts.batches)
    widest = max(tokens.values(), default=0) * len(parts.batches) * 4
    memory = (
        model_bytes * (1 + (paths > 1 or _float_inputs(parts)))
        + inputs_bytes
        + 2 * widest * paths
        + 4 * grams
    )
    passes = 2.0 * paths + sum(len(u.stages) for u in plan.units) / max(1, len(plan.units))
    capture = solve = 0.0
    method = parts.method
    if isinstance(method, WholeNetworkMethod):
        # the float network, the one in training, gradients and Adam's two moments; what a step keeps
        share = min(1.0, method.batch_size / len(parts.batches[0]))
        training_bytes = model_bytes * 5 + inputs_bytes + 3 * 4 * share * sum(tokens.values())
        method = method.start_method()
        memory = training_bytes if method is None else max(memory, training_bytes)
    if method is not None:
        capture = forward_seconds * len(parts.batches) * passes
        capture += _gram_seconds(parts, plan, tokens, allocation) * paths
        solve = _solve_seconds(parts, method, allocation, work)
    if isinstance(parts.bits, MixedBits):
        stored, weights = budget_bits(parts.bits, adapter, plan, parts.method, parts.grid)
        lines += ["", parts.bits.announcement()]
        if parts.bits.rounding is Rounding.method:
            solve *= 1 + len(parts.bits.candidates)
    training = training_seconds(parts, plan, allocation, inputs, tokens, forward_seconds)
    total_bits = stored / max(1, weights)
    lines += [
        "",
        f"quantized: {len(work)} layers, {weights:,} weights, {total_bits:.4f} bits per coefficient, "
        f"{stored / 8 / 1e6:.3f} MB",
        f"calibration: {sum(len(b) for b in parts.batches)} samples in {len(parts.batches)} batches",
        f"memory to expect: about {memory / 2**20:,.0f} MiB above the libraries' own",
        f"time to expect: about {capture + solve + training:,.0f} s (calibration {capture:,.0f}, "
        f"solving {solve:,.0f}, training {training:,.0f}), evaluation not included",
        f"record: {directory / 'record.json'}",
    ]
    return "\n".join(lines)


def _paths(parts: Parts) -> int:
    """Networks that are run: the quantized one, the float one, or both."""
    both = isinstance(parts.calibration, Calibration) and parts.calibration.target is Target.float_path
    return 2 if both else 1


def _float_inputs(parts: Parts) -> bool:
    return isinstance(parts.calibration, Calibration) and parts.calibration.inputs is Inputs.float


def _trace(parts: Parts, module: nn.Module, batch: Tensor) -> tuple[dict[str, int], float, Plan]:
    """Elements of each layer's input in one batch, seconds of one forward pass, and the plan."""
    plan = trace(parts.adapter, batch, units_of(parts.method, parts.adapter))
    elements: dict[str, int] = {}

    def note(name: str) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            elements[name] = args[0].numel()

        return module.get_submodule(name).register_forward_pre_hook(hook)

    handles = [note(name) for name in plan.layers()]
    _synchronize(parts)
    started = time.perf_counter()
    parts.adapter.forward(module, batch)
    _synchronize(parts)
    seconds = time.perf_counter() - started
    for handle in handles:
        handle.remove()
    return elements, seconds, plan


def _synchronize(parts: Parts) -> None:
    """Wait for a GPU, whose work a clock would miss otherwise."""
    if parts.device.type == "cuda":
        torch.cuda.synchronize(parts.device)


def _gram_seconds(
    parts: Parts, plan: Plan, elements: dict[str, int], allocation: dict[str, float | None]
) -> float:
    """Time of all Gram products from their operation count and the measured speed of one of them."""
    A = torch.randn(4096, 256, device=parts.device)
    A.mT @ A
    _synchronize(parts)
    started = time.perf_counter()
    for _ in range(8):
        A.mT @ A
    _synchronize(parts)
    rate = 8 * 4096 * 256**2 / (time.perf_counter() - started)
    total = 0.0
    limit = parts.calibration.positions_per_image if isinstance(parts.calibration, Calibration) else None
    for name in plan.layers():
        layer = parts.adapter.module.get_submodule(name)
        if allocation[name] is None:
            continue
        size = weight_matrix(layer).shape[-1]
        if isinstance(layer, nn.Conv2d):
            tokens = elements[name] / layer.in_channels / (layer.stride[0] * layer.stride[1])
            if limit is not None:
                tokens = min(tokens, limit * len(parts.batches[0]))
            total += tokens * layer.groups * size**2
        else:
            total += elements[name] / size * size**2
    return 2 * total * len(parts.batches) / rate  # the unfolding costs about as much as the product


def _solve_seconds(
    parts: Parts, method: LayerMethod, allocation: dict[str, float | None], work: dict[str, float]
) -> float:
    """Time of all solves, scaled by out · in² from one timed solve of the median layer on a stand-in Gram."""
    if not work:
        return 0.0
    name = sorted(work, key=lambda n: work[n])[len(work) // 2]
    W = weight_matrix(parts.adapter.module.get_submodule(name)).float()
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(W.shape[0], PROBE_TOKENS, W.shape[-1], generator=generator).to(W.device).double()
    problem = LayerProblem(name, W, X.mT @ X / PROBE_TOKENS)
    width = allocation[name]
    assert width is not None
    started = time.perf_counter()
    quantize_to_rate(method, problem, parts.grid, width, parts.bits.group_size)
    _synchronize(parts)
    return (time.perf_counter() - started) * sum(work.values()) / work[name]
