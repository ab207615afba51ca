"""Learners of weights alone: scales from the weights themselves, signs, sums of powers of two, three learned levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.numerics.grids import SMALLEST_SCALE, Spec
from featherweight.quantize.training.quantizers import Lsq, Quantizer, Slope, everywhere, learned, steepening

#: share of the mean magnitude from which on a weight is no zero (Li et al. 2016, "Ternary weight networks", eq. 6)
TERNARY = 0.7
#: share of the largest magnitude from which on a weight is no zero (Zhu et al. 2017, eq. 9)
TRAINED_TERNARY = 0.05


def along(x: Tensor, start: Tensor) -> list[int]:
    """The axes of ``x`` that share one scale, where scales have the shape of ``start``."""
    return [d for d in range(x.dim()) if start.dim() == 0 or start.shape[d] == 1]


class Straight(Quantizer):
    """The straight-through estimator with a scale that is chosen anew from the weights at every step: their largest, or
    for one and two bits their mean magnitude (Rastegari et al. 2016, eq. 6; Li et al. 2016, eq. 6)."""

    def __call__(self, x: Tensor) -> Tensor:
        return learned(x, self.scale(x), self.spec, slope=everywhere)

    def scale(self, x: Tensor) -> Tensor:
        size, over = x.detach().float().abs(), along(x, self.start)
        if self.spec.bits > 2:
            found = size.amax(over, keepdim=True) / self.spec.highest
        elif self.spec.odd:
            found = size.mean(over, keepdim=True) * 2 / (self.spec.highest + 1)
        else:
            kept = size > TERNARY * size.mean(over, keepdim=True)
            found = (size * kept).sum(over, keepdim=True) / kept.sum(over, keepdim=True).clamp(min=1)
        return self.held(found.clamp(min=SMALLEST_SCALE).view(self.start.shape))


class Dorefa(Quantizer):
    """Weights bent by tanh, rounded to a grid that ends with the largest of them (Zhou et al. 2016, eq. 9, without its
    division by that largest one, which batch norm would undo); of one bit, signs times their mean magnitude (eq. 7).
    One scale for all, as the paper has it."""

    def __call__(self, x: Tensor) -> Tensor:
        bent = x if self.spec.bits == 1 else torch.tanh(x)
        return learned(bent, self.scale(x), self.spec, slope=everywhere)

    def scale(self, x: Tensor) -> Tensor:
        given = x.detach().float()
        found = given.abs().mean() if self.spec.bits == 1 else torch.tanh(given).abs().amax() / self.spec.highest
        return self.held(found.clamp(min=SMALLEST_SCALE).expand(self.start.shape))


class Signs(torch.autograd.Function):
    """-1 and 1, with a gradient of another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Slope) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.slope(ctx.saved_tensors[0]), None


class Balanced(Lsq):
    """Signs of weights that are balanced and standardized per output channel, times a learned scale, with a gradient
    that gets narrower towards the end (Qin et al. 2020, "Forward and backward information retention", eqs. 5-10)."""

    steepness, holds = 0.1, False

    def progress(self, done: float) -> None:
        self.steepness = 0.1 * 100**done

    def __call__(self, x: Tensor) -> Tensor:
        over = along(x, self.start)
        centred = x - x.mean(over, keepdim=True)
        level = centred / centred.square().mean(over, keepdim=True).sqrt().clamp(min=SMALLEST_SCALE)
        signs: Tensor = Signs.apply(level, steepening(0.0, 1.0, self.steepness))  # type: ignore[no-untyped-call]
        return signs * self.size.abs().clamp(min=SMALLEST_SCALE)


class Apot(Lsq):
    """A learned cut-off of weights that are normalized first (Li et al. 2020, "Additive powers-of-two quantization",
    eqs. 5-8); their spread is given back afterwards, so that the network starts where it was. Exact zeros stay."""

    holds = False

    def spread(self, x: Tensor) -> Tensor:
        return x.detach().float().std(correction=0).clamp(min=SMALLEST_SCALE)

    def __call__(self, x: Tensor) -> Tensor:
        spread, given = self.spread(x), x.detach()
        level = ((x - given.mean()) / spread).masked_fill(given == 0, 0)
        gain = (x.numel() / self.size.numel() * self.spec.highest) ** -0.5
        return learned(level, self.size, self.spec, gain=gain) * spread

    def scale(self, x: Tensor) -> Tensor:
        return super().scale(x) * self.spread(x)

    def begin(self, x: Tensor) -> None:
        with torch.no_grad():
            self.size.copy_(self.start / self.spread(x))


class Ternary(torch.autograd.Function):
    """-n, 0 or p by a threshold (Zhu et al. 2017, eqs. 6-8); both levels lie on a grid of 127 steps to the larger."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, above: Tensor, below: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(x, above, below, threshold)
        unit = torch.maximum(above, below) / 127
        up, down = ((level / unit).round() * unit for level in (above, below))
        return torch.where(x > threshold, up, torch.where(x < -threshold, -down, 0.0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, above, below, threshold = ctx.saved_tensors
        grad, high, low = grads[0], x > threshold, x < -threshold
        factor = torch.where(high, above, torch.where(low, below, 1.0))
        return grad * factor, (grad * high).sum(), -(grad * low).sum(), None


class Ttq(Quantizer):
    """Three levels of which two are learned, one above and one below zero, per layer (Zhu et al. 2017, "Trained ternary
    quantization"). They are stored as integers of one byte, three of them."""

    stored_as, holds = "int8", False

    def __init__(self, spec: Spec, scale: Tensor, zero: int = 0, values: bool = False) -> None:
        super().__init__(spec, scale, zero, values)
        self.own = [self.start.mean().clone().requires_grad_() for _ in range(2)]

    def begin(self, x: Tensor) -> None:
        """The levels start as the mean of what becomes them."""
        threshold = TRAINED_TERNARY * x.detach().abs().amax()
        with torch.no_grad():
            for level, side in zip(self.own, (x, -x), strict=True):
                level.copy_((side * (side > threshold)).sum() / (side > threshold).sum().clamp(min=1))

    def levels(self) -> tuple[Tensor, Tensor]:
        return tuple(t.abs().clamp(min=SMALLEST_SCALE) for t in self.own)  # type: ignore[return-value]

    def __call__(self, x: Tensor) -> Tensor:
        threshold = TRAINED_TERNARY * x.detach().abs().amax()
        made: Tensor = Ternary.apply(x, *self.levels(), threshold)  # type: ignore[no-untyped-call]
        return made

    def scale(self, x: Tensor) -> Tensor:
        above, below = (t.detach() for t in self.levels())
        return (torch.maximum(above, below) / 127).expand(self.start.shape)


__all__ = ["Apot", "Balanced", "Dorefa", "Straight", "Ttq"]
