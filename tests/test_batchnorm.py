"""BatchNorm after quantization: biases taken up, and statistics taken by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ptq
from ptq.errors import InputError


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


class Residual(nn.Module):
    """Two layers without bias, of which a BatchNorm alone reads the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.norm1(self.first(x)).relu())
        return self.norm2(y) + y


def test_a_norm_takes_up_the_bias_of_the_layer_that_it_alone_reads(choice, monkeypatch) -> None:
    torch.manual_seed(0)
    module, x = Residual().eval(), torch.randn(8, 3, 6, 6) + 1
    settings = choice("calibration", "default", bias_correction=True)
    made, report = ptq.quantize_model(module, [x], "rtn", bits=2, settings=settings)
    monkeypatch.setattr("ptq.walk.readers", lambda *_: {})
    kept, wide = ptq.quantize_model(module, [x], "rtn", bits=2, settings=settings)
    assert made.first.bias is None
    assert_close(made.norm1.running_mean, module.norm1.running_mean - kept.first.bias)
    assert float(kept.first.bias.abs().min()) > 0
    assert_close(made(x), kept(x))
    assert [layer.name for layer in report.layers if layer.added_bias] == ["second"]
    assert [layer.name for layer in wide.layers if layer.added_bias] == ["first", "second"]
    parameters = sum(p.numel() for p in module.parameters())
    saved = (wide.model_bits_per_coefficient(kept) - report.model_bits_per_coefficient(made)) * parameters
    assert saved == pytest.approx(4 * 32)


@pytest.mark.parametrize("folded", [False, True])
def test_nothing_to_reestimate_is_said(choice, folded: bool) -> None:
    norm = [nn.BatchNorm2d(4)] if folded else []
    module = nn.Sequential(nn.Conv2d(3, 4, 3), *norm, nn.Flatten(), nn.Linear(64, 2)).eval()
    settings = choice("calibration", "default", reestimate_batchnorm=True)
    preparation = "fold_batchnorm" if folded else None
    batches = [torch.ones(2, 3, 6, 6)]
    with pytest.raises(InputError, match="has no BatchNorm, or it was folded"):
        ptq.quantize_model(module, batches, "rtn", bits=2, settings=settings, preparation=preparation)
