"""ptq: a research framework for post-training quantization."""

from ptq.api import QuantizedWeight, quantize_layer, quantize_model
from ptq.checkpoint import load, save
from ptq.errors import InputError

__all__ = ["InputError", "QuantizedWeight", "load", "quantize_layer", "quantize_model", "save"]
