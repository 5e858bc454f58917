"""Masks drawn sixteen bits an element."""

import pytest
import torch

from ptq.seeding import coin_flips, isolated_seed


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1000, 1003), (7, 11, 13, 101)])
def test_as_many_are_true_as_wanted(probability: float, shape: tuple[int, ...]) -> None:
    flips = coin_flips(torch.Size(shape), probability, "cpu", torch.Generator().manual_seed(1))
    assert flips.shape == shape
    assert flips.dtype == torch.bool
    spread = (probability * (1 - probability) / flips.numel()) ** 0.5
    assert abs(float(flips.double().mean()) - probability) <= 5 * spread


def test_neighbours_are_independent() -> None:
    flips = coin_flips(torch.Size((400_000,)), 0.3, "cpu", torch.Generator().manual_seed(2)).double()
    for lag in (1, 2, 3, 4, 8):
        both = float((flips[:-lag] * flips[lag:]).mean())
        assert both == pytest.approx(0.09, abs=5 * 0.29 / 400_000**0.5)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert coin_flips(torch.Size(shape), 0.5, "cpu").shape == shape


def test_the_generator_decides() -> None:
    def draw(seed: int) -> torch.Tensor:
        return coin_flips(torch.Size((9, 9)), 0.5, "cpu", torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    with isolated_seed(5):
        one = coin_flips(torch.Size((9, 9)), 0.5, "cpu")
    with isolated_seed(5):
        assert torch.equal(one, coin_flips(torch.Size((9, 9)), 0.5, "cpu"))
