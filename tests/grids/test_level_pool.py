"""Fitting level-table grids: what theory promises, the limits of the pool, odd rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ptq
from ptq.errors import InputError
from ptq.grids.shapes import SHAPES, TABLES, Function
from tests.conftest import random_problem

GRIDS = ["ptnq", "ptnq_channel", "ptnq_gram", "power", "normal_float", "normal_float_mse", "apot"]
COMPRESSIVE = ["power", "arcsin", "sinh", "artanh", "tan"]
EXPANSIVE = ["arcsinh", "tanh", "arctan", "sin"]


def random_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_error(grid, W: torch.Tensor) -> torch.Tensor:
    return (W - grid.values(grid.round(W))).square().sum(-1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 5], ids=["row", "ragged"])
def test_the_affine_member_on_min_max_is_the_affine_grid(choice, bits: int, group_size: int | None) -> None:
    W = random_weights(2, 7, 13)
    levels = choice("grid", "ptnq", functions=["affine"], range="min_max", refits=0, parameter_bits=32).fit(
        W, bits, group_size
    )
    affine = choice("grid", "affine_float", parameter_bits=32).fit(W, bits, group_size)
    assert torch.equal(levels.round(W), affine.round(W))
    assert_close(levels.values(levels.round(W)), affine.values(affine.round(W)), rtol=0, atol=1e-6)
    assert levels.storage_bits(levels.round(W)) == affine.storage_bits(affine.round(W))
    problem = random_problem(5, 18)
    fits = [
        choice("grid", name, parameter_bits=32, **more).fit(problem.W, 3, group_size)
        for name, more in (
            ("ptnq", {"functions": ["affine"], "range": "min_max", "refits": 0}),
            ("affine_float", {}),
        )
    ]
    codes = fits[0].round(problem.W)
    refitted = [problem.error(g.refit(codes, problem.W, problem.H).values(codes)) for g in fits]
    assert_close(refitted[0], refitted[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("function", list(SHAPES), ids=lambda f: f.value)
def test_a_pool_with_affine_is_never_worse_than_affine_alone(choice, function: Function) -> None:
    W = random_weights(1, 16, 200) ** 3
    alone = choice("grid", "ptnq", functions=["affine"], parameter_bits=32).fit(W, 3)
    names = list(dict.fromkeys(["affine", function.value]))
    both = choice("grid", "ptnq", functions=names, function_scope="channel", parameter_bits=32).fit(W, 3)
    assert float(weight_error(both, W).sum()) <= float(weight_error(alone, W).sum()) * (1 + 1e-6)


@pytest.mark.parametrize("metric", ["weight", "diagonal", "gram"])
@pytest.mark.parametrize("bits", [4, 2])
def test_fits_beat_min_max_affine_under_their_own_metric(choice, metric: str, bits: int) -> None:
    problem = random_problem(12, 40)
    H = {"weight": torch.eye(40)[None], "diagonal": torch.diag_embed(problem.H.diagonal(dim1=1, dim2=2))}.get(
        metric, problem.H
    )
    grids = [
        choice("grid", "ptnq", metric=metric).fit(problem.W, bits, None, problem.H),
        choice("grid", "affine_float").fit(problem.W, bits),
    ]
    errors = []
    for grid in grids:
        R = problem.W - grid.values(grid.round(problem.W))
        errors.append(((R @ H.double()) * R).sum(-1))
    assert bool((errors[0] < errors[1] * 1.02).all())
    assert float(errors[0].sum()) < 0.8 * float(errors[1].sum())


def test_each_metric_is_best_at_its_own(choice) -> None:
    problem = random_problem(24, 40)
    errors = {}
    for metric in ("weight", "gram"):
        grid = choice("grid", "ptnq", metric=metric).fit(problem.W, 3, None, problem.H)
        W_hat = grid.values(grid.round(problem.W))
        errors[metric] = float((problem.W - W_hat).square().sum()), float(problem.error(W_hat).sum())
    assert errors["weight"][0] < errors["gram"][0]
    assert errors["gram"][1] < errors["weight"][1]


@pytest.mark.parametrize("name", ["ptnq", "power", "apot"])
@pytest.mark.parametrize("group_size", [None, 16], ids=["row", "groups"])
def test_closed_form_refits_never_raise_the_error(choice, name: str, group_size: int | None) -> None:
    W = random_weights(1, 20, 60)
    errors = [
        weight_error(choice("grid", name, refits=k, parameter_bits=32).fit(W, 3, group_size), W)
        for k in (0, 1, 3, 8)
    ]
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert bool((more <= fewer * (1 + 1e-6)).all())
    assert float(errors[1].sum()) < float(errors[0].sum())


@pytest.mark.parametrize(("scope", "wider"), [("channel", "layer"), ("group", "channel")])
def test_a_narrower_choice_is_never_worse(choice, scope: str, wider: str) -> None:
    W = torch.cat([random_weights(1, 6, 64), random_weights(1, 6, 64, seed=1) ** 3], 1)
    errors = [
        float(weight_error(choice("grid", "ptnq", function_scope=s, refits=6).fit(W, 4, 32), W).sum())
        for s in (scope, wider)
    ]
    assert errors[0] < errors[1]


def test_one_function_and_one_exponent_serve_the_layer(choice) -> None:
    W = random_weights(1, 6, 64) ** 3
    power = choice("grid", "power").fit(W, 4, 16)
    assert power.t.shape == power.function.shape == (1, 1, 1)
    # cubes of Gaussians want an exponent well above 1 (t runs from 0.5 to 3 in 64 steps)
    assert float(0.5 + 2.5 * power.t / 63) > 1.5
    ptnq = choice("grid", "ptnq").fit(W, 4, 16)
    assert ptnq.function.shape == (1, 1, 1)
    assert ptnq.t.shape == ptnq.scale.shape == (1, 6, 4)


def test_normal_float_scales_by_the_largest_magnitude(choice) -> None:
    W = random_weights(1, 6, 64)
    grid = choice("grid", "normal_float", parameter_bits=32).fit(W, 4, 16)
    assert_close(grid.scale, W.unflatten(-1, (4, 16)).abs().amax(-1))
    assert grid.offset is None


@pytest.mark.parametrize("name", ["ptnq", "power", "apot"])
def test_scaling_and_permuting_rows(choice, name: str) -> None:
    W = random_weights(1, 6, 17)
    spec = choice("grid", name, parameter_bits=32)

    def quantized(V: torch.Tensor) -> torch.Tensor:
        grid = spec.fit(V, 3)
        return grid.values(grid.round(V))

    assert_close(quantized(2 * W), 2 * quantized(W))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(quantized(W[:, order]), quantized(W)[:, order])


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("constant", [0.0, 0.37, -2.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_constant_rows_are_exact(choice, name: str, constant: float, bits: int) -> None:
    W = torch.full((1, 3, 8), constant)
    W[0, 2, 3] += 0.5  # one row that is not
    grid = choice("grid", name, parameter_bits=32).fit(W, bits, None, torch.eye(8)[None])
    error = (W - grid.values(grid.round(W)))[0, :2].abs().max()
    assert float(error) <= abs(constant) * 1e-6


def test_the_full_layout_reaches_a_constant_of_either_sign(choice) -> None:
    W = torch.tensor([0.37, -0.37]).reshape(1, 2, 1).expand(1, 2, 8).contiguous()
    grid = choice("grid", "ptnq", layout="full", offset=False, parameter_bits=32).fit(W, 3)
    assert_close(grid.values(grid.round(W)), W)


def test_the_odd_layout_keeps_zeros(choice) -> None:
    W = random_weights(1, 5, 60)
    W[..., ::3] = 0
    grid = choice("grid", "ptnq", layout="odd", offset=False).fit(W, 3)
    assert bool((grid.values(grid.round(W))[..., ::3] == 0).all())


def test_a_tensor_grid_has_one_of_everything(choice) -> None:
    W = random_weights(3, 4, 9)
    H = torch.eye(9, dtype=torch.float64).expand(3, -1, -1)
    for metric in ("weight", "diagonal", "gram"):
        spec = choice("grid", "ptnq", granularity="tensor", metric=metric)
        grid = spec.fit(W, 4, None, H)
        assert grid.scale.shape == grid.t.shape == grid.function.shape == (1, 1, 1)
        refitted = grid.refit(grid.round(W), W, H)
        assert refitted.scale.shape == (1, 1, 1)
    with pytest.raises(InputError, match="one scale per layer"):
        spec.fit(W, 4, 3)


def test_dead_inputs_leave_a_sensible_grid(choice) -> None:
    W = random_weights(1, 5, 30)
    for H in (torch.zeros(1, 30, 30), torch.diag_embed((torch.arange(30) % 2).float())[None]):
        for metric in ("diagonal", "gram"):
            grid = choice("grid", "ptnq", metric=metric).fit(W, 4, None, H)
            assert float(weight_error(grid, W).sum()) < 0.05 * float(W.square().sum())


def test_signal_to_noise_of_the_pool(choice) -> None:
    """Decibels at 4 bits, symmetric odd codes, clip and t per unit of 4096 samples, mean of 8 draws."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 8, 4096, generator=generator, dtype=torch.float64)
    uniform = torch.rand(1, 8, 4096, generator=generator, dtype=torch.float64) - 0.5
    chi = torch.randn(4, 1, 8, 4096, generator=generator, dtype=torch.float64).square().mean(0)
    draws = {
        "normal": normal,
        "laplace": -uniform.sign() * torch.log1p(-2 * uniform.abs()),
        "t4": torch.randn(1, 8, 4096, generator=generator, dtype=torch.float64) / chi.sqrt(),
    }

    def decibels(W: torch.Tensor, name: str, **more) -> float:
        grid = choice("grid", name, parameter_bits=32, **more).fit(W, 4)
        return float(10 * (W.square().sum(-1) / weight_error(grid, W)).log10().mean())

    symmetric = {"layout": "odd", "offset": False}
    expected = {
        "normal": [18.9, 19.3, 19.8, 19.7, 19.8, 19.8],
        "laplace": [15.8, 17.2, 17.5, 17.9, 17.8, 17.9],
    }
    measured = {
        kind: [decibels(W, "ptnq", functions=[f], **symmetric) for f in ["affine", *COMPRESSIVE]]
        for kind, W in draws.items()
    }
    for kind, values in expected.items():
        assert measured[kind] == pytest.approx(values, abs=0.5)
    affine, power, arcsin, sinh, artanh, tan = measured["t4"]
    assert affine + 1 < min(power, arcsin) < sinh < tan
    assert arcsin < artanh < tan
    for kind, W in draws.items():
        for function in EXPANSIVE:  # the weights' error has no use for them
            value = decibels(W, "ptnq", functions=[function], **symmetric)
            assert value == pytest.approx(measured[kind][0], abs=0.2)
    absmax = [
        decibels(draws[k], "ptnq", functions=["affine"], range="min_max", refits=0, **symmetric)
        for k in draws
    ]
    assert absmax[:2] == pytest.approx([16.2, 12.3], abs=0.7)
    assert all(clipped[0] > plain + 2 for clipped, plain in zip(measured.values(), absmax, strict=True))
    assert decibels(draws["normal"], "normal_float") == pytest.approx(19.3, abs=0.5)
    assert decibels(draws["normal"], "normal_float_mse") == pytest.approx(20.2, abs=0.5)
    assert decibels(draws["laplace"], "normal_float_mse") == pytest.approx(18.0, abs=0.5)


@pytest.mark.parametrize("method", ["rtn", "gptq", "comq"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_ptnq_beats_affine_under_every_solver(choice, golden, method: str, bits: int) -> None:
    errors = []
    for name in ("ptnq", "affine_float"):
        codes, grid = choice("method", method).quantize_layer(
            golden.problem, choice("grid", name), bits, None
        )
        errors.append(golden.error(grid.values(codes)[0]))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["ptnq_channel", "power", "normal_float", "apot"])
def test_groups_are_refitted_inside_the_sweep(choice, name: str) -> None:
    problem = random_problem(6, 20)
    method = choice("method", "gptq_paper")
    codes, grid = method.quantize_layer(problem, choice("grid", name), 4, 6)
    assert grid.scale.shape == (1, 6, 4)
    assert problem.relative_error(grid.values(codes)) < 0.2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"functions": []}, "functions needs one name.*got none"),
        ({"functions": ["sinh", "sinh"]}, "each once; got sinh, sinh"),
        ({"functions": ["sinh", "normal_float"]}, "layout=table belongs to.*got layout=midrise"),
        ({"layout": "table"}, "layout=table belongs to.*got layout=table with affine"),
        ({"functions": [f.value for f in TABLES], "layout": "table"}, "a pool of its own"),
        ({"parameter_bits": 8}, "16 or 32; got 8"),
        ({"min_shrink": 0.0}, r"min_shrink in \(0, 1\]; got 24 and 0"),
        ({"t_steps": 0}, "t_steps and finalists must be at least 1.*got 0, 2 and 3"),
        ({"t_scope": "layer", "function_scope": "channel"}, "t_scope must not be wider"),
        ({"functions": ["cosh"]}, "ill-typed value for grid.functions"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_settings(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("grid", "ptnq", **overrides)


@pytest.mark.parametrize(("name", "bits"), [("ptnq", 9), ("power", 1), ("ptnq", 2.5), ("apot", 1)])
def test_impossible_bits(choice, name: str, bits: float) -> None:
    with pytest.raises(InputError, match=f"bits.*got {bits:g}"):
        choice("grid", name).fit(torch.randn(1, 2, 3), bits)


def test_a_model_has_one_function_the_best_over_all_its_layers(choice) -> None:
    """And a layer by itself the one it would choose alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 12)).eval()
    with torch.no_grad():
        model[2].weight.copy_(10 * torch.tan(1.45 * (2 * torch.rand(12, 30) - 1)))
    pool = {"functions": ["affine", "tan", "tanh"], "parameter_bits": 32}
    spec = choice("grid", "ptnq_model", **pool)
    quantized, _ = ptq.quantize_model(model, [torch.randn(16, 40)], "rtn", spec, 3)
    grids = [layer.grid_and_codes()[0] for layer in (quantized[0], quantized[2])]
    assert [[f.value for f in grid.pool.functions] for grid in grids] == [["tan"]] * 2
    assert all(grid.function.numel() == 1 for grid in grids)  # and no bits for a choice
    W = model[0].weight.detach()[None]
    alone = choice("grid", "ptnq", **pool).fit(W, 3)
    assert torch.equal(spec.fit(W, 3).values(spec.fit(W, 3).round(W)), alone.values(alone.round(W)))
    errors = {
        name: sum(
            float(weight_error(choice("grid", "ptnq", **(pool | {"functions": [name]})).fit(w, 3), w).sum())
            for w in (W, model[2].weight.detach()[None])
        )
        for name in pool["functions"]
    }
    assert min(errors, key=errors.__getitem__) == "tan"
