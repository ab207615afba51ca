"""Quantization: weights and activations on grids of few bits."""

from featherweight.calibrate.distilled import distilled_data
from featherweight.quantize.candidates import Kinds
from featherweight.quantize.plan import QuantizePlan, Rung
from featherweight.quantize.sensitivity import Damage, sensitivity
from featherweight.quantize.step import Quantize
from featherweight.steps.moved import moved

__all__ = ["Damage", "Kinds", "Quantize", "QuantizePlan", "Rung", "distilled_data", "sensitivity"]

__getattr__ = moved(__name__, {n: f"featherweight.balance.flat.{n}" for n in ("Ladder", "Mixed")},
                    {"Ladder": "fw.balance.Ladder(fw.quantize.Quantize(...), score_drop=...)",
                     "Mixed": "fw.balance.Mixed(fw.quantize.Quantize(...), bytes=...)"})
