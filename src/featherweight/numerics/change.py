"""How far values have moved."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def relative_change(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """|after - before|^2 / |before|^2 over all tensors together, summed in float64."""
    away = sum(float((a - b).double().square().sum()) for a, b in zip(after, before, strict=True))
    return away / max(sum(float(b.double().square().sum()) for b in before), 1e-30)


__all__ = ["relative_change"]
