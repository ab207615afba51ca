"""Quantization: weights and values on grids of few bits."""

from featherweight.quantize.damage import Damage, sensitivity
from featherweight.quantize.distilled import distilled_data
from featherweight.quantize.ladder import Ladder
from featherweight.quantize.mixed import Mixed
from featherweight.quantize.steps import Quantize, QuantizePlan, Rung

__all__ = ["Damage", "Ladder", "Mixed", "Quantize", "QuantizePlan", "Rung", "distilled_data", "sensitivity"]
