"""How many channels every group keeps, so that the whole hits a target.

An allocation gives every channel a priority; channels go in this one order over all groups, the lowest first, and a
bisection over how many go meets the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from featherweight.axes.groups import AxisGroup, AxisGroups
from featherweight.network import Network
from featherweight.prune.channels.sensitivity import FEW_SHARES, Curve, curves
from featherweight.task import Task

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Keep = list[Ints]


@dataclass(frozen=True)
class Case:
    """What an allocation may look at. ``scores``: [n_channels] for each group, comparable between groups; ``saved``:
    what one channel of each group saves of the cost that has a target; ``per_cost``: the scores are errors, which
    count by what they save (``scores.ERRORS``)."""

    network: Network
    task: Task
    axes: AxisGroups
    groups: Sequence[AxisGroup]
    scores: Sequence[Floats]
    saved: Sequence[float]
    seed: int = 0
    per_cost: bool = False

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """The sensitivity of every group, measured when it is first asked for."""
        return curves(self.network, self.task, self.groups, self.scores, FEW_SHARES)


def quantiles(scores: Floats) -> Floats:
    """The rank of each channel in its group, 0..1: with it, a common threshold takes the same share of every group."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    found: Floats = (ranks + 0.5) / len(scores)
    return found


def overall(case: Case) -> list[Floats]:
    """All channels ranked together by their scores; errors by the cost that the channel saves."""
    if not case.per_cost:
        return list(case.scores)
    return [s / v for s, v in zip(case.scores, case.saved, strict=True)]


def uniform(case: Case) -> list[Floats]:
    """The same share of every group."""
    return [quantiles(s) for s in case.scores]


def erk(case: Case) -> list[Floats]:
    """Shares that remain in proportion to the root of the Erdos-Renyi-kernel density of the weight that makes the
    channels, (n_in + n_out + kernel sizes) / (n_in n_out kernel) (Evci et al. 2020, "RigL", section 3): wide layers
    lose more. The root, because the weight's density is the product of the shares of two axes, about alike.
    """
    found = []
    for group, scores in zip(case.groups, case.scores, strict=True):
        shape = next((case.network.tensor(m.tensor).shape for m in group.members if m.makes), (len(group),))
        density = float(sum(shape)) / float(np.prod(shape, dtype=np.float64))
        found.append(-(1 - quantiles(scores)) / density ** 0.5)  # it goes when a common factor falls below this
    return found


def by_sensitivity(case: Case) -> list[Floats]:
    """Wherever the outputs are measured to change least for the cost that is saved: greedy on the sensitivity curve of
    every group. The scores only rank the channels inside each group. Reads calibration data."""
    return [slopes(c, s) / v for c, s, v in zip(case.curves, case.scores, case.saved, strict=True)]


def slopes(curve: Curve, scores: Floats) -> Floats:
    """By how much the curve rises per channel, for each channel at its rank: the slope of the greatest convex function
    below the curve, so that it grows with the rank. Beyond the last share that was measured, channels go last of all.
    """
    x = np.array([0.0, *curve.shares])
    y = np.maximum.accumulate(np.array([0.0, *curve.changes]))
    corners = [0]
    while corners[-1] < len(x) - 1:
        i = corners[-1]
        rise = (y[i + 1:] - y[i]) / (x[i + 1:] - x[i])
        corners.append(i + 1 + len(rise) - 1 - int(rise[::-1].argmin()))
    steep = np.diff(y[corners]) / np.diff(x[corners]) / len(scores)
    rank = quantiles(scores)
    at = np.searchsorted(x[corners[1:]], rank)
    found: Floats = np.append(steep, 1e30)[at]
    return found * (1 + 1e-6 * rank) + 1e-30 * rank


#: name -> the priorities of all channels; add one of your own under a new name
ALLOCATIONS: dict[str, Callable[[Case], list[Floats]]] = {
    "global": overall, "uniform": uniform, "erk": erk, "sensitivity": by_sensitivity}


@dataclass(frozen=True)
class Allocation:
    """Channels in the order in which they go: the lowest score (or priority) first, over all groups.

    round_to: the widths of all axes that weights make or read become multiples of this many positions, wherever the
    groups in them allow it. axes: with it, what else sits in these axes counts too; else a group is judged by its own
    positions. steps: (tensor, axis) -> its width becomes a multiple of this too (``LatencyTable.steps``).
    """

    groups: Sequence[AxisGroup]
    scores: Sequence[Floats]
    min_keep: int
    round_to: int
    axes: AxisGroups | None = None
    steps: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def keep(self, removed: int) -> Keep:
        """What every group keeps when the ``removed`` lowest channels go, rounded and bounded."""
        counts = np.array([len(g) for g in self.groups], dtype=np.int64)
        if removed > 0:
            counts -= np.bincount(self._owners[:removed], minlength=len(self.groups))
            counts = self.rounded(counts)
        return [np.sort(order[len(order) - n:]) for order, n in zip(self._orders, counts.tolist(), strict=True)]

    @cached_property
    def _orders(self) -> list[Ints]:
        """The channels of every group in the order in which they go."""
        return [np.argsort(s, kind="stable") for s in self.scores]

    @cached_property
    def _owners(self) -> Ints:
        """The group of every channel, in the order in which they go."""
        owner = np.repeat(np.arange(len(self.groups)), [len(g) for g in self.groups])
        order = np.argsort(np.concatenate(self.scores), kind="stable") if len(self.groups) else np.zeros(0, np.int64)
        found: Ints = owner[order]
        return found

    @property
    def total(self) -> int:
        return sum(len(g) for g in self.groups)

    def rounded(self, counts: Ints) -> Ints:
        """The numbers of channels nearest to ``counts`` that make widths of the axes multiples of ``round_to``.

        Groups are decided one by one, those first that have an axis to themselves, then the smallest; each looks at the
        axes in which all others are decided. One that cannot make any of them a multiple stays whole.
        """
        found = np.zeros(len(counts), dtype=np.int64)
        inside: list[list[int]] = [[] for _ in counts]
        for a, (_, _, own) in enumerate(self._shared):
            for i in own:
                inside[i].append(a)
        open_, width = [len(own) for _, _, own in self._shared], [rest for _, rest, _ in self._shared]
        alone = {i for _, _, own in self._shared if len(own) == 1 for i in own}
        for i in sorted(range(len(counts)), key=lambda i: (i not in alone, len(self.groups[i]))):
            options = self._options(i)
            wrong = np.zeros(len(options), dtype=np.int64)
            for a in inside[i]:
                step, _, own = self._shared[a]
                wrong += (open_[a] == 1) & ((width[a] + own[i] * options) % step != 0)
            best = np.lexsort((-options, abs(options - counts[i]), wrong))[0]
            hopeless = wrong.min() > 0 and wrong.min() == wrong.max()
            found[i] = len(self.groups[i]) if hopeless else options[best]
            for a in inside[i]:
                open_[a] -= 1
                width[a] += self._shared[a][2][i] * int(found[i])
        return found

    def _options(self, i: int) -> Ints:
        """Numbers of channels that group ``i`` may keep."""
        size = len(self.groups[i])
        least = min(max(self.min_keep, 1), size)
        return np.arange(least, size + 1)

    @cached_property
    def _shared(self) -> list[tuple[int, int, dict[int, int]]]:
        """Of every axis of a weight that is to be rounded: to multiples of what, the positions that always stay, and
        those of one channel of each group in it."""
        inside: dict[tuple[str, int], dict[int, int]] = {}
        for i, group in enumerate(self.groups):
            for m in group.members:
                if m.role == "weight":
                    inside.setdefault((m.tensor, m.dim), {})[i] = m.index.shape[1]
        found: dict[tuple[int, int, tuple[tuple[int, int], ...]], None] = {}
        for (name, dim), own in inside.items():
            step = math.lcm(self.round_to, self.steps.get((name, dim), 1))
            atoms = self.axes.tensors[name][dim] if self.axes is not None else None
            taken = sum(m * len(self.groups[i]) for i, m in own.items())
            if step > 1:
                found[step, (len(atoms) - taken if atoms is not None else 0) % step, tuple(own.items())] = None
        return [(step, rest, dict(own)) for step, rest, own in found]

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
