"""How many channels every group keeps, so that the whole hits a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.prune.axes import AxisGroup

Floats = npt.NDArray[np.float64]
Keep = list[npt.NDArray[np.int64]]


def quantiles(scores: Floats) -> Floats:
    """The rank of each channel in its group, 0..1: with it, a common threshold takes the same share of every group."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    found: Floats = (ranks + 0.5) / len(scores)
    return found


def step_of(group: AxisGroup, round_to: int) -> int:
    """Channels of this group that make a multiple of ``round_to`` positions."""
    return round_to // math.gcd(round_to, group.width)


def rounded(count: int, size: int, least: int, step: int) -> int:
    """The multiple of ``step`` nearest to ``count``, ``least`` or more; all ``size`` where there is none."""
    wanted = step * max(round(count / step), math.ceil(max(least, 1) / step))
    return min(wanted, size)


@dataclass(frozen=True)
class Allocation:
    """Channels in the order in which they go: the lowest score first, over all groups."""

    groups: Sequence[AxisGroup]
    scores: Sequence[Floats]
    min_keep: int
    round_to: int

    def keep(self, removed: int) -> Keep:
        """What every group keeps when the ``removed`` lowest channels go, rounded and bounded per group."""
        owner = np.repeat(np.arange(len(self.groups)), [len(g) for g in self.groups])
        order = np.argsort(np.concatenate(self.scores), kind="stable") if len(self.groups) else np.zeros(0, np.int64)
        gone = np.bincount(owner[order[:removed]], minlength=len(self.groups))
        found = []
        for group, scores, out in zip(self.groups, self.scores, gone.tolist(), strict=True):
            count = rounded(len(group) - out, len(group), self.min_keep, step_of(group, self.round_to))
            best = np.argsort(scores, kind="stable")[len(group) - count:]
            found.append(np.sort(best))
        return found

    @property
    def total(self) -> int:
        return sum(len(g) for g in self.groups)

    def to_target(self, cost: Callable[[Keep], float], target: float) -> Keep:
        """The keep whose ``cost`` comes nearest to ``target``: bisection over how many channels go."""
        low, high = 0, self.total
        best = self.keep(0)
        error = abs(cost(best) - target)
        while low <= high:
            middle = (low + high) // 2
            keep = self.keep(middle)
            value = cost(keep)
            if abs(value - target) < error:
                best, error = keep, abs(value - target)
            if value > target:
                low = middle + 1
            else:
                high = middle - 1
        return best
