"""What arrives at a unit of the model, and at the layers in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptq.models.adapter import ModelAdapter
from ptq.plan import Call, Unit, first_tensor, hooks

HOST = torch.device("cpu")


class _StopError(Exception):
    """Ends a forward pass whose remainder is not needed."""


def unit_calls(adapter: ModelAdapter, module: nn.Module, name: str, batches: list[Any]) -> list[Call]:
    """Arguments of the unit `name` of `module` for each batch, by forward passes that stop there. Kept on the
    host.
    """
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs).cloned().to(HOST))
        raise _StopError

    with hooks([module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)]):
        for batch in batches:
            try:
                adapter.forward(module, batch)
            except _StopError:
                continue
    return calls


def unit_outputs(unit: nn.Module, calls: list[Call], device: torch.device) -> list[Tensor]:
    """First output of the unit for each call, on the host."""
    outputs = []
    for call in calls:
        there = call.to(device).cloned()
        output = first_tensor(unit(*there.args, **there.kwargs))
        assert output is not None
        outputs.append(output.to(HOST))
    return outputs


def layer_inputs(
    adapter: ModelAdapter,
    module: nn.Module,
    unit: Unit,
    names: set[str],
    batch: Any,
    call: Call | None,
    device: torch.device,
) -> dict[str, list[Tensor]]:
    """Inputs that the named layers of a unit receive, one for each time they are called: from `call`, the
    unit's own arguments, or from a forward pass of the whole model on `batch`. The pass stops once all layers
    have been called.
    """
    received: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def receive(_: nn.Module, args: tuple[Any, ...]) -> None:
            received[name].append(args[0].detach().clone())
            if not unit.repeated and all(received.values()):
                raise _StopError

        return receive

    with hooks(module.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names):
        try:
            if call is not None:
                there = call.to(device).cloned()
                module.get_submodule(unit.name)(*there.args, **there.kwargs)
            else:
                adapter.forward(module, batch)
        except _StopError:
            pass
    return received


def output_gradients(
    adapter: ModelAdapter, module: nn.Module, name: str, batches: list[Any], seed: int
) -> list[Tensor]:
    """Gradient of log p(label) with respect to the first output of the unit `name`, for each batch, on the
    host. Labels are drawn from the network's own probabilities, so that the mean of its squares is the
    diagonal of the Fisher information.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = first_tensor(output)
        assert first is not None
        kept.append(first.detach().requires_grad_(True))
        given = kept[-1].clone()  # the next module may work in place, which a leaf does not allow
        return given if isinstance(output, Tensor) else type(output)((given, *output[1:]))

    gradients = []
    with hooks([module.get_submodule(name).register_forward_hook(hook)]), torch.enable_grad():
        for batch in batches:
            kept.clear()
            logits = adapter.forward(module, batch).flatten(0, -2).float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
            likelihood = logits.log_softmax(-1).gather(-1, drawn.to(logits.device)).sum()
            (gradient,) = torch.autograd.grad(likelihood, kept[-1])
            gradients.append(gradient.to(HOST))
    return gradients
