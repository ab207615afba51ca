"""Quantization: weights and values on grids of few bits."""

from featherweight.quantize.steps import Quantize, QuantizePlan

__all__ = ["Quantize", "QuantizePlan"]
