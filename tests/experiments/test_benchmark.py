"""The benchmark's layers, its limit and its fractions."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments.benchmark import (
    against,
    distortion_limit,
    gram,
    grid_table,
    method_table,
    seeded_layer,
)
from ptq.problem import LayerProblem


def test_layers_are_seeded_and_of_the_stated_kind() -> None:
    W, X, held_out = seeded_layer(128, 2048)
    again = seeded_layer(128, 2048)
    for first, second in zip((W, X, held_out), again, strict=True):
        assert torch.equal(first, second)
    kurtosis = W.pow(4).mean(1) / W.square().mean(1).square()  # 3 for a Gaussian row
    assert float(kurtosis[::8].median()) > 4
    gaussian = torch.ones(128, dtype=torch.bool)
    gaussian[::8] = False
    assert float(kurtosis[gaussian].median()) == pytest.approx(3, rel=0.1)
    spectrum = torch.linalg.eigvalsh(gram(X))
    assert 1e3 < float(spectrum[-1] / spectrum[0]) < 1e5
    torch.testing.assert_close(gram(X), gram(held_out), rtol=0, atol=0.15 * float(spectrum[-1]))
    assert not torch.equal(X, held_out)


def test_limit_of_white_inputs_halves_with_each_bit_and_a_flat_spectrum_is_the_worst() -> None:
    white = torch.eye(12)
    for bits in (1, 2, 3.5):
        assert distortion_limit(white, bits) == pytest.approx(2.0**-bits, rel=1e-6)
    # two variances, both above the water: geometric mean over arithmetic mean
    two = torch.diag(torch.tensor([4.0, 1.0]))
    assert distortion_limit(two, 2) == pytest.approx((2 / 2.5) ** 0.5 / 4, rel=1e-6)
    # a weak input below the water costs its own variance: 2 bits on one coefficient and none on the other
    weak = torch.diag(torch.tensor([1.0, 1e-6]))
    assert distortion_limit(weak, 1) == pytest.approx(((2.0**-4 + 1e-6) / (1 + 1e-6)) ** 0.5, rel=1e-5)


def test_table_has_every_method_at_every_width_and_errors_of_both_inputs() -> None:
    table = method_table([24], 200, [4, 2], 1, ["rtn", "comq"])
    assert list(table["method"]) == ["rtn", "comq", "(limit)"] * 2
    W, _, X_held_out = seeded_layer(24, 200)
    zero = LayerProblem("zero", W, gram(X_held_out)).relative_error(torch.zeros_like(W)[None])
    assert zero == pytest.approx(1)
    for _, row in table.iterrows():
        assert 0 < row["calibration error"] < 1
        assert 0 < row["held-out error"] < 1
        assert row["bits per coefficient"] >= row["bits"]
    at_two = table[table["bits"] == 2].set_index("method")["calibration error"]
    assert at_two["(limit)"] < at_two["comq"] < at_two["rtn"]


def test_grids_are_fitted_to_the_weights_and_a_pool_beats_its_affine_shape() -> None:
    table = grid_table([48], [3], 1, ["affine", "ptnq_channel"])
    assert list(table["grid"]) == ["affine", "ptnq_channel"]
    assert (table["seconds"] > 0).all()
    affine, pool = table["weight error"]
    assert 0 < pool < affine < 1


def test_fractions_are_taken_on_the_same_layer() -> None:
    rows = [(8, 2, "a", 1.0, 0.2, 0.4), (8, 2, "b", 4.0, 0.4, 0.5), (16, 2, "a", 3.0, 0.3, 0.6)]
    columns = ["size", "bits", "method", "seconds", "calibration error", "held-out error"]
    result = against(pd.DataFrame(rows, columns=columns), "b")
    assert result.values.tolist() == [[8, 2, "a", 0.5, 0.8, 0.25]]
