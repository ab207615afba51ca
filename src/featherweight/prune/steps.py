"""``Channels``: takes whole channels out of a network, which becomes smaller and faster without any special kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np

from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.measure.macs import macs as count_macs
from featherweight.network import Network
from featherweight.prune.allocate import Allocation, Keep, quantiles
from featherweight.prune.axes import AxisGroup, AxisGroups, axis_groups
from featherweight.prune.cut import cut, kept_atoms, zero
from featherweight.prune.scores import COMPARABLE, SCORES, normalised
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.task import Task

ALLOCATIONS = ("global", "uniform")


@dataclass(frozen=True)
class ChannelPlan(Plan):
    """Channels to keep, by name of the axis group, and the shapes of the tensors that they were chosen on.

    ``macs_before`` and ``macs_after`` are counted for one sample. The channels of a group are numbered as
    ``axis_groups(network)[name]`` numbers them.
    """

    keep: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]
    macs_before: int
    macs_after: int

    def apply(self, network: Network) -> Network:
        """A copy without the channels that are not kept. Raises PlanError if the network is not the one planned on."""
        axes = self._fit(network)
        return cut(network, axes, kept_atoms(axes, self.keep))

    def zero(self, network: Network) -> Network:
        """A copy of the same shapes in which all weights of the channels that ``apply`` cuts are zero: it computes
        what the cut network computes."""
        axes = self._fit(network)
        return zero(network, axes, kept_atoms(axes, self.keep))

    def _fit(self, network: Network) -> AxisGroups:
        known = network.tensors()
        for name, shape in self.shapes.items():
            if name not in known:
                raise PlanError(f"the plan cuts {name!r}, which this network does not have; "
                                f"{did_you_mean(name, known)}; make the plan on this very network")
            if tuple(known[name].shape) != shape:
                raise PlanError(f"the plan was made for {name!r} of shape {list(shape)}; here it has "
                                f"{list(known[name].shape)}: make the plan on this very network")
        return axis_groups(network)

    def summary(self) -> str:
        share = self.macs_after / self.macs_before if self.macs_before else 1.0
        return (f"cut channels in {len(self.keep)} axis groups: {self.macs_before} -> {self.macs_after} MACs "
                f"({share:.0%} remain)")


@dataclass(frozen=True)
class Channels(Rewrite):
    """Structured pruning of channels, hidden units and attention heads.

    macs: fraction of the multiply-accumulates that shall remain, 0..1 (0.5 keeps half of them). Or
    ratio: fraction of the channels that shall remain, 0..1. Give one of the two.
    score: "l1", "l2" (norms over all coupled weights), "taylor" (needs calibration data and a loss) or "random".
    allocation: "global" ranks all channels together (norms divided by their group's mean); "uniform" takes the same
        share of every group.
    round_to: a group keeps a multiple of this many positions (8 or 16 suits most kernels).
    min_keep: channels that every group keeps at least.
    ignore: glob patterns of module paths or tensor names that make channels; their groups are left alone.
    residual: False leaves channels alone that are the sum of several paths, and cuts inside blocks only.
    seed: for score="random".

    A target that cannot be reached is approached as far as the groups go, which ``skipped`` then says.
    """

    macs: float | None = None
    ratio: float | None = None
    score: str = "l1"
    allocation: str = "global"
    round_to: int = 1
    min_keep: int = 1
    ignore: tuple[str, ...] = ()
    residual: bool = True
    seed: int = 0

    stage: ClassVar[Stage] = Stage.STRUCTURE

    def plan(self, network: Network, task: Task) -> ChannelPlan:
        """Scores every channel and chooses those to keep. Raises RecipeError for options that make no sense."""
        self._check()
        axes = axis_groups(network)
        groups, left = self._candidates(axes)
        scores = SCORES[self.score](network, task, groups, self.seed)
        if self.score not in COMPARABLE:
            scores = normalised(scores)
        if self.allocation == "uniform":
            scores = [quantiles(s) for s in scores]
        allocation = Allocation(groups, scores, self.min_keep, self.round_to)
        full = axes.macs(np.ones(axes.component.shape, dtype=bool))
        total = count_macs(network).total

        def cost(keep: Keep) -> float:
            """MACs that remain, those included that no channel has a share in."""
            return total - full + axes.macs(kept_atoms(axes, named(groups, keep)))

        if self.macs is not None:
            keep = allocation.to_target(cost, self.macs * total)
        else:
            assert self.ratio is not None
            keep = allocation.keep(round((1 - self.ratio) * allocation.total))
        after = round(cost(keep))
        if self.macs is not None and total and after > (self.macs + 0.02) * total:
            left = (*left, Skipped("", f"macs={self.macs} cannot be reached: {after / total:.3f} remain, the nearest "
                                       "that these groups allow; lower round_to or min_keep, or ignore less"))
        chosen = {g.name: tuple(k.tolist()) for g, k in zip(groups, keep, strict=True) if len(k) < len(g)}
        touched = {m.tensor for g in groups if g.name in chosen for m in g.members}
        shapes = {n: tuple(network.tensor(n).shape) for n in sorted(touched)}
        return ChannelPlan(chosen, shapes, total, after, skipped=(*axes.frozen, *left))

    def _candidates(self, axes: AxisGroups) -> tuple[list[AxisGroup], tuple[Skipped, ...]]:
        """The groups that may be cut, and why others that could are not."""
        groups, left = [], []
        matched: set[str] = set()
        for group in axes.groups:
            made = {n for m in group.members if m.makes for n in (m.tensor, m.tensor.rpartition(".")[0])} | {group.name}
            hits = [p for p in self.ignore if any(fnmatchcase(n, p) for n in made)]
            matched.update(hits)
            if hits:
                left.append(Skipped(group.name, f"ignore={hits[0]!r}"))
            elif group.residual and not self.residual:
                left.append(Skipped(group.name, "a sum of several paths, and residual=False"))
            elif len(group) <= self.min_keep:
                left.append(Skipped(group.name, f"it has {len(group)} channels, and min_keep={self.min_keep}"))
            elif len(group) * group.width < self.round_to:
                left.append(Skipped(group.name, f"it is {len(group) * group.width} wide, and round_to={self.round_to}"))
            else:
                groups.append(group)
        left.extend(Skipped(p, "this pattern of ignore=(...) matched no channels that could be cut")
                    for p in self.ignore if p not in matched)
        return groups, tuple(left)

    def _check(self) -> None:
        if (self.macs is None) == (self.ratio is None):
            given = "both" if self.macs is not None else "neither"
            raise RecipeError(f"Channels was given {given} of macs and ratio; write Channels(macs=0.5) to keep half of "
                              "the MACs or Channels(ratio=0.5) to keep half of the channels")
        for name, value in (("macs", self.macs), ("ratio", self.ratio)):
            if value is not None and not 0 < value <= 1:
                raise RecipeError(f"Channels was given {name}={value}; expected the fraction that remains, above 0 and "
                                  f"up to 1, as in Channels({name}=0.5)")
        if self.score not in SCORES:
            raise RecipeError(f"Channels has no score {self.score!r}; {did_you_mean(self.score, SCORES)}; "
                              "write Channels(macs=0.5, score=\"l1\")")
        if self.allocation not in ALLOCATIONS:
            raise RecipeError(f"Channels has no allocation {self.allocation!r}; "
                              f"{did_you_mean(self.allocation, ALLOCATIONS)}; write allocation=\"global\"")
        for name, least in (("round_to", self.round_to), ("min_keep", self.min_keep)):
            if least < 1:
                raise RecipeError(f"Channels was given {name}={least}; expected a whole number from 1, as in {name}=8")


def named(groups: Sequence[AxisGroup], keep: Keep) -> dict[str, Sequence[int]]:
    return {g.name: k.tolist() for g, k in zip(groups, keep, strict=True)}
