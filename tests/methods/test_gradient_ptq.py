"""Gradient PTQ: the layer on its Gram, blocks, the network; every axis is a working switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ptq
from ptq.block_problem import BlockProblem
from ptq.config import build, load_choice
from ptq.errors import InputError
from ptq.layers import QuantizedLayer
from ptq.losses import Fisher, Loss, largest_directions
from ptq.methods.method import check_pair, stored_size, units_of
from ptq.plan import Call
from ptq.problem import LayerProblem
from ptq.resume import Resume
from ptq.solvers.grid_variables import GridForm, GridVariables
from ptq.solvers.soft_rounding import Kind, Softening, relax
from ptq.unit_loss import Augmentation, BlockLoss
from tests.conftest import random_problem


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.norm(self.conv1(x)))))


class Net(nn.Module):
    """A stem, two residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.blocks = nn.Sequential(Residual(6), Residual(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def network() -> tuple[Net, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval(), list(torch.randn(32, 3, 8, 8).split(16))


@pytest.fixture
def net() -> tuple[Net, list[Tensor]]:
    return network()


QUICK: dict[str, Any] = {"iterations": 60, "rounding_rate": 0.02, "batch_size": 8, "schedule": "cosine"}


def run(
    net: tuple[Net, list[Tensor]], name: str, bits: int | str = 2, grid: str | None = None, **overrides: Any
):
    return ptq.quantize_model(net[0], net[1], name, grid, bits, **{**QUICK, **overrides})


def sampled_adaround(problem: LayerProblem, X: Tensor, grid: Any, iterations: int, rate: float) -> Tensor:
    """AdaRound as usually written, on batches of stored inputs [tokens, in]: what unit=layer must equal."""
    softening = Softening(
        kind=Kind.sigmoid, regularisation=0.01, beta=(20.0, 2.0), warmup=0.2, soft_fractions=[]
    )
    rounding = relax(softening, grid, problem.T, grid.round(problem.T))
    optimizer = torch.optim.Adam([rounding.V.requires_grad_(True)], lr=rate)
    generator = torch.Generator().manual_seed(0)
    for step in range(iterations):
        batch = X[torch.randperm(len(X), generator=generator)[:256]]
        loss = (batch @ (rounding.values(grid)[0] - problem.T[0]).T).square().sum(-1).mean()
        extra = rounding.regulariser(step / iterations)
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
    return rounding.codes(grid)


def test_layer_on_its_gram_equals_sampled_inputs_and_beats_nearest(choice) -> None:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(1024, 24, generator=generator) @ torch.randn(24, 24, generator=generator) / 24**0.5
    W = torch.randn(12, 24, generator=generator)
    problem = LayerProblem("layer", W, X.double().T @ X.double() / len(X))
    spec = choice("grid", "affine_mse")
    for bits in (4, 2):
        grid = spec.fit(problem.T, bits)
        method = choice("method", "adaround", iterations=400, rounding_rate=0.01)
        codes, _ = method.quantize_layer(problem, spec, bits, None)
        sampled = sampled_adaround(problem, X, grid, 400, 0.01)
        ours, theirs, nearest = (
            problem.relative_error(grid.values(c)) for c in (codes, sampled, grid.round(problem.T))
        )
        assert ours <= 1.02 * theirs
        assert ours < 0.9 * nearest


@pytest.mark.parametrize("kind", [k.value for k in Kind])
@pytest.mark.parametrize("grid", ["affine", "codebook", "power", "ptnq_channel", "entropy"])
def test_every_relaxation_on_every_kind_of_grid(choice, kind: str, grid: str) -> None:
    """Never worse than nearest rounding, which keep_best promises; better where the grid leaves room for it.

    The sigmoid starts from the float weights and needs far more iterations than a test has.
    """
    problem = random_problem(6, 20, dtype=torch.float32)
    spec = choice("grid", grid)
    method = choice(
        "method",
        "adaround",
        relaxation=kind,
        variables=["rounding", "grid"],
        soft_fractions=[0.6, 0.3, 0.1] if kind == "progressive" else [],
        iterations=120,
        rounding_rate=0.03,
        grid_rate=0.003,
        schedule="cosine",
        keep_best=True,
        checks=3,
    )
    codes, fitted = method.quantize_layer(problem, spec, 2, None)
    plain = spec.fit(problem.T, 2, None, problem.H)
    nearest = problem.relative_error(plain.values(plain.round(problem.T)))
    better = grid in ("affine", "power") and kind != "sigmoid"
    assert problem.relative_error(fitted.values(codes)) <= nearest * (0.97 if better else 1)


def test_only_hard_codes_are_left_and_they_are_decided(net) -> None:
    quantized, report = run(
        net, "brecq", iterations=200, rounding_rate=0.1, regularisation=0.1, schedule="constant"
    )
    assert [t.unit for t in report.tuning] == ["stem", "blocks.0", "blocks.1", "head"]
    kinds = {type(m).__name__ for m in quantized.modules()}
    assert "SoftLayer" not in kinds
    assert sum(isinstance(m, QuantizedLayer) for m in quantized.modules()) == 6
    for tuned in report.tuning:
        assert tuned.undecided is not None
        assert tuned.undecided < 0.02
        assert tuned.steps == 200
        assert len(tuned.losses) == 100
    assert not any(
        p.requires_grad for m in quantized.modules() if isinstance(m, QuantizedLayer) for p in m.parameters()
    )


def test_layers_trained_one_by_one_report_how_it_went(net) -> None:
    """Losses are those of the layer's own problem; seconds of training are a part of those of solving."""
    _, report = run(
        net, "adaround", iterations=250, rounding_rate=0.1, regularisation=0.1, schedule="constant"
    )
    assert [t.unit for t in report.tuning] == [layer.name for layer in report.layers]
    assert "tune" not in report.seconds
    for tuned in report.tuning:
        assert (tuned.steps, len(tuned.losses)) == (250, 100)
        assert tuned.undecided is not None
        assert tuned.undecided < 0.05
    _, short = run(net, "adaround", iterations=20)
    assert all(t.undecided is not None and t.undecided > 0.3 for t in short.tuning)


def test_the_curve_of_a_layer_is_that_of_its_soft_weights(choice) -> None:
    """At the first step these are the float weights; straight-through codes, hard throughout, start at the
    loss that is measured before.
    """
    problem = random_problem(6, 20, dtype=torch.float32)
    spec = choice("grid", "affine")
    soft = choice("method", "adaround", iterations=3, checks=1)
    codes, grid = soft.quantize_layer(problem, spec, 4, None)
    [(trained, tuned)] = problem.trained
    assert trained is codes
    assert tuned.loss_before > 0
    assert tuned.losses[0] < 0.1 * tuned.loss_before  # of clipped weights only
    assert tuned.loss_after == pytest.approx(float(problem.error(grid.values(codes)).sum()))
    hard = choice("method", "adaround", relaxation="full_range", iterations=3, checks=1)
    hard.quantize_layer(problem, spec, 2, None)
    assert problem.trained[1][1].losses[0] == pytest.approx(problem.trained[1][1].loss_before, rel=1e-4)


def test_of_several_runs_for_a_rate_one_is_reported(net) -> None:
    _, report = run(net, "adaround", grid="entropy", relaxation="full_range", iterations=5)
    assert [t.unit for t in report.tuning] == [layer.name for layer in report.layers]


def test_a_layer_whose_loss_is_not_finite_keeps_its_start(choice) -> None:
    problem = random_problem(6, 20, dtype=torch.float32)
    spec = choice("grid", "affine")
    start = spec.fit(problem.T, 3, None, problem.H).round(problem.T)
    problem.H = problem.H * (1e39 / float(problem.H.abs().max()))  # beyond float32
    for iterations in (250, 60):  # more than a round, and less
        problem.trained.clear()
        method = choice("method", "adaround", iterations=iterations, checks=1)
        codes, _ = method.quantize_layer(problem, spec, 3, None)
        [(_, tuned)] = problem.trained
        assert tuned.steps < iterations
        assert not tuned.kept
        assert tuned.loss_after == tuned.loss_before
        assert torch.equal(codes, start)


def test_a_block_whose_loss_is_not_finite_keeps_its_start(net) -> None:
    plain, _ = ptq.quantize_model(net[0], net[1], "rtn", "affine_mse", 2)
    tuned, report = run(net, "brecq", start="rtn", variables=["rounding", "bias"], bias_rate=1e38, checks=1)
    diverged = [unit for unit in report.tuning if unit.steps < QUICK["iterations"]]
    assert diverged
    assert not any(unit.kept for unit in diverged)
    for unit in diverged:
        for name, layer in plain.get_submodule(unit.unit).named_modules(prefix=unit.unit):
            if isinstance(layer, QuantizedLayer):
                assert torch.equal(layer.grid_and_codes()[1], tuned.get_submodule(name).grid_and_codes()[1])


def test_a_block_gives_less_loss_than_it_started_with(net) -> None:
    for name in ("gradient_ptq", "autoround"):
        _, report = run(net, name, checks=3)
        assert all(t.loss_after <= t.loss_before for t in report.tuning)
        assert sum(t.kept for t in report.tuning) >= 2


BLOCK_AXES = [
    {"loss": "lp", "p": 2.4},
    {"loss": "relative_l2"},
    {"loss": "cosine"},
    {"loss": "kl"},
    {"loss": "fisher_diagonal"},
    {"loss": "fisher_low_rank"},
    {"variables": ["rounding"]},
    {"variables": ["rounding", "grid", "bias"]},
    {"relaxation": "sigmoid"},
    {"relaxation": "progressive", "soft_fractions": [0.5, 0.1], "grid_form": "factor"},
    {"optimizer": "sgd", "rounding_rate": 0.1, "grid_rate": 1.0e-4},
    {"optimizer": "adamw", "weight_decay": 0.01},
    {"optimizer": "adamax"},
    {"optimizer": "radam"},
    {"optimizer": "sign", "schedule": "linear"},
    {"augmentation": "qdrop"},
    {"augmentation": "noise"},
    {"augmentation": "mixup"},
    {"selection": "ambiguous", "selected": 0.5},
    {"selection": "magnitude", "selected": 0.5},
    {"selection": "gradient", "selected": 0.5},
    {"selection": "random", "selected": 0.5},
    {"start": "gptq"},
    {"float_target": False},
    {"unit": "stage"},
    {"unit": "network", "loss": "kl"},
    {"unit": "network", "loss": "l2"},
]


SWITCHED: dict[str, Any] = {"start": "rtn", "checks": 2, "iterations": 30}


@pytest.fixture(scope="module")
def unswitched() -> dict[str, Tensor]:
    """What comes out where no axis is switched."""
    quantized, _ = run(network(), "gradient_ptq", **SWITCHED)
    return quantized.state_dict()


@pytest.mark.parametrize("axis", BLOCK_AXES, ids=lambda axis: "-".join(str(v) for v in axis.values())[:40])
def test_every_axis_is_a_switch_that_works(net, unswitched, axis: dict[str, Any]) -> None:
    """From nearest codes, each choice by itself brings the loss down somewhere, and changes the result."""
    quantized, report = run(net, "gradient_ptq", **{**SWITCHED, **axis})
    assert len(report.tuning) == {"network": 1, "stage": 3}.get(axis.get("unit", "block"), 4)
    assert any(t.kept and t.loss_after < t.loss_before for t in report.tuning)
    assert all(torch.isfinite(quantized(x)).all() for x in net[1])
    state = quantized.state_dict()
    assert state.keys() == unswitched.keys()
    assert any(not torch.equal(state[name], unswitched[name]) for name in state)


def test_a_stage_is_learned_as_one(net) -> None:
    _, by_block = run(net, "brecq", iterations=20)
    quantized, by_stage = run(net, "brecq", iterations=20, unit="stage")
    assert [t.unit for t in by_block.tuning] == ["stem", "blocks.0", "blocks.1", "head"]
    assert [t.unit for t in by_stage.tuning] == ["stem", "blocks", "head"]
    assert len(by_stage.layers) == len(by_block.layers) == 6
    assert sum(isinstance(m, QuantizedLayer) for m in quantized.modules()) == 6
    _, mixed = run(net, "qdrop", iterations=20, unit="stage", loss="fisher_diagonal")
    assert len(mixed.tuning) == 3


def test_without_stages_the_way_out_is_named(choice) -> None:
    language = choice("model", "topics_llama").load()
    with pytest.raises(InputError, match=r"its blocks: model.layers.0, model.layers.1, ….*unit=block or net"):
        units_of(choice("method", "brecq", unit="stage"), language)
    assert units_of(choice("method", "brecq"), language) == language.blocks()
    bare = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(InputError, match="its blocks: none"):
        ptq.quantize_model(bare, [torch.randn(8, 4)], "brecq", unit="stage")


def test_same_seed_same_codes(net) -> None:
    one, two = (run(net, "qdrop", iterations=20)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("loss", ["fisher_diagonal", "fisher_low_rank"])
def test_fisher_losses_where_the_next_module_works_in_place(loss: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)).eval()
    batches = list(torch.randn(16, 3, 8, 8).split(8))
    _, report = run((module, batches), "brecq", iterations=20, loss=loss)
    assert all(unit.loss_before > 0 for unit in report.tuning)


@pytest.mark.parametrize("augmentation", ["qdrop", "noise", "mixup"])
def test_augmentations_of_a_half_precision_model(net, augmentation: str) -> None:
    half = net[0].bfloat16(), [x.bfloat16() for x in net[1]]
    quantized, report = run(half, "brecq", iterations=10, augmentation=augmentation)
    assert all(torch.isfinite(torch.tensor(unit.losses)).all() for unit in report.tuning)
    assert quantized.blocks[0].norm.weight.dtype == torch.bfloat16


def test_few_steps_decide_the_codes(net) -> None:
    """What is evaluated is what was trained."""
    for name in ("brecq_fast", "qdrop_fast"):
        _, report = ptq.quantize_model(net[0], net[1], name, bits=2)
        assert max(unit.undecided for unit in report.tuning) < 0.1


@pytest.mark.parametrize("form", GridForm)
def test_the_logarithm_of_an_exponent_of_one_moves(choice, form: GridForm) -> None:
    problem = random_problem(4, 12, dtype=torch.float32)
    fitted = choice("grid", "power_learned", starts=[1.0], evaluations=0).fit(problem.T, 3)
    assert float(fitted.log_exponent) == 0
    variables = GridVariables(fitted, form, trained=True)
    for v in variables.requires_grad():
        v.data += 0.1
    assert variables.grid().log_exponent.item() == pytest.approx(0.1)


def test_random_selection_leaves_the_others_at_their_first_codes(net) -> None:
    plain, _ = ptq.quantize_model(net[0], net[1], "rtn", "affine_float", 2)
    few = {"selection": "random", "selected": 0.25, "variables": ["rounding"]}
    tuned, _ = run(net, "gradient_ptq", start="rtn", rounding_rate=0.1, keep_best=False, **few)
    for name in ("stem", "blocks.0.conv1"):
        before, after = (m.get_submodule(name).grid_and_codes()[1] for m in (plain, tuned))
        assert 0 < float((before != after).float().mean()) <= 0.25


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_selection_by_gradient_is_that_at_the_quantized_weights(unit: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(12, 6)), torch.randn(64, 12) @ torch.randn(12, 12)
    plain, _ = ptq.quantize_model(module, [x], "rtn", "affine_mse", 2)
    few = {"selection": "gradient", "selected": 0.25, "start": "rtn", "unit": unit, "float_target": False}
    tuned, _ = run((module, [x]), "brecq", rounding_rate=0.1, batch_size=64, **few)
    grid, before = plain[0].grid_and_codes()
    slope = (grid.values(before) - module[0].weight.detach()) @ (x.T @ x)
    least = slope.abs().flatten().topk(18).values[-1]
    changed = before != tuned[0].grid_and_codes()[1]
    assert bool(changed.any())
    assert bool((slope.abs()[changed] >= least * (1 - 1e-4)).all())


@pytest.mark.parametrize("loss", [kind.value for kind in Loss])
def test_blocks_of_linear_layers_have_their_channels_last(loss: str) -> None:
    """[samples, height, width, channels], as in Swin: the loss is that of the same as tokens."""
    torch.manual_seed(0)
    module, images = (
        nn.Sequential(nn.Linear(6, 6), nn.Flatten(1, -2), nn.Linear(6, 4)),
        torch.randn(8, 5, 3, 6),
    )
    tokens = images.flatten(1, 2)
    settings = {"loss": loss, "iterations": 20, "checks": 1}
    losses = [run((module, [x]), "brecq", **settings)[1].tuning[0].loss_before for x in (images, tokens)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    mean = nn.functional.mse_loss
    quantized, _ = ptq.quantize_model(module, [images], "rtn", "affine_mse", 2)
    assert losses[0] == pytest.approx(
        6 * float(mean(quantized[0](images), module[0](images)).detach()), rel=1e-4
    )


def test_inputs_of_layers_are_left_unquantized_at_random(choice) -> None:
    """QDrop's dropping inside a block: a layer that reads the model's input gets no other augmentation."""
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(12, 6)), torch.randn(64, 12)
    bits = choice("bits", "w3a8", activation=2)
    results = {}
    for probability in (0.0, 1.0):
        _, report = ptq.quantize_model(
            module, [x], "qdrop", bits=bits, variables=["rounding"], probability=probability, iterations=20
        )
        (results[probability],) = report.tuning
    assert results[0.0].loss_before == results[1.0].loss_before  # measured as it will run
    assert results[1.0].losses[0] < 0.5 * results[0.0].losses[0]  # weights' error alone


@pytest.mark.parametrize("granularity", ["default", "per_channel"])
def test_steps_of_inputs_are_learned_where_named(net, granularity: str) -> None:
    def steps(**changes: Any) -> dict[str, Tensor]:
        quantized, _ = run(net, "qdrop", bits="w2a4", activations=granularity, **changes)
        state = quantized.state_dict()
        return {name: t for name, t in state.items() if name.endswith("input_quantizer.scale")}

    fixed, learned = steps(variables=["rounding"]), steps(activation_rate=1e-3)
    assert len(fixed) == 6
    assert not torch.equal(fixed["stem.input_quantizer.scale"], learned["stem.input_quantizer.scale"])
    assert_close(learned["stem.input_quantizer.scale"], fixed["stem.input_quantizer.scale"], rtol=0.5, atol=0)


def test_the_starts_own_size_and_refusals(choice) -> None:
    problem = random_problem(6, 20, dtype=torch.float32)
    grid = choice("grid", "affine")
    method = choice("method", "tesseraq", start="awq", iterations=5)
    codes, fitted = method.quantize_layer(problem, grid, 3, None)
    assert stored_size(method, grid, problem.T, 3, None) == fitted.storage_bits(codes)
    assert stored_size(method, grid, problem.T, 3, None) != grid.size(problem.T, 3, None)
    with pytest.raises(InputError, match=r"hqq solves for real offsets.*use grid=affine_float"):
        check_pair(choice("method", "adaround", start="hqq"), grid)
    check_pair(choice("method", "adaround", start="hqq"), choice("grid", "affine_float"))


def block_loss(
    block: nn.Module, original: nn.Module, x: Tensor, x_float: Tensor, target: Tensor, batch_size: int,
    augmentation: Augmentation, *, float_target: bool,
) -> BlockLoss:  # fmt: skip
    """l2 on one call of a block, whose prefix delivers x and whose float prefix x_float."""
    problem = BlockProblem(
        name="block", block=block, original=original, calls=[Call((x,), {})],
        float_calls=[Call((x_float,), {})], targets=[target], output_gradients=None, seed=0,
        progress=False, resume=Resume(),
    )  # fmt: skip
    return BlockLoss(
        problem, problem.targets, kind=Loss.l2, p=2.0, batch_size=batch_size, augmentation=augmentation,
        probability=0.5, strength=1.0, float_target=float_target, fisher_rank=1, low_rank_fraction=0.5,
        device=torch.device("cpu"), seed=0,
    )  # fmt: skip


class Flipping(nn.Linear):
    """Its output hangs on the number of samples, as that of rounded inputs may."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * len(x)


def test_calls_are_cut_by_what_the_float_block_does() -> None:
    torch.manual_seed(0)
    original, x = nn.Sequential(nn.Linear(5, 5)), torch.randn(16, 5)
    block, target = nn.Sequential(Flipping(5, 5)), original(x).detach()
    loss = block_loss(block, original, x, x + 0.1, target, 4, Augmentation.qdrop, float_target=True)
    assert [len(piece.target) for piece in loss.pieces] == [4, 4, 4, 4]
    assert [len(piece.float_input) for piece in loss.pieces] == [4, 4, 4, 4]


@pytest.mark.parametrize("float_target", [False, True])
def test_mixed_samples_have_the_target_that_is_measured(float_target: bool) -> None:
    """What the block's float twin gives for the mixed inputs of the kind that the plain target is of."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 5))
    x, x_float = torch.randn(2, 16, 5)
    target = block(x_float if float_target else x).detach()
    loss = block_loss(block, block, x, x_float, target, 16, Augmentation.mixup, float_target=float_target)
    (piece,) = loss.pieces
    assert (float(loss.plain(piece)) > 0.1) == float_target  # an unquantized block has no loss of its own
    assert (float(loss.training(piece)) > 0.1) == float_target


def test_fisher_weights_are_those_of_the_float_network(choice, net) -> None:
    weight = torch.tensor([[1.0, 3.0]])
    output, target = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    assert float(Loss.fisher_diagonal.of(output, target, fisher=Fisher(diagonal=weight))) == 1 + 3 * 4
    along = Fisher(diagonal=weight, directions=torch.tensor([[2.0, 1.0], [0.0, 1.0]]), low_rank_fraction=0.25)
    expected = 0.75 * (1 + 3 * 4) + 0.25 * ((2 + 2) ** 2 + 2**2)
    assert float(Loss.fisher_low_rank.of(output, target, fisher=along)) == expected
    assert float(Loss.lp.of(output, target, 1.0)) == pytest.approx(3, abs=1e-4)
    assert float(Loss.cosine.of(output, output)) == pytest.approx(0, abs=1e-6)
    assert float(Loss.kl.of(output, output + 5)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [3, 40])
def test_directions_give_the_best_low_rank_fisher(rank: int) -> None:
    """Against the singular vectors of all gradients at once; with full rank, the Fisher matrix itself."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(23, 2, 3, 3, generator=generator) * torch.tensor([3.0, 0.1])[:, None, None]
    gradients = [g.float() for g in whole.split(10)]
    u = largest_directions(gradients, rank).flatten(1)
    A = whole.flatten(1)
    fisher = A.mT @ A / len(A)
    _, S, V = torch.linalg.svd(A, full_matrices=False)
    best = (V[:rank].mT * S[:rank].square() / len(A)) @ V[:rank]
    assert len(u) == min(rank, 18)
    half = largest_directions([g.bfloat16() for g in gradients], 3).flatten(1)
    torch.testing.assert_close(half.mT @ half, u[:3].mT @ u[:3], rtol=0.05, atol=0.05)
    torch.testing.assert_close(u.mT @ u, best, rtol=1e-3, atol=1e-3)
    assert torch.allclose(best, fisher, atol=1e-3) == (rank == 40)


def test_the_low_rank_loss_is_the_fishers_quadratic_form_and_the_diagonal_its_own() -> None:
    """With full rank and nothing of the diagonal: mean over samples of dᵀ F d, a position's share of it."""
    generator = torch.Generator().manual_seed(1)
    gradients, output, target = torch.randn(3, 12, 4, 2, 1, generator=generator).unbind()
    directions = largest_directions([gradients], 99)
    fisher = Fisher(diagonal=gradients.square(), directions=directions, low_rank_fraction=1.0)
    F = gradients.flatten(1).mT @ gradients.flatten(1) / 12
    d = (output - target).flatten(1)
    wanted = (d @ F * d).sum(1).mean() / 2  # two positions
    torch.testing.assert_close(Loss.fisher_low_rank.of(output, target, fisher=fisher), wanted)
    fisher.low_rank_fraction = 0.0
    torch.testing.assert_close(
        Loss.fisher_low_rank.of(output, target, fisher=fisher),
        Loss.fisher_diagonal.of(output, target, fisher=fisher),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss": "cosine"}, "squared errors only; got loss=cosine"),
        ({"augmentation": "qdrop"}, "changes a block's inputs"),
        ({"unit": "network", "loss": "fisher_low_rank"}, "weighs the outputs of a block; use unit=block or"),
        ({"fisher_rank": 0}, "fisher_rank must be at least 1.*got 0 and 0.5"),
        ({"low_rank_fraction": 1.5}, r"low_rank_fraction in \[0, 1\]; got 15 and 1.5"),
        ({"variables": ["rounding", "bias"]}, "rounding and grid only"),
        ({"variables": ["grid"]}, "must name rounding"),
        ({"grid_form": "range"}, "rounded anew"),
        ({"start": "comqq"}, "did you mean 'comq'"),
        ({"start": "qft"}, "method.start=qft does not solve layer by layer"),
        ({"start": "brecq"}, "method.start=brecq does not solve layer by layer"),
        ({"beta": []}, r"beta and betas are pairs of numbers; got \[\] and"),
        ({"unit": "block", "augmentation": "mixup", "strength": 2.5}, "use at most 2"),
        ({"selected": 0.0}, r"fraction in \(0, 1\]"),
        ({"rounding_rate": 0.0}, "rates must be positive"),
        ({"float_target": True}, "takes its target from calibration.target"),
        ({"selected": 0.5}, "selected=0.5 needs a selection"),
        ({"momentum": 0.9}, "momentum is of optimizer=sgd; got 0.9 with adam"),
        ({"optimizer": "sign", "weight_decay": 0.1}, "optimizer=sign takes no weight_decay"),
        ({"relaxation": "hard"}, "ill-typed value for method.relaxation"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_wrong_settings(overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(load_choice("method", "adaround", **overrides), "method")


@pytest.mark.parametrize("name", ["affine", "affine_float", "symmetric"])
def test_ranges_of_rows_that_all_but_vanish_stay_finite(choice, name: str) -> None:
    """Weight decay leaves dead rows of 1e-40, whose steps have no thousandth part."""
    W = torch.randn(1, 4, 20, generator=torch.Generator().manual_seed(0))
    W[:, 1] *= 1e-40
    variables = GridVariables(choice("grid", name).fit(W, 2), GridForm.range, trained=True)
    trained = variables.requires_grad()
    with torch.no_grad():
        for v in trained:
            v.fill_(-1.0)
    grid = variables.grid()
    assert all(bool(torch.isfinite(p).all()) for p in grid.parameters().values())
    values = grid.values(grid.round(W))
    assert bool(torch.isfinite(values).all())
    values.sum().backward()
    assert all(v.grad is None or bool(torch.isfinite(v.grad).all()) for v in trained)
    stored = variables.stored()
    stored.storage(stored.round(W))
