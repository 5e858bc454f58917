"""The entropy grid: files to the bit, the rate that was asked for, every kind of layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import ptq
from ptq.checkpoint import quantized_bytes
from ptq.config import build, choices, load_choice
from ptq.errors import InputError
from ptq.grids.entropy import EntropyGrid
from ptq.methods.method import LayerMethod, check_pair
from ptq.rate import quantize_to_rate
from tests.conftest import random_problem

GRIDS = ["entropy", "entropy_columns", "entropy_classes"]


def stored_rate(grid: EntropyGrid, codes: torch.Tensor) -> float:
    return sum(grid.storage_bits(codes).values()) / codes.numel()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bits", [0.5, 2, 3.7, 12])
@pytest.mark.parametrize("shape", [(2, 7, 13), (1, 1, 1), (9, 1, 9), (1, 40, 70)], ids=str)
def test_values_come_back_exactly_and_through_storage(choice, name: str, bits: float, shape: tuple) -> None:
    problem = random_problem(shape[1], shape[2], groups=shape[0], dtype=torch.float32)
    for group_size in [None, 4] if name == "entropy_columns" else [None]:
        grid = choice("grid", name).fit(problem.W, bits, group_size, problem.H)
        codes = grid.round(problem.W)
        values = grid.values(codes)
        assert torch.equal(grid.round(values), codes)
        for column in (0, shape[2] - 1):
            code, value = grid.round_column(problem.W[..., column], column)
            assert torch.equal(code.to(codes.dtype), codes[..., column])
            assert torch.equal(value, values[..., column])
        tensors, facts = grid.storage(codes)
        again, codes_again = EntropyGrid.from_storage(tensors, facts)
        assert codes_again.dtype == codes.dtype
        assert torch.equal(codes_again, codes)
        assert torch.equal(again.values(codes_again), values)
        stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
        assert stored == sum(grid.storage_bits(codes).values())


@pytest.mark.parametrize("name", GRIDS)
def test_error_is_at_most_half_a_step_and_nothing_is_clipped(choice, name: str) -> None:
    problem = random_problem(9, 40)
    W = problem.W.clone()
    W[0, 0, 0] = 1e5
    grid = choice("grid", name).fit(W, 2, None, problem.H)
    error = (W - grid.values(grid.round(W))).abs()
    assert float((error / (grid.step * grid.relative())).max()) <= 0.5 + 1e-6
    one_row = grid.row_octaves.any()  # the row of the outlier has a step of its own
    assert grid.round(W).dtype is (torch.int16 if one_row else torch.int32)


@pytest.mark.parametrize("method", ["rtn", "gptq", "watersic"])
@pytest.mark.parametrize("bits", [1.0, 2.0, 3.3])
def test_the_stored_rate_is_the_one_asked_for(choice, method: str, bits: float) -> None:
    """Within 0.005 bit on 64 k weights."""
    problem = random_problem(512, 128, dtype=torch.float32)
    errors = []
    for name in GRIDS if method != "watersic" else GRIDS[:2]:
        codes, grid = quantize_to_rate(choice("method", method), problem, choice("grid", name), bits, None)
        assert abs(stored_rate(grid, codes) - bits) <= 0.005
        errors.append(problem.relative_error(grid.values(codes)))
    fixed = choice("method", "gptq").quantize_layer(problem, choice("grid", "symmetric"), round(bits), None)
    if method != "rtn" and bits <= 3:
        assert max(errors) < problem.relative_error(fixed[1].values(fixed[0]))


@pytest.mark.parametrize("shape", [(16, 9), (40, 24)], ids=str)
def test_small_layers_come_near_the_rate(choice, shape: tuple[int, int]) -> None:
    """A byte of 144 codes is 0.06 bit: within two bytes."""
    problem = random_problem(*shape, dtype=torch.float32)
    codes, grid = quantize_to_rate(choice("method", "gptq"), problem, choice("grid", "entropy"), 3, None)
    assert abs(stored_rate(grid, codes) - 3) <= max(0.005, 16.1 / codes.numel())


def test_rate_falls_as_the_step_grows(choice) -> None:
    problem = random_problem(64, 48)
    grid = choice("grid", "entropy").fit(problem.W, 4)
    rates = []
    for k in range(8):
        coarser = grid.scaled(1.5**k)
        rates.append(stored_rate(coarser, coarser.round(problem.W)))
    assert rates == sorted(rates, reverse=True)


def test_a_high_rate_gives_the_weights(choice) -> None:
    problem = random_problem(20, 30)
    codes, grid = quantize_to_rate(choice("method", "gptq"), problem, choice("grid", "entropy"), 16, None)
    assert problem.relative_error(grid.values(codes)) < 4e-5


def test_steps_of_columns_beat_one_step_where_inputs_differ(choice) -> None:
    """On a layer whose inputs differ by orders of magnitude, at the same stored rate."""
    problem = random_problem(256, 64, dtype=torch.float32)
    gains = torch.logspace(-2, 1, 64, dtype=torch.float64)
    problem = ptq.problem.LayerProblem("gains", problem.W, problem.H * gains[:, None] * gains)
    errors = {}
    for method, name in (("gptq", "entropy"), ("gptq", "entropy_columns"), ("watersic", "entropy_columns")):
        codes, grid = quantize_to_rate(choice("method", method), problem, choice("grid", name), 2, None)
        errors[method, name] = problem.relative_error(grid.values(codes))
    assert errors["gptq", "entropy_columns"] < 0.9 * errors["gptq", "entropy"]
    assert errors["watersic", "entropy_columns"] < errors["gptq", "entropy_columns"]


@pytest.mark.parametrize("shape", [(96, 1, 9), (1, 1, 150), (1, 500, 1), (8, 4, 9), (1, 16, 27)], ids=str)
@pytest.mark.parametrize("bits", [1.5, 3])
def test_steps_are_shared_where_few_weights_would_pay_for_each(choice, shape: tuple, bits: float) -> None:
    """Depthwise, one row, one column, few rows: never far above the error of one step, at the same rate."""
    problem = random_problem(shape[1], shape[2], groups=shape[0], dtype=torch.float32)
    for method in ("gptq", "watersic"):
        errors = {}
        for name in ["entropy"] if method == "watersic" else ["entropy", "entropy_classes", "entropy_rows"]:
            errors[name] = quantized_error(choice, method, name, problem, bits)
        errors["entropy_columns"] = quantized_error(choice, method, "entropy_columns", problem, bits)
        assert max(errors.values()) < {1.5: 0.7, 3: 0.2}[bits]
        assert errors["entropy_columns"] < 1.15 * errors["entropy"]


def quantized_error(choice, method: str, name: str, problem: ptq.problem.LayerProblem, bits: float) -> float:
    """Relative error at `bits`, which are met within two bytes."""
    codes, grid = quantize_to_rate(choice("method", method), problem, choice("grid", name), bits, None)
    assert abs(stored_rate(grid, codes) - bits) <= max(0.005, 16.1 / codes.numel())
    return problem.relative_error(grid.values(codes))


@pytest.mark.parametrize("name", ["entropy_rows", "entropy_classes"])
def test_rows_of_few_inputs_go_without_scales(choice, name: str) -> None:
    W = random_problem(300, 64).W
    assert choice("grid", name).size(W, 3)["parameters"] == 16 + (16 * 300 if name == "entropy_rows" else 0)
    for inputs, scales in ((64, True), (5, False)):
        grid = choice("grid", name).fit(W[..., :inputs], 3)
        assert (not isinstance(grid, EntropyGrid) or bool(grid.row_octaves.any())) == scales
    assert choice("grid", name).size(W[..., :5], 3)["parameters"] == 16


def test_groups_keep_their_steps_when_the_sweep_reaches_them(choice) -> None:
    """They come from the inputs' statistics; the weights met on the way say nothing about them."""
    problem = random_problem(128, 64, dtype=torch.float32)
    gains = torch.logspace(-2, 1, 64, dtype=torch.float64)
    problem = ptq.problem.LayerProblem("gains", problem.W, problem.H * gains[:, None] * gains)
    results = []
    for refit_groups in (False, True):
        method = choice("method", "gptq", act_order=False, refit_groups=refit_groups)
        codes, grid = quantize_to_rate(method, problem, choice("grid", "entropy_columns"), 2, 8)
        results.append(grid.values(codes))
    assert torch.equal(*results)


def test_steps_of_rows_follow_their_size_for_a_few_bits(choice) -> None:
    """Rows of very unlike size: each is as coarse as its own largest weight says, in quarter octaves."""
    problem = random_problem(64, 96)
    sizes = torch.logspace(-2, 1, 64, dtype=problem.W.dtype)
    W = problem.W * sizes[:, None]
    W[0, 5] = 0.0
    spec = choice("grid", "entropy_classes")
    grid = spec.fit(W, 3)
    ratio = grid.relative()[0, :, 0] / W[0].abs().amax(-1)
    ratio = ratio[torch.arange(64) != 5]
    assert float(ratio.max() / ratio.min()) <= 2**0.25 * 1.001
    assert float(grid.row_octaves[0, 5]) == 0
    assert not bool(grid.round(W)[0, 5].any())
    codes, flat_rows = grid.round(W), replace(grid, row_octaves=torch.zeros_like(grid.row_octaves))
    taken = 8 * (len(grid.stream(codes)) - len(flat_rows.stream(codes)))
    assert 64 < taken < 64 * 10  # sizes over ten octaves; 16-bit scales take 64 * 16
    flat = spec.fit(torch.ones_like(W), 3)
    assert not bool(flat.row_octaves.any())


def test_dead_inputs_cost_next_to_nothing(choice) -> None:
    problem = random_problem(64, 48, dtype=torch.float32)
    H = problem.H.clone()
    H[:, 10:40], H[:, :, 10:40] = 0, 0
    dead = ptq.problem.LayerProblem("dead", problem.W, H)
    codes, grid = choice("method", "gptq").quantize_layer(dead, choice("grid", "entropy"), 2, None)
    assert not bool(codes[..., 10:40].any())
    kept = choice("grid", "entropy", zero_dead=False).fit(dead.W, 2, None, H)
    kept = kept.with_step(float(grid.step))
    assert stored_rate(grid, codes) < 0.5 * stored_rate(kept, kept.round(dead.W))
    assert stored_rate(grid, codes) == pytest.approx(2, abs=0.3)  # all of it for the 18 others
    H[:, 1:], H[:, :, 1:] = 0, 0
    nearly = ptq.problem.LayerProblem("nearly dead", problem.W, H)
    codes, grid = quantize_to_rate(choice("method", "gptq"), nearly, choice("grid", "entropy"), 2, None)
    assert 12 / 48 < stored_rate(grid, codes) < 22 / 48  # about most_bits for the one that is left


def methods_for_entropy() -> list[tuple[str, str]]:
    """Every method with every kind of steps that it takes."""
    pairs = []
    for method in choices("method"):
        solver = build(load_choice("method", method), "method")
        for name in GRIDS:
            try:
                check_pair(solver, build(load_choice("grid", name), "grid"))
            except InputError:
                continue
            if isinstance(solver, LayerMethod):
                pairs.append((method, name))
    return pairs


@pytest.mark.parametrize(("method", "name"), methods_for_entropy())
def test_weights_of_dead_inputs_are_zero_under_every_method(choice, method: str, name: str) -> None:
    problem = random_problem(12, 10, dtype=torch.float32)
    H = 1e-6 * problem.H  # far below what stands for a dead input where H is factorised
    H[:, ::2], H[:, :, ::2] = 0, 0
    shortened = {"awq": {"exponents": 2, "shrink": []}, "adaround": {"iterations": 20}}
    solver = choice("method", method, **shortened.get(method, {}))
    dead = ptq.problem.LayerProblem("dead", problem.W, H)
    codes, grid = solver.quantize_layer(dead, choice("grid", name), 4, None)
    assert not bool(codes[..., ::2].any())
    assert bool(codes[..., 1::2].any())
    assert dead.relative_error(grid.values(codes)) < 0.2


def test_refit_is_least_squares_for_the_step(choice) -> None:
    problem = random_problem(11, 30, groups=2)
    grid = choice("grid", "entropy_columns", parameter_bits=32).fit(problem.W, 2, None, problem.H)
    codes = grid.round(problem.W)
    refitted = grid.refit(codes, problem.W, problem.H)
    best = float(problem.error(refitted.values(codes)).sum())
    assert best < float(problem.error(grid.values(codes)).sum())
    for factor in (0.999, 1.001):
        assert float(problem.error(refitted.scaled(factor).values(codes)).sum()) > best


class Mixed(nn.Module):
    """Every kind of layer, with a channel that is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.linear = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)) * (torch.arange(8) != 3)[:, None, None]
        return self.linear(torch.relu(self.grouped(self.depthwise(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("method", "name"), [*(("gptq", name) for name in GRIDS), *(("watersic", name) for name in GRIDS[:2])]
)
def test_saved_model_gives_identical_outputs_in_the_counted_bytes(tmp_path, method: str, name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().eval()
        X = torch.randn(16, 3, 12, 12)
    quantized, report = ptq.quantize_model(model, [X], method, name, 2.5)
    again, _ = ptq.quantize_model(model, [X], method, name, 2.5)
    assert torch.equal(again(X), quantized(X))
    folder = ptq.save(quantized, tmp_path / "model")
    assert torch.equal(ptq.load(folder, Mixed())(X), quantized(X))
    counted = sum(sum(layer.storage_bits.values()) for layer in report.layers)
    assert counted == 8 * quantized_bytes(folder)


@pytest.mark.parametrize("method", ["gptq", "watersic", "brecq"])
def test_inputs_of_eight_bits_beside_entropy_coded_weights(choice, tmp_path, method: str) -> None:
    """The rate is the weights' own, and the file brings both back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().eval()
        X = torch.randn(16, 3, 12, 12)
    bits = choice("bits", "rate", weight=3.0, activation=8)
    settings = {"iterations": 10} if method == "brecq" else {}
    quantized, report = ptq.quantize_model(model, [X], method, "entropy", bits, **settings)
    assert all(layer.activation["bits"] == 8 for layer in report.layers)
    assert report.bits_per_coefficient()["total"] == pytest.approx(
        3.0, abs=0.05
    )  # 8-bit steps are of 700 weights
    again = ptq.load(ptq.save(quantized, tmp_path / "model"), Mixed())
    assert torch.equal(again(X), quantized(X))
    only, _ = ptq.quantize_model(model, [X], method, "entropy", 3.0, **settings)
    assert not torch.equal(only(X), quantized(X))


def test_a_damaged_file_is_refused(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(30, 20))
    quantized, _ = ptq.quantize_model(model, [torch.randn(64, 30)], "gptq", "entropy", 3)
    quantized[0].codes[40] ^= 1
    folder = ptq.save(quantized, tmp_path / "model")
    with pytest.raises(InputError, match="layer '0': the coded weights have checksum"):
        ptq.load(folder, nn.Sequential(nn.Linear(30, 20)))


def test_a_stream_cut_short_is_refused(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(30, 20))
    quantized, _ = ptq.quantize_model(model, [torch.randn(64, 30)], "gptq", "entropy_rows", 3)
    quantized[0].codes = quantized[0].codes[:-3].clone()
    folder = ptq.save(quantized, tmp_path / "model")
    with pytest.raises(InputError, match="damaged or cut short"):
        ptq.load(folder, nn.Sequential(nn.Linear(30, 20)))


@pytest.mark.parametrize("decode", ["at_load", "at_forward"])
def test_codes_are_kept_or_read_in_every_pass(choice, tmp_path, decode: str) -> None:
    model, X = nn.Sequential(nn.Linear(30, 20)), torch.randn(64, 30)
    spec = choice("grid", "entropy", decode=decode)
    quantized, _ = ptq.quantize_model(model, [X], "gptq", spec, 3)
    folder = ptq.save(quantized, tmp_path / "model")
    loaded = ptq.load(folder, nn.Sequential(nn.Linear(30, 20)))
    assert torch.equal(loaded(X), quantized(X))
    kept = loaded[0].grid_and_codes()[1] is loaded[0].grid_and_codes()[1]
    assert kept == (decode == "at_load")
    quantized[0].codes[40] ^= 1  # found at load, whenever the codes are wanted
    with pytest.raises(InputError, match="checksum"):
        ptq.load(ptq.save(quantized, tmp_path / "damaged"), nn.Sequential(nn.Linear(30, 20)))


class Block(nn.Module):
    """A residual block with every kind of convolution and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(torch.relu(self.norm(self.conv(x))))
        return x + self.mix(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("tuning", ["block", "network"])
@pytest.mark.parametrize(("method", "name"), [("watersic", "entropy_columns"), ("gptq", "entropy_rows")])
def test_tuning_moves_the_steps_and_leaves_the_rate(
    choice, tmp_path, tuning: str, method: str, name: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = nn.Sequential(Block(), Block())
        model = nn.Sequential(nn.Conv2d(3, 8, 3), blocks, nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
        X = torch.randn(32, 3, 6, 6)
    settings = choice("tuning", tuning, epochs=4, batch_size=8, learning_rate=0.01)
    plain, report = ptq.quantize_model(model, [X], method, name, 2)
    tuned, tuned_report = ptq.quantize_model(model, [X], method, name, 2, tuning=settings)
    assert all(t.loss_after <= t.loss_before for t in tuned_report.tuning)
    assert any(t.loss_after < t.loss_before for t in tuned_report.tuning)
    names = [name for name, _ in tuned.named_buffers() if name.endswith("step")]
    assert any(not torch.equal(tuned.get_buffer(name), plain.get_buffer(name)) for name in names)
    if tuning == "network":  # codes are the same, so is the stream
        assert torch.equal(tuned[1][0].conv.codes, plain[1][0].conv.codes)
        assert tuned_report.bits_per_coefficient() == report.bits_per_coefficient()
    copy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(Block(), Block()), nn.Flatten(), nn.Linear(128, 5))
    assert torch.equal(ptq.load(ptq.save(tuned, tmp_path / "model"), copy)(X), tuned(X))


@pytest.mark.parametrize("bits", [0, -1, 17])
def test_impossible_bits(choice, bits: float) -> None:
    with pytest.raises(InputError, match=f"above 0 and at most 16.*got {bits:g}"):
        choice("grid", "entropy").fit(torch.randn(1, 2, 3), bits)


def test_one_step_takes_no_group_size(choice) -> None:
    with pytest.raises(InputError, match=r"grid\.steps=columns"):
        choice("grid", "entropy").fit(torch.randn(1, 2, 8), 3, 4)


def test_a_fixed_width_grid_is_refused_with_a_way_out(choice) -> None:
    with pytest.raises(InputError, match="grid=entropy_columns"):
        choice("method", "watersic").quantize_layer(random_problem(3, 5), choice("grid", "affine"), 3, None)
