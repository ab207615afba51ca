"""Quantization: weights and activations on grids of few bits."""

from typing import Any

from featherweight.calibrate.distilled import distilled_data
from featherweight.quantize.damage import Damage, sensitivity
from featherweight.quantize.plan import QuantizePlan, Rung
from featherweight.quantize.step import Quantize

__all__ = ["Damage", "Ladder", "Mixed", "Quantize", "QuantizePlan", "Rung", "distilled_data", "sensitivity"]


def __getattr__(name: str) -> Any:
    if name in ("Ladder", "Mixed"):  # they choose over all families, and lie above this one
        from featherweight import balance

        return getattr(balance, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
