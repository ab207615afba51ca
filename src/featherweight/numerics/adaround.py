"""AdaRound: for every weight, up or down is learned by gradient descent on what its layer gives.

Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization": eqs. 21-25.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.numerics.grids import Spec

ZETA, GAMMA = 1.1, -0.1  #: how far the sigmoid is stretched before it is cut off at 0 and 1 (section 3.4)


@dataclass(frozen=True)
class Schedule:
    """How long and how hard weights are pushed to a decision. The paper takes ten times the steps and starts
    beta at 20; with as few as these, that left half of the weights undecided at the end.

    iterations: steps of Adam. rate: its step size. pull: weight of the regularizer beside the error, which is relative
    to the one of rounding to nearest. warm: share of the steps without it. beta: its exponent, from the first to the
    last step (eq. 24: high ones leave the undecided alone, low ones force them).
    """

    iterations: int = 1000
    rate: float = 3e-2
    pull: float = 10.0
    warm: float = 0.2
    beta: tuple[float, float] = (8.0, 2.0)

    def exponent(self, step: int) -> float | None:
        """beta at ``step``; None where nothing is to be pulled yet."""
        done = step / max(1, self.iterations)
        if done < self.warm:
            return None
        start, end = self.beta
        return start + (end - start) * (done - self.warm) / max(1e-9, 1 - self.warm)


def numbers(spec: Spec) -> Tensor:
    """All numbers of a grid, rising, float64."""
    if spec.levels is not None:
        ups = torch.tensor(spec.levels, dtype=torch.float64)
        return torch.cat([-ups.flip(0)[:-1], ups])
    return torch.arange(spec.lowest, spec.highest + 1, 2 if spec.odd else 1, dtype=torch.float64)


class Soft:
    """Weights between the two levels of their grids that lie around them: lower + step * h(v), h in 0..1 (eq. 22)."""

    def __init__(self, weight: Tensor, scale: Tensor, spec: Spec, kept: Tensor | None = None,
                 lean: float = 0.0) -> None:
        """weight: any shape; scale: broadcastable to it; kept: bool, weights that are not stay zero (None: all are).
        lean: how far h starts on its way from where ``weight`` lies to the nearer level, 0..1."""
        levels = numbers(spec).to(weight.device)
        ratio = weight.double() / scale.double()
        above = torch.bucketize(ratio, levels, right=True).clamp(1, len(levels) - 1)
        self.lower, upper = levels[above - 1].float(), levels[above].float()
        self.step = upper - self.lower
        self.scale, self.kept = scale.float(), kept
        share = ((ratio - self.lower) / self.step).clamp(0, 1).float()
        share += lean * ((share >= 0.5).float() - share)
        self.v = (-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)).requires_grad_()

    def share(self) -> Tensor:
        """h(v): the rectified sigmoid (eq. 23)."""
        return torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def value(self, share: Tensor) -> Tensor:
        found = (self.lower + self.step * share) * self.scale
        return found if self.kept is None else found * self.kept

    def nearest(self) -> Tensor:
        """As they stand, decided: float32, exactly number times scale."""
        return self.value((self.v.detach() >= 0).float())


def penalty(share: Tensor, exponent: float) -> Tensor:
    """Sum of 1 - |2 h - 1|^beta (eq. 24): zero where all is decided."""
    return (1 - (2 * share - 1).abs().pow(exponent)).sum()


def decide(softs: list[Soft], error: Callable[[list[Tensor]], Tensor], schedule: Schedule,
           others: list[tuple[Tensor, float]] | None = None) -> None:
    """Learns the ``v`` of all ``softs`` together (eq. 25), and what else is given.

    error: (the weights as they stand) -> their error on some of the data, relative to that of rounding to nearest.
    others: (tensor, step size) that are learned too; their steps get smaller along half a cosine.
    """
    rest = others or []
    groups = [{"params": [s.v for s in softs], "lr": schedule.rate}, *({"params": [t], "lr": r} for t, r in rest)]
    adam = torch.optim.Adam(groups)
    size = sum(s.v.numel() for s in softs)
    for step in range(schedule.iterations):
        for group, (_, rate) in zip(adam.param_groups[1:], rest, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / schedule.iterations))
        shares = [s.share() for s in softs]
        loss = error([s.value(h) for s, h in zip(softs, shares, strict=True)])
        beta = schedule.exponent(step)
        if beta is not None:
            loss = loss + schedule.pull / size * torch.stack([penalty(h, beta) for h in shares]).sum()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()


def adaround(weight: Tensor, scale: Tensor, spec: Spec, x: Tensor, y: Tensor, finish: Callable[[Tensor], Tensor],
             generator: torch.Generator, *, kept: Tensor | None = None, schedule: Schedule | None = None,
             rows: int = 1024) -> Tensor:
    """``weight`` [g, o, i] on the grids of ``scale`` (one per weight), float32: each is rounded down or up.

    x [g, n, i]: rows of the layer's inputs, as they are when what comes before is rounded; y [g, n, o]: what the layer
    and its activation gave before. finish: adds the bias to [g, n, o] and applies the activation. ``rows`` of them,
    drawn from ``generator``, make a step. Never worse on all rows than rounding to nearest.
    """
    soft = Soft(weight, scale, spec, kept)
    start = soft.nearest()

    def away(value: Tensor, inputs: Tensor, wanted: Tensor) -> Tensor:
        return (finish(inputs @ value.mT) - wanted).square().mean()

    base = away(start, x, y)
    if not base > 0:
        return start

    def error(values: list[Tensor]) -> Tensor:
        index = torch.randint(x.shape[1], (rows,), generator=generator).to(x.device)
        return away(values[0], x[:, index], y[:, index]) / base

    with torch.enable_grad():
        decide([soft], error, schedule or Schedule())
    found = soft.nearest()
    return found if away(found, x, y) < base else start


__all__ = ["Schedule", "Soft", "adaround", "decide", "numbers", "penalty"]
