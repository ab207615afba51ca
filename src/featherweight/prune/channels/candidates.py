"""What pruning of channels offers for each axis group: the lowest-scoring share of its channels goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from featherweight.axes.cut import kept_atoms
from featherweight.axes.groups import AxisGroup, AxisGroups, axis_groups
from featherweight.judge.candidates import Candidate, Family, register
from featherweight.network import Network
from featherweight.prune.channels.costs import everything, macs
from featherweight.prune.channels.plan import ChannelPlan
from featherweight.prune.channels.scores.table import SCORES
from featherweight.prune.channels.sensitivity import SHARES, lowest, silence
from featherweight.steps import Stage
from featherweight.steps.options import check_known
from featherweight.task import Task


@dataclass(frozen=True)
class Shares(Family):
    """Every axis group without a share of its channels, those of the lowest scores; one channel stays at least.

    options: shares of a group that go, 0..1. score, heads: as in ``Channels``.

    Example:
        >>> found = fw.prune.Shares(options=(0.5,)).candidates(network, task)
        >>> [(candidate.layer, candidate.option) for candidate in found]
        [('0', 0.5), ('3', 0.5)]
    """

    name: ClassVar[str] = "prune.channels"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    single: ClassVar[bool] = False
    options: tuple[float, ...] = SHARES
    score: str = "l1"
    heads: str = "whole"

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_known("Shares", "score", self.score, SCORES)

    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        axes = axis_groups(network, self.heads)
        groups = [g for g in axes.groups if layer is None or g.name == layer]
        scores = SCORES[self.score](network, task, groups, 0)
        return tuple(self._candidate(network, axes, group, share, own)
                     for group, own in zip(groups, scores, strict=True) for share in self.options)

    def _candidate(self, network: Network, axes: AxisGroups, group: AxisGroup, share: float,
                   scores: npt.NDArray[np.float64]) -> Candidate:
        gone = lowest(scores, share)[:len(group) - 1]
        return Candidate(group.name, self.name, share, silence(network, group, gone),
                         partial(self._plan, network, axes, group, gone))

    def _plan(self, network: Network, axes: AxisGroups, group: AxisGroup, gone: npt.NDArray[np.int64]) -> ChannelPlan:
        keep = {group.name: tuple(np.setdiff1d(np.arange(len(group)), gone).tolist())}
        shapes = {m.tensor: tuple(network.tensor(m.tensor).shape) for m in group.members}
        count = macs(network, axes)
        return ChannelPlan(keep, shapes, round(count(everything(axes))), round(count(kept_atoms(axes, keep))),
                           heads=self.heads)


register(Shares())

__all__ = ["Shares"]
