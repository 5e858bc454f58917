"""The Python API: what its docstring shows, its refusals, and layers given as groups."""

from __future__ import annotations

import doctest

import pytest
import torch

import ptq
import ptq.api


def test_the_docstring_example_runs() -> None:
    outcome = doctest.testmod(ptq.api)
    assert outcome.attempted >= 3
    assert outcome.failed == 0


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(11, 300, generator=generator)
    return torch.randn(5, 11, generator=generator), X @ X.T / 300


@pytest.mark.parametrize("method", ["rtn", "gptq", "comq", "comq_release"])
def test_a_layer(method: str) -> None:
    W, H = layer()
    before = W.clone(), H.clone()
    weight = ptq.quantize_layer(W, H, method=method, bits=3, group_size=4)
    assert weight.codes.shape == weight.values().shape == W.shape
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    assert 3 < weight.bits_per_coefficient < 17  # released grids keep float32 scales
    R = W - weight.values()
    expected = float((((R @ H) * R).sum() / ((W @ H) * W).sum()).sqrt())
    assert weight.relative_error == pytest.approx(expected, rel=1e-4)


def test_objects_do_as_well_as_names(choice) -> None:
    W, H = layer()
    by_name = ptq.quantize_layer(W, H, method="gptq", grid="symmetric", bits=4, damping=0.1)
    by_object = ptq.quantize_layer(
        W, H, method=choice("method", "gptq", damping=0.1), grid=choice("grid", "symmetric"), bits=4
    )
    assert torch.equal(by_name.codes, by_object.codes)


def test_the_float_path_lowers_the_error_it_is_about() -> None:
    W, H = layer()
    generator = torch.Generator().manual_seed(2)
    X_float = torch.randn(11, 4000, generator=generator)
    X = X_float + 0.5 * torch.randn(11, 11, generator=generator) @ X_float / 11**0.5
    H, C = X @ X.T / 4000, X_float @ X.T / 4000
    errors = []
    for cross in (None, C):
        W_hat = ptq.quantize_layer(W, H, method="comq", bits=6, C=cross).values()
        errors.append(float((W @ X_float - W_hat @ X).norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "comk"}, "unknown method 'comk'.*did you mean 'comq'"),
        ({"grid": "afine"}, "unknown grid 'afine'.*did you mean 'affine'"),
        ({"bits": 1.5}, r"integer from 1 to 16.*got 1\.5"),
        ({"group_size": 0}, "group_size must be at least 1.*got 0"),
        ({"sweps": 2}, "unknown key method.sweps.*did you mean 'sweeps'"),
        ({"H": torch.eye(4)}, r"H must be \[1, 11, 11\]"),
    ],
    ids=["method", "grid", "bits", "group", "key", "shape"],
)
def test_refusals(arguments: dict, message: str) -> None:
    W, H = layer()
    with pytest.raises(ptq.InputError, match=message):
        ptq.quantize_layer(W, **{"H": H, **arguments})


@pytest.mark.parametrize("asked", [False, True])
def test_products_are_as_asked_and_as_before_at_the_end(asked: bool) -> None:
    seen = set()

    class Spy(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(x)

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), Spy(4, 4))
    ptq.quantize_model(module, [torch.randn(30, 4)], "comq", bits=4, tf32=asked)
    assert seen == {(asked, asked)}
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
