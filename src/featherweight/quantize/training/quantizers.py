"""Rounding that gradients pass: what quantizes weights and activations while a network trains.

A fake quantizer gives values that lie on its grid, number times scale, and passes gradients to what it was given, and
to its own parameters. Learned step sizes: Esser et al. 2020, "Learned step size quantization". The learners for weights
alone are in ``fake_weights``, the table of all in ``learners``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from featherweight.numerics.grids import SMALLEST_SCALE, Spec, minmax, nearest

Slope = Callable[[Tensor], Tensor]
#: of values in bfloat16, numbers of more bits are found in float32
HALF_BITS = 4


def everywhere(steps: Tensor) -> Tensor:
    """Gradients pass wherever the value lies."""
    return torch.ones_like(steps)


def triangle(middle: float, reach: float) -> Slope:
    """The derivative of Bi-Real net's second-order approximation of a step (Liu et al. 2018, eq. 7) at ``middle``,
    which has the height of one step of the grid, 2 * reach."""
    return lambda steps: (2 - 2 * (steps - middle).abs() / reach).clamp_(min=0)


def steepening(middle: float, reach: float, steepness: float) -> Slope:
    """The derivative of tanh, narrower as ``steepness`` grows (Qin et al. 2020, eqs. 8-10), at ``middle``."""
    t = steepness
    return lambda steps: (1 - torch.tanh((steps - middle) * (t / reach)).square()) * max(t, 1.0)


class Learned(torch.autograd.Function):
    """Rounding to the grid of a learned scale (Esser et al. 2020, eqs. 1-3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, spec: Spec, zero: int, slope: Slope | None, gain: float,
                ends: bool) -> Tensor:
        """x: any shape; size: broadcastable to it, its magnitude is the scale; slope: what gradients are multiplied
        with, given x / scale, in the place of 1 within the grid's range and 0 outside; gain: factor on the gradient of
        the size; ends: whether that comes from values beyond the ends alone."""
        low, high = spec.lowest - zero, spec.highest - zero
        scale = size.abs().clamp_(min=SMALLEST_SCALE)
        wide = x.float() if spec.bits > HALF_BITS and x.dtype != torch.float32 else x
        steps = wide * scale.reciprocal() if wide is x else wide.mul_(scale.reciprocal())
        numbers = nearest(steps.clamp(low, high), spec)
        ctx.save_for_backward(steps, numbers, size)
        ctx.range, ctx.slope, ctx.gain, ctx.ends, ctx.dtype = (low, high), slope, gain, ends, x.dtype
        return (numbers * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        steps, numbers, size = ctx.saved_tensors
        grad, slope = grads[0].to(steps.dtype), ctx.slope
        # no comparisons: masks are several times slower than this kernel
        within = torch.ops.aten.hardtanh_backward(grad, steps, *ctx.range)
        given = within if slope is None else grad if slope is everywhere else grad * slope(steps)
        if not ctx.needs_input_grad[1]:
            return given.to(ctx.dtype), None, None, None, None, None, None
        # the value moves with its scale as numbers * scale does; where gradients pass, x / scale moves against that
        if ctx.ends:
            moved = (grad - within).mul_(numbers)
        else:
            moved = (grad * numbers).addcmul_(within if slope is everywhere else given, steps, value=-1)
        if size.dim() == 0:  # halves are summed in float32, and that sum of a sample rounded again
            total = moved.sum(tuple(range(1, moved.dim()))).sum(dtype=torch.float32)
        else:
            total = moved.sum_to_size(size.shape)
        signs = torch.where(size < 0, -ctx.gain, ctx.gain)
        return given.to(ctx.dtype), total * signs, None, None, None, None, None


def learned(x: Tensor, size: Tensor, spec: Spec, zero: int = 0, slope: Slope | None = None, gain: float = 1.0,
            ends: bool = False) -> Tensor:
    """``x`` on the grid of ``size``: see ``Learned``."""
    made: Tensor = Learned.apply(x, size, spec, zero, slope, gain, ends)  # type: ignore[no-untyped-call]
    return made


class Quantizer(ABC):
    """One weight's, or one activation's."""

    #: the kind of ``GRIDS`` that holds what it gives; None: the one that it was asked for
    stored_as: str | None = None
    #: whether its scale can be held from below (``hold``)
    holds: bool = True

    def __init__(self, spec: Spec, scale: Tensor, zero: int = 0, values: bool = False) -> None:
        """scale: broadcastable to what is quantized; positive. values: whether that is an activation."""
        self.spec, self.zero, self.values = spec, zero, values
        self.start = scale.detach().clone().float()
        self.own: list[Tensor] = []
        self.least: Tensor | None = None

    def begin(self, x: Tensor) -> None:  # noqa: B027  (few need to know)
        """Told the weight as it is when its grid is chosen."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Values of ``x`` on the grid."""

    @abstractmethod
    def scale(self, x: Tensor) -> Tensor:
        """The scale of that grid, of the shape that was given at the start."""

    def change(self, spec: Spec, scale: Tensor, zero: int = 0) -> None:
        """Goes over to another grid, from this scale on."""
        self.spec, self.zero, self.least = spec, zero, None
        self.start.copy_(scale)

    def hold(self, least: Tensor) -> None:
        """From now on the scale is no smaller than ``least``, of its shape."""
        self.least = least.float()

    def held(self, scale: Tensor) -> Tensor:
        """``scale``, or the least there may be."""
        return scale if self.least is None else torch.maximum(scale, self.least)

    def progress(self, done: float) -> None:  # noqa: B027  (few change with time)
        """Told how far the training is, 0..1."""

    def after_backward(self) -> None:  # noqa: B027  (few add anything)
        """May add to the gradients of its own parameters."""


class Lsq(Quantizer):
    """A learned scale: for weights one a channel, for activations one. Its gradient is divided by sqrt(numbers that it
    serves * highest) (Esser et al. 2020, section 2.2; of values, all in the batch are counted: with those of one sample
    scales move faster, which in short runs was no better). Where one bit is left, gradients pass everywhere for
    weights, and around the step for activations, whose threshold moves with the scale."""

    def __init__(self, spec: Spec, scale: Tensor, zero: int = 0, values: bool = False) -> None:
        super().__init__(spec, scale, zero, values)
        self.size = self.start.clone().requires_grad_()
        self.own = [self.size]

    def slope(self) -> Slope | None:
        if self.spec.bits > 1:
            return None
        return triangle(*self.step()) if self.values else everywhere

    def step(self) -> tuple[float, float]:
        """The middle of the only step of a grid of one bit, and half its height; in units of the scale."""
        return (self.spec.lowest + self.spec.highest) / 2 - self.zero, (self.spec.highest - self.spec.lowest) / 2

    def __call__(self, x: Tensor) -> Tensor:
        reach = max(self.spec.highest - self.zero, self.zero - self.spec.lowest)
        gain = (max(x.numel() / self.size.numel(), 1.0) * reach) ** -0.5
        size = self.size if self.least is None else self.held(self.size.abs())
        return learned(x, size, self.spec, self.zero, self.slope(), gain)

    def scale(self, x: Tensor) -> Tensor:
        return self.held(self.size.detach().abs().clamp(min=SMALLEST_SCALE))

    def hold(self, least: Tensor) -> None:
        super().hold(least)
        with torch.no_grad():
            self.size.copy_(self.held(self.size.abs()))

    def change(self, spec: Spec, scale: Tensor, zero: int = 0) -> None:
        super().change(spec, scale, zero)
        with torch.no_grad():
            self.size.copy_(scale)


class Steepening(Lsq):
    """``Lsq``, with a gradient of the step of one bit that narrows towards the end (Qin et al. 2020, eqs. 8-10)."""

    steepness = 0.1

    def progress(self, done: float) -> None:
        self.steepness = 0.1 * 100**done

    def slope(self) -> Slope | None:
        return steepening(*self.step(), self.steepness) if self.spec.bits == 1 else None


class Pact(Quantizer):
    """Values cut off at a learned end (Choi et al. 2018, eqs. 1-3): its gradient comes from what is cut off alone, and
    from the decay that the paper gives it."""

    DECAY = 2e-4

    def __init__(self, spec: Spec, scale: Tensor, zero: int = 0, values: bool = True) -> None:
        super().__init__(spec, scale, zero, values)
        self.end = (self.start * self.reach()).requires_grad_()
        self.own = [self.end]

    def reach(self) -> int:
        """Steps from zero to the end of the grid that lies farther off."""
        return max(self.spec.highest - self.zero, self.zero - self.spec.lowest)

    def __call__(self, x: Tensor) -> Tensor:
        return learned(x, self.end / self.reach(), self.spec, self.zero, ends=True)

    def scale(self, x: Tensor) -> Tensor:
        return (self.end.detach() / self.reach()).abs().clamp(min=SMALLEST_SCALE)

    def change(self, spec: Spec, scale: Tensor, zero: int = 0) -> None:
        super().change(spec, scale, zero)
        with torch.no_grad():
            self.end.copy_(scale * self.reach())

    def after_backward(self) -> None:
        if self.end.grad is not None:
            self.end.grad.add_(self.end.detach(), alpha=self.DECAY)


class Fixed(Quantizer):
    """The grid that calibration chose, gradients straight through within its range."""

    def __call__(self, x: Tensor) -> Tensor:
        return learned(x, self.start, self.spec, self.zero)

    def scale(self, x: Tensor) -> Tensor:
        return self.start.clamp(min=SMALLEST_SCALE)


class Dynamic(Fixed):
    """The grid over the whole range of each activation, chosen anew every time."""

    def __call__(self, x: Tensor) -> Tensor:
        scale, zero = minmax(x.detach(), self.spec)
        return learned(x, scale, self.spec, int(zero))


__all__ = ["Dynamic", "Fixed", "Learned", "Lsq", "Pact", "Quantizer", "Slope", "Steepening", "everywhere", "learned",
           "steepening", "triangle"]
