"""Affine grids of integers: choosing scale and zero point, rounding to them and back.

A value x stands as q = clamp(round(x / scale) + zero_point, lowest, highest) and is read as (q - zero_point) * scale
(Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
eq. 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: scales are kept away from zero, so that one over a scale is a float32 too
SMALLEST_SCALE = 2.0**-100
#: share of the range that the coarse search tries, and how finely it looks again around the best
COARSE = 19
FINE = 10
#: numbers that are rounded at a time
PIECE = 1 << 22


@dataclass(frozen=True)
class Spec:
    """What a grid may be.

    bits: 1..16 (how wide an integer is). signed: whether the numbers go below zero. symmetric: zero point in the
    middle, so that only the scale is free; a symmetric signed grid is narrow (-127..127 for 8 bits, -1..1 for 2), so
    that -x stands as exactly as x. axis: the channel axis with a grid per channel, None for one grid. odd: the numbers
    are -(2^bits - 1), .., -3, -1, 1, 3, .., 2^bits - 1: 2^bits levels on both sides of zero and none on it, for 1 bit
    the signs (signed, symmetric, at most 7 bits). levels: the numbers from zero up, where not all between 0 and the
    largest are on the grid; those below zero mirror them (signed, symmetric).
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    axis: int | None = None
    odd: bool = False
    levels: tuple[int, ...] | None = None

    @property
    def lowest(self) -> int:
        if self.odd or self.levels is not None:
            return -self.highest
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def highest(self) -> int:
        if self.odd:
            return (1 << self.bits) - 1
        if self.levels is not None:
            return self.levels[-1]
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The smallest torch dtype that holds the numbers."""
        if self.bits > 8:
            return torch.int16 if self.signed else torch.int32
        return torch.int8 if self.signed else torch.uint8


def extremes(values: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, [] or [channels] by the spec's axis."""
    rows = _rows(values, spec.axis)
    low, high = rows.amin(1), rows.amax(1)
    return (low, high) if spec.axis is not None else (low[0], high[0])


def from_range(low: Tensor, high: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """The grid that spans ``low``..``high`` (any equal shapes), widened so that zero lies on it exactly.

    Gives (scale float32, zero_point int32) of the same shape. A range of nothing but zero gets a grid up to 1; where
    zero is not on the grid (odd), the finest there is.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if spec.symmetric:
        reach = torch.maximum(-low, high) if spec.signed else high
        scale = reach / (spec.highest if spec.signed else spec.highest - spec.lowest)
    else:
        scale = (high - low) / (spec.highest - spec.lowest)
    scale = torch.where(scale > 0, scale, SMALLEST_SCALE if spec.odd else 1.0 / spec.highest)
    scale = scale.clamp(min=SMALLEST_SCALE).float()
    if spec.symmetric:
        zero = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero = torch.round(spec.lowest - low / scale.double()).clamp(spec.lowest, spec.highest).int()
    return scale, zero


def minmax(values: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """The grid over the values' whole range: (scale, zero_point), [] or [channels]."""
    return from_range(*extremes(values, spec), spec)


def least_squares(values: Tensor, spec: Spec, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The grid with the least squared rounding error among clipped ranges: (scale, zero_point), [] or [channels].

    Nagel et al. 2021, "A white paper on neural network quantization", section 3.1 (ranges by mean squared error):
    argmin over the range of sum (x - x_hat)^2. The ends of the range are searched as shares of the largest value, first
    coarsely over 0.1..1 and then around the best; both ends together for a symmetric grid, one after the other (high,
    low, high) otherwise. The whole range is among the candidates, so the error is never above that of ``minmax``.

    counts: how often each of ``values`` occurs (a histogram's bins; shape of ``values``), 1 each if not given.
    """
    rows = _rows(values, spec.axis).double()
    weights = None if counts is None else _rows(counts, spec.axis).double()
    flat = replace(spec, axis=0)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    shares = {"low": torch.ones_like(low), "high": torch.ones_like(high)}

    def error() -> Tensor:
        scale, zero = from_range(low * shares["low"], high * shares["high"], flat)
        away = (rows - fake_quantize(rows, scale, zero, flat)).square_()
        return (away if weights is None else away * weights).sum(1)

    best = error()
    for ends in ([("low", "high")] if spec.symmetric else [("high",), ("low",), ("high",)]):
        for fine in (False, True):
            center = {end: shares[end].clone() for end in ends}
            steps = torch.linspace(-0.05, 0.05, FINE + 1) if fine else torch.linspace(0.1, 1, COARSE)
            for step in steps.tolist():
                kept = {end: shares[end] for end in ends}
                for end in ends:
                    shares[end] = (center[end] + step).clamp(0.01, 1) if fine else torch.full_like(low, step)
                now = error()
                better = now < best
                best = torch.where(better, now, best)
                for end in ends:
                    shares[end] = torch.where(better, shares[end], kept[end])
    scale, zero = from_range(low * shares["low"], high * shares["high"], flat)
    return (scale, zero) if spec.axis is not None else (scale[0], zero[0])


def quantize(values: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec) -> Tensor:
    """Numbers of ``spec.dtype``, shape of ``values``; halves round to even (on an odd grid: up)."""
    return _steps(values, scale, zero_point, spec).to(spec.dtype)


def quantize_rows(values: Tensor, scale: Tensor, spec: Spec) -> Tensor:
    """``quantize`` in float64 with zero point 0, some rows at a time: the memory of a large weight's float64 is not
    taken. scale: [] or broadcastable to ``values``, with all of its axes."""
    numbers = torch.empty(values.shape, dtype=spec.dtype, device=values.device)
    zero, rows = torch.zeros((), dtype=torch.int32, device=values.device), max(1, PIECE // max(1, values[:1].numel()))
    for at in range(0, len(values), rows):
        own = scale[at:at + rows] if scale.dim() and len(scale) > 1 else scale
        numbers[at:at + rows] = quantize(values[at:at + rows].double(), own, zero, spec)
    return numbers


def dequantize(numbers: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec) -> Tensor:
    """Float32 values that the numbers stand for."""
    scale, zero_point = _along(scale, numbers, spec.axis), _along(zero_point, numbers, spec.axis)
    return (numbers.int() - zero_point).float() * scale


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec) -> Tensor:
    """``values`` rounded to the grid, in their own float type."""
    steps = _steps(values, scale, zero_point, spec)
    return (steps - _along(zero_point, values, spec.axis)) * _along(scale, values, spec.axis).to(values.dtype)


def _steps(values: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec) -> Tensor:
    scale, zero_point = _along(scale, values, spec.axis), _along(zero_point, values, spec.axis)
    numbers = nearest(values / scale.to(values.dtype), spec)
    if not spec.odd and spec.levels is None:
        numbers += zero_point
    return numbers.clamp_(spec.lowest, spec.highest)


def nearest(steps: Tensor, spec: Spec) -> Tensor:
    """The nearest of the numbers of which ``spec`` takes a range, or of its levels: over ``steps``, which it changes;
    zero point 0. Halves go to even ones (between levels, and on an odd grid: up)."""
    if spec.odd:
        return steps.div_(2).floor_().mul_(2).add_(1)
    if spec.levels is None:
        return steps.round_()
    ups = steps.new_tensor(spec.levels)
    levels = torch.cat([-ups.flip(0)[:-1], ups])
    return levels[torch.bucketize(steps.contiguous(), (levels[1:] + levels[:-1]) / 2, right=True)]


def _along(numbers: Tensor, values: Tensor, axis: int | None) -> Tensor:
    """One number per channel, shaped to meet ``values`` along ``axis``."""
    if axis is None:
        return numbers
    return numbers.view([-1 if i == axis % values.dim() else 1 for i in range(values.dim())])


def _rows(values: Tensor, axis: int | None) -> Tensor:
    """``values`` as [channels, rest]; one row for one grid."""
    return values.reshape(1, -1) if axis is None else values.movedim(axis, 0).reshape(values.shape[axis], -1)


__all__ = ["Spec", "dequantize", "extremes", "fake_quantize", "from_range", "least_squares", "minmax", "nearest",
           "quantize", "quantize_rows"]
