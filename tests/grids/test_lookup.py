"""The nearest level by two unrelated ways."""

from __future__ import annotations

import pytest
import torch

from ptq.grids.lookup import COMPARED, nearest_level


@pytest.mark.parametrize("size", [2, 5, COMPARED, COMPARED + 1, 40])
def test_nearest_is_the_level_with_the_least_distance(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    levels = torch.randn(3, 4, size, generator=generator).sort(-1).values
    x = 2 * torch.randn(3, 4, 33, generator=generator)
    distance = (x[..., None] - levels[:, :, None, :]).abs()
    index = nearest_level(x, levels)
    torch.testing.assert_close(distance.gather(-1, index[..., None])[..., 0], distance.amin(-1))


def test_levels_broadcast_and_come_back_exactly() -> None:
    levels = torch.tensor([[-1.0, 0.0, 0.5]])
    assert nearest_level(levels.expand(4, -1), levels).tolist() == [[0, 1, 2]] * 4
    assert nearest_level(torch.tensor([[0.25, -9.0, 9.0]]), levels).tolist() == [[2, 0, 2]]
