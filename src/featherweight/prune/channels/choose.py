"""Which channels a ``Channels`` step keeps: candidates, their scores, and as many as its target allows.

``Channels.plan`` asks once; the schedules that work during training (``during.py``) ask again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from featherweight.axes.cut import kept_atoms
from featherweight.axes.groups import AxisGroup, AxisGroups, axis_groups
from featherweight.axes.labels import Ints
from featherweight.judge.widths import LatencyTable
from featherweight.network import Network
from featherweight.network.layers import EVERY, around, fits, ignored, known_by, names_of, select, unmatched
from featherweight.prune.channels.allocate import ALLOCATIONS, Allocation, Case, Keep
from featherweight.prune.channels.costs import COSTS, Cost, everything, saved_each
from featherweight.prune.channels.scores.table import COMPARABLE, ERRORS, SCORES, Scores, normalised
from featherweight.prune.channels.sensitivity import Curve
from featherweight.steps import Skipped
from featherweight.task import Task


@dataclass(frozen=True)
class ChannelGoal:
    """The options of ``Channels`` that say how much is to remain and by what it is chosen, under the same names.

    goal: the one of ``costs.TARGETS`` that was given; share: its value, the fraction 0..1 that remains.
    """

    goal: str
    share: float
    score: str
    allocation: str
    round_to: int
    min_keep: int
    ignore: tuple[str, ...]
    residual: bool
    heads: str
    target: str | None
    seed: int
    times: str | None = None


@dataclass(frozen=True)
class ChannelChoice:
    """The channels to keep, by name, of the groups that lose some; MACs for one sample before and after; what was left
    alone and why; the sensitivity of the groups where it was measured."""

    axes: AxisGroups
    groups: tuple[AxisGroup, ...]
    keep: dict[str, tuple[int, ...]]
    macs_before: int
    macs_after: int
    skipped: tuple[Skipped, ...]
    sensitivity: tuple[Curve, ...] = ()

    def shapes(self, network: Network) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of ``network`` that the cut touches."""
        touched = {m.tensor for g in self.groups if g.name in self.keep for m in g.members}
        return {n: tuple(network.tensor(n).shape) for n in sorted(touched)}


def choose(wanted: ChannelGoal, network: Network, task: Task, *, axes: AxisGroups | None = None,
           scores: Callable[[Sequence[AxisGroup]], Scores] | None = None,
           refuse: Callable[[AxisGroup], str] = lambda group: "", now: Network | None = None) -> ChannelChoice:
    """Scores every channel that may go and keeps the best, as many as the step's target lets.

    axes: the groups of ``network``, where they are known already. scores: one array [n_channels] for each group asked
    for, comparable between groups, in the place of the step's own score. refuse: why a group is left alone, "" if not.
    now: ``network`` with what went already zero, which allocations look at; costs are those of ``network``.
    """
    axes = axes if axes is not None else axis_groups(network, wanted.heads)
    groups, left = candidates(wanted, network, axes)
    left = (*left, *(Skipped(g.name, refuse(g)) for g in groups if refuse(g)))
    groups = [g for g in groups if not refuse(g)]
    found = scores(groups) if scores is not None else ranked(wanted, network, task, groups)
    goal, cost, steps = costing(wanted, network, axes)
    saved = saved_each(axes, groups, cost) if wanted.goal != "ratio" else [1.0] * len(groups)
    case = Case(now or network, task, axes, groups, found, saved, wanted.seed, wanted.score in ERRORS)
    allocation = Allocation(groups, ALLOCATIONS[wanted.allocation](case), wanted.min_keep, wanted.round_to, axes, steps)
    if wanted.goal == "ratio":
        keep = allocation.keep(round((1 - wanted.share) * allocation.total))
    else:
        whole, share = cost(everything(axes)), wanted.share
        keep = allocation.to_target(lambda k: cost(kept_atoms(axes, named(groups, k))), share * whole)
        rest = cost(kept_atoms(axes, named(groups, keep)))
        if rest > (share + 0.02) * whole:
            left = (*left, Skipped("", f"{goal}={share} cannot be reached: {rest / whole:.3f} remain, the nearest "
                                       "that these groups allow; lower round_to or min_keep, or ignore less"))
    macs = cost if goal == "macs" else COSTS["macs"](network, axes)
    left = (*left, *(Skipped(g.name, "all of its channels are kept") for g, k in zip(groups, keep, strict=True)
                     if len(k) == len(g)))
    chosen = {g.name: tuple(k.tolist()) for g, k in zip(groups, keep, strict=True) if len(k) < len(g)}
    return ChannelChoice(axes, tuple(groups), chosen, round(macs(everything(axes))),
                         round(macs(kept_atoms(axes, chosen))), (*axes.frozen, *left), vars(case).get("curves", ()))


def costing(wanted: ChannelGoal, network: Network, axes: AxisGroups) -> tuple[str, Cost, Mapping[tuple[str, int], int]]:
    """What the step has a target for, how it is counted, and the steps of width worth having for axes of weights."""
    if wanted.goal == "latency":
        table = LatencyTable.measure(network, axes, wanted.target or "onnxruntime", times=wanted.times)
        return "latency", table.cost, table.steps()
    goal = wanted.goal if wanted.goal in COSTS else "macs"
    return goal, COSTS[goal](network, axes), {}


def ranked(wanted: ChannelGoal, network: Network, task: Task, groups: Sequence[AxisGroup]) -> Scores:
    """The step's score, made comparable between groups."""
    found = SCORES[wanted.score](network, task, groups, wanted.seed)
    return found if wanted.score in COMPARABLE else normalised(found)


def candidates(wanted: ChannelGoal, network: Network, axes: AxisGroups) -> tuple[list[AxisGroup], tuple[Skipped, ...]]:
    """The groups that may be cut, and why others that could are not."""
    known = _known(network, axes) if wanted.ignore else {}
    groups, left = [], []
    for group in axes.groups:
        hit = ignored(known.get(group.name, ()), wanted.ignore)
        if hit:
            left.append(Skipped(group.name, hit))
        elif group.residual and not wanted.residual:
            left.append(Skipped(group.name, "a sum of several paths, and residual=False"))
        elif len(group) <= wanted.min_keep:
            left.append(Skipped(group.name, f"it has {len(group)} channels, and min_keep={wanted.min_keep}"))
        else:
            groups.append(group)
    left.extend(unmatched(p, "ignore", "channels that could be cut") for p in wanted.ignore
                if not any(fits(names, p) for names in known.values()))
    return groups, tuple(left)


def _known(network: Network, axes: AxisGroups) -> dict[str, frozenset[str]]:
    """Group's name -> what a pattern may fit: the layers that make its channels, and its own name."""
    layers = {layer.weight: layer.known for layer in select(network, kinds=EVERY).layers}
    names = names_of(network)
    found = {}
    for group in axes.groups:
        makers = [names[m.tensor] for m in group.members if m.makes]
        known = [layers.get(name, known_by(tied, ())) for tied in makers for name in tied]
        found[group.name] = frozenset(around(group.name)).union(*known)
    return found


def named(groups: Sequence[AxisGroup], keep: Keep) -> dict[str, Ints]:
    """Name of the group -> the channels that it keeps."""
    return {g.name: k for g, k in zip(groups, keep, strict=True)}
