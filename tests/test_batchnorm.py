"""BatchNorm re-estimation against statistics taken by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

import ptq
from ptq.batchnorm import reestimate
from ptq.models.adapter import ModelAdapter


def test_statistics_are_those_of_the_quantized_network(choice) -> None:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2)
    ).eval()
    batches = [torch.randn(10, 3, 6, 6, generator=generator) + 1 for _ in range(4)]
    settings = choice("calibration", "default", reestimate_batchnorm=True)
    quantized, report = ptq.quantize_model(module, batches, "rtn", bits=2, settings=settings)
    y = torch.stack([quantized[0](batch) for batch in batches])  # [batches, images, channels, height, width]
    assert_close(quantized[1].running_mean, y.mean((0, 1, 3, 4)))
    per_batch = y.transpose(1, 2).flatten(2).var(-1)
    assert_close(quantized[1].running_var, per_batch.mean(0))
    assert not any(m.training for m in quantized.modules())
    assert report.seconds["reestimate_batchnorm"] > 0
    plain, _ = ptq.quantize_model(module, batches, "rtn", bits=2)
    assert torch.equal(plain[1].running_mean, module[1].running_mean)


def test_a_model_without_batchnorm_is_left_alone() -> None:
    module = nn.Linear(3, 3)
    adapter = ModelAdapter(name="plain", module=module, task="any", forward=lambda m, x: m(x))
    assert reestimate(adapter, [torch.ones(2, 3)]) == 0
