"""Quantization: weights and activations on grids of few bits."""

from featherweight.calibrate.distilled import distilled_data
from featherweight.quantize.damage import Damage, sensitivity
from featherweight.quantize.plan import QuantizePlan, Rung
from featherweight.quantize.step import Quantize
from featherweight.steps.moved import moved

__all__ = ["Damage", "Quantize", "QuantizePlan", "Rung", "distilled_data", "sensitivity"]

__getattr__ = moved(__name__, {"Ladder": "featherweight.balance.Ladder", "Mixed": "featherweight.balance.Mixed"})
