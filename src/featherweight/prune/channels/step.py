"""``Channels``: takes whole channels out of a network, which becomes smaller and faster without any special kernel."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from featherweight import deploy
from featherweight.axes.cut import kept_atoms
from featherweight.axes.groups import HEADS, AxisGroup, AxisGroups, axis_groups
from featherweight.axes.zero import zero
from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.prune.channels.allocate import ALLOCATIONS
from featherweight.prune.channels.choose import ChannelChoice, ChannelGoal, choose, ranked
from featherweight.prune.channels.costs import TARGETS
from featherweight.prune.channels.plan import ChannelPlan, filled
from featherweight.prune.channels.refit import METHODS, compensated, left_out
from featherweight.prune.channels.schedules import SCHEDULES, ChannelDriver, Pace, start
from featherweight.prune.channels.scores.table import NEEDS, SCORES, Scores
from featherweight.steps import ALONE, Context, Rewrite, Stage
from featherweight.steps.options import (
    COUNT,
    REMAINS,
    SEED,
    Numbers,
    check_known,
    check_number,
    check_numbers,
    check_one,
    check_pace,
    check_times,
)
from featherweight.task import Task

NUMBERS = {**dict.fromkeys(TARGETS, REMAINS),
           **dict.fromkeys(("round_to", "min_keep", "iterations"), COUNT), "seed": SEED}


@dataclass(frozen=True)
class Channels(Rewrite):
    """Structured pruning of channels, hidden units, attention heads and the widths of residual streams.

    How much shall remain, as a fraction 0..1 of what is there; give one of
    macs: multiply-accumulates. params: parameters. bytes: bytes of the stored tensors. ratio: channels.
    latency: of the sum of the layers' latencies, each measured in the runtime ``target`` (None: the one that is
        compressed for) at several widths; the widths chosen are those that are really faster there. times: the folder
        of another device, in the place of this machine (``featherweight bench-table``).

    Which, and what with the rest:
    score: "l1", "l2" (norms over all coupled weights), "fpgm" (distance to the other filters), "bn" (scale of the batch
        norm), "random"; and with calibration data "taylor", "fisher" (change of the loss), "activation" (norms of what
        is read times weights) and "reconstruction" (error of the next layers' outputs).
    allocation: "uniform" takes the same share of every group; "global" ranks all channels together; "erk" keeps more in
        small groups (Erdos-Renyi kernel); "sensitivity" takes where the loss on calibration data rises least.
    compensate: "none"; "bias" folds the mean of what goes into the biases of who read it; "least_squares" refits the
        weights that remain, layer after layer, to the outputs of the original on calibration data.
    iterations: the cut is made in so many parts, and the channels are scored again before each.
    round_to: a group keeps a multiple of this many positions (8 or 16 suits most kernels).
    min_keep: channels that every group keeps at least.
    ignore: patterns (``network/layers``) of layers that make channels; their groups are left alone.
    residual: False leaves channels alone that are the sum of several paths, and cuts inside blocks only.
    heads: what goes where attention has heads: "whole" heads, or "width", the same positions in every head.
    seed: for score="random".

    During training (in a Fit's ``during=(...)``) a schedule leads to the cut, which is made at the end:
    schedule: "gradual" (a growing share of the channels is zeroed, and chosen again, from ``begin`` to ``end``),
        "slimming" (an L1 penalty on the scales of norms), "group_lasso" (a penalty on each channel's weights) or
        "growing" (the channels to go are chosen at ``begin``, and the penalty on them grows until ``end``).
    strength: of the penalty; None is the schedule's own. begin, end, frequency: shares of the training, 0..1.

    A target that cannot be reached is approached as far as the groups go, which ``skipped`` then says.

    Example:
        >>> plan = fw.prune.Channels(macs=0.5, score="l2").plan(network, task)
        >>> small = plan.apply(network)
        >>> fw.measure.macs(small).total < 0.55 * fw.measure.macs(network).total
        True
    """

    macs: float | None = None
    ratio: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    score: str = "l1"
    allocation: str = "uniform"
    compensate: str = "none"
    iterations: int = 1
    round_to: int = 1
    min_keep: int = 1
    ignore: tuple[str, ...] = ()
    residual: bool = True
    heads: str = "whole"
    target: str | None = None
    schedule: str = "gradual"
    strength: float | None = None
    begin: float = 0.0
    end: float = 0.75
    frequency: float = 0.01
    seed: int = 0
    times: str | None = None

    stage: ClassVar[Stage] = Stage.STRUCTURE

    def needs(self) -> tuple[str, ...]:
        """What the score reads."""
        return NEEDS.get(self.score, ())

    def plan(self, network: Network, task: Task) -> ChannelPlan:
        """Scores every channel and chooses those to keep. Raises RecipeError for options that make no sense."""
        self.check()
        axes = axis_groups(network, self.heads)
        work, choice, tensors = network, None, {}
        for part in range(1, self.iterations + 1):
            choice = self._choose(network, work, task, axes, part / self.iterations, choice)
            kept = kept_atoms(axes, choice.keep)
            if self.compensate != "none":
                tensors = compensated(network, task, axes, kept, self.compensate)
            if part < self.iterations:
                work = zero(filled(network, tensors), axes, kept)
        assert choice is not None
        left = left_out(network, axes, kept) if self.compensate != "none" else ()
        return ChannelPlan(choice.keep, choice.shapes(network), choice.macs_before, choice.macs_after,
                           choice.sensitivity, self.heads, skipped=(*choice.skipped, *left), tensors=tensors)

    def start(self, network: Network, task: Task, context: Context = ALONE) -> ChannelDriver:
        """The schedule at work; its ``finish`` gives a ChannelPlan. Raises RecipeError for options that make no sense
        in training."""
        self.check()
        self.check_training()
        return start(self._selection(), Pace(self.schedule, self.strength, self.begin, self.end, self.frequency),
                     network, task)

    def _selection(self) -> ChannelGoal:
        goal = next(t for t in TARGETS if getattr(self, t) is not None)
        return ChannelGoal(goal, getattr(self, goal), self.score, self.allocation, self.round_to, self.min_keep,
                         self.ignore, self.residual, self.heads, self.target, self.seed, self.times)

    def _choose(self, network: Network, work: Network, task: Task, axes: AxisGroups, progress: float,
                before: ChannelChoice | None) -> ChannelChoice:
        """What to keep when this share of the way is gone; what is gone already stays so."""
        wanted = self._selection()
        wanted = replace(wanted, share=wanted.share ** progress)

        def scores(groups: Sequence[AxisGroup]) -> Scores:
            found = ranked(wanted, work, task, groups)
            for group, own in zip(groups, found, strict=True):
                kept = before.keep.get(group.name) if before is not None else None
                if kept is not None:
                    own[np.setdiff1d(np.arange(len(own)), kept)] = -np.inf
            return found

        return choose(wanted, network, task, axes=axes, scores=scores, now=work)

    def check(self) -> None:
        """Raises RecipeError for options that make no sense, ExportError for an unknown target."""
        check_one(self, TARGETS, "Channels(macs=0.5) to keep half of the MACs or Channels(ratio=0.5) to keep half of "
                                 "the channels")
        check_numbers(self, NUMBERS)
        tables: dict[str, Collection[str]] = {"score": SCORES, "allocation": ALLOCATIONS, "heads": HEADS,
                                              "compensate": ("none", *METHODS), "schedule": SCHEDULES}
        for name, table in tables.items():
            check_known("Channels", name, getattr(self, name), table)
        check_pace(self)
        usual = f"the schedule's own ({SCHEDULES[self.schedule].STRENGTH:g})"
        check_number("Channels", "strength", self.strength, Numbers(0.1, above=0, none=usual))
        if self.target is not None:
            deploy.target(self.target)
        check_times(self)

    def check_training(self) -> None:
        """Raises RecipeError for options that have no meaning during training."""
        if self.compensate != "none" or self.iterations > 1:
            raise RecipeError(f"Channels(compensate={self.compensate!r}, iterations={self.iterations}) works at once, "
                              "the training makes up for the channels itself; leave both out in Train(during=...), or "
                              "put Channels into the recipe as a step of its own")
