"""Rounding that gradients pass: what quantizes weights and values while a network trains.

A fake quantizer gives values that lie on its grid, number times scale, and passes gradients to what it was given, and
to its own parameters. Learned step sizes: Esser et al. 2020, "Learned step size quantization".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from featherweight.numerics.grids import SMALLEST_SCALE, Spec


class Learned(torch.autograd.Function):
    """Rounding to the grid of a learned scale (Esser et al. 2020, eqs. 1-3, 5)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: float, spec: Spec, slope: Callable[[Tensor], Tensor] | None,
                ) -> Tensor:
        """x: any shape; scale: broadcastable to it, positive; slope: what gradients are multiplied with, given
        x / scale, in the place of 1 within the grid's range and 0 outside."""
        low, high = spec.lowest - zero, spec.highest - zero
        steps = x / scale
        inside = steps.clamp(low, high)
        numbers = rounded(inside, spec)
        ctx.save_for_backward(steps, inside, numbers, scale)
        ctx.slope = slope
        ctx.size = x.numel() * spec.highest
        return numbers * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        steps, inside, numbers, scale = ctx.saved_tensors
        grad = grads[0]
        passed = grad * (inside == steps)
        given = passed if ctx.slope is None else grad * ctx.slope(steps)
        # the value moves with its scale as numbers * scale does; within the range x / scale moves against that
        if scale.numel() == 1:
            dots = (torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in ((grad, numbers), (passed, steps)))
            moved = next(dots).float() - next(dots).float()
        else:
            moved = (grad * numbers - passed * steps).float()
        return given, moved.sum_to_size(scale.shape) * (ctx.size / scale.numel()) ** -0.5, None, None, None


def rounded(steps: Tensor, spec: Spec) -> Tensor:
    """The nearest numbers of the grid to ``steps``, which lie in its range."""
    if not spec.odd:
        return steps.round()
    return (torch.floor(steps / 2) * 2 + 1).clamp_(max=spec.highest)


def everywhere(steps: Tensor) -> Tensor:
    """Gradients pass wherever the value lies."""
    return torch.ones_like(steps)


def triangle(middle: float, reach: float) -> Callable[[Tensor], Tensor]:
    """The derivative of Bi-Real net's second-order approximation of a step (Liu et al. 2018, eq. 7) at ``middle``."""
    return lambda steps: (2 - 2 * (steps - middle).abs() / reach).clamp_(min=0)


class Quantizer(ABC):
    """One weight's, or one value's."""

    def __init__(self, spec: Spec, scale: Tensor) -> None:
        """scale: broadcastable to what is quantized; float32, positive."""
        self.spec = spec
        self.own: list[Tensor] = []
        self.start = scale.detach().clone()

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Values of ``x`` on the grid."""

    @abstractmethod
    def scale(self, x: Tensor) -> Tensor:
        """The scale of that grid, of the shape that was given at the start."""

    def progress(self, done: float) -> None:  # noqa: B027  (few change with time)
        """Told how far the training is, 0..1."""


class Lsq(Quantizer):
    """A learned scale: for weights one a channel, for values one. Where one bit is left, gradients pass everywhere for
    weights, and around the step for values."""

    def __init__(self, spec: Spec, scale: Tensor, zero: int = 0, values: bool = False) -> None:
        super().__init__(spec, scale)
        self.zero = zero
        self.size = self.start.clone().requires_grad_()
        self.own = [self.size]
        middle, reach = (0.0, 1.0) if spec.odd else (0.5, 0.5)
        self.slope = None if spec.bits > 1 else triangle(middle, reach) if values else everywhere

    def positive(self) -> Tensor:
        """The scale as it is used: it cannot cross zero."""
        return self.size.abs().clamp(min=SMALLEST_SCALE)

    def __call__(self, x: Tensor) -> Tensor:
        scale = self.positive()
        if x.dtype != scale.dtype and self.spec.bits <= 4:
            scale = scale.to(x.dtype)
        made: Tensor = Learned.apply(  # type: ignore[no-untyped-call]
            x, scale, float(self.zero), self.spec, self.slope)
        return made.to(x.dtype)

    def scale(self, x: Tensor) -> Tensor:
        return self.positive().detach()


class Straight(Quantizer):
    """The straight-through estimator with a scale that is chosen anew from the weights at every step: their largest, or
    for one and two bits their mean magnitude (Rastegari et al. 2016, eq. 6; Li et al. 2016, eq. 6, with its 0.7)."""

    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = Learned.apply(  # type: ignore[no-untyped-call]
            x, self.scale(x), 0.0, self.spec, everywhere)
        return made

    def scale(self, x: Tensor) -> Tensor:
        size = x.detach().float().abs()
        over = [d for d in range(x.dim()) if self.start.dim() == 0 or self.start.shape[d] == 1]
        if self.spec.bits > 2:
            found = size.amax(over, keepdim=True) / self.spec.highest
        elif self.spec.odd:
            found = size.mean(over, keepdim=True) * 2 / (self.spec.highest + 1)
        else:
            kept = size > 0.7 * size.mean(over, keepdim=True)
            found = (size * kept).sum(over, keepdim=True) / kept.sum(over, keepdim=True).clamp(min=1)
        return found.clamp(min=SMALLEST_SCALE).view(self.start.shape)


class Dorefa(Quantizer):
    """Weights bent by tanh, rounded to a grid that ends with the largest of them (Zhou et al. 2016, eq. 9, without its
    division by that largest one, which batch norm would undo)."""

    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = Learned.apply(  # type: ignore[no-untyped-call]
            torch.tanh(x), self.scale(x), 0.0, self.spec, everywhere)
        return made

    def scale(self, x: Tensor) -> Tensor:
        return (torch.tanh(x.detach()).abs().amax() / self.spec.highest).clamp(min=SMALLEST_SCALE).expand(
            self.start.shape)


class Balanced(Quantizer):
    """Signs of weights that are balanced and standardized per output channel, times a learned scale, with a gradient
    that gets steeper towards the end (Qin et al. 2020, "Forward and backward information retention", eqs. 5-10)."""

    def __init__(self, spec: Spec, scale: Tensor) -> None:
        super().__init__(spec, scale)
        self.size = self.start.clone().requires_grad_()
        self.own = [self.size]
        self.steepness = 0.1

    def progress(self, done: float) -> None:
        self.steepness = 0.1 * 100**done

    def __call__(self, x: Tensor) -> Tensor:
        over = list(range(1, x.dim()))
        centred = x - x.mean(over, keepdim=True)
        level = centred / centred.std(over, keepdim=True).clamp(min=SMALLEST_SCALE)
        t = self.steepness
        soft = torch.tanh(t * level) * max(1 / t, 1.0)
        signs = soft + (torch.where(level >= 0, 1.0, -1.0) - soft).detach()
        return signs * self.size.abs()

    def scale(self, x: Tensor) -> Tensor:
        return self.size.detach().abs().clamp(min=SMALLEST_SCALE)


class Pact(Quantizer):
    """Values cut off at a learned end (Choi et al. 2018, eqs. 1-3): its gradient comes from what is cut off alone."""

    def __init__(self, spec: Spec, scale: Tensor, zero: int = 0, values: bool = True) -> None:
        super().__init__(spec, scale)
        self.zero = zero
        self.end = (self.start * (spec.highest - zero)).requires_grad_()
        self.own = [self.end]

    def __call__(self, x: Tensor) -> Tensor:
        end = self.end.abs().clamp(min=SMALLEST_SCALE).to(x.dtype)
        low = end * ((self.spec.lowest - self.zero) / max(1, self.spec.highest - self.zero))
        cut = torch.minimum(torch.maximum(x, low), end)
        scale = (end / max(1, self.spec.highest - self.zero)).detach()
        steps = cut / scale
        return cut + (rounded(steps.detach(), self.spec) * scale - cut).detach()

    def scale(self, x: Tensor) -> Tensor:
        return (self.end.detach().abs() / max(1, self.spec.highest - self.zero)).clamp(min=SMALLEST_SCALE)


class Fixed(Quantizer):
    """The grid that calibration chose, gradients straight through within its range."""

    def __init__(self, spec: Spec, scale: Tensor, zero: int = 0, values: bool = True) -> None:
        super().__init__(spec, scale)
        self.zero = zero

    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = Learned.apply(  # type: ignore[no-untyped-call]
            x, self.start.to(x.dtype), float(self.zero), self.spec, None)
        return made

    def scale(self, x: Tensor) -> Tensor:
        return self.start


#: name -> (what quantizes weights, what quantizes values); add one of your own under a new name
LEARNERS: dict[str, tuple[Callable[..., Quantizer], Callable[..., Quantizer]]] = {
    "lsq": (Lsq, Lsq), "ste": (Straight, Fixed), "pact": (Straight, Pact), "dorefa": (Dorefa, Fixed),
    "balanced": (Balanced, Lsq),
}

__all__ = ["LEARNERS", "Quantizer"]
