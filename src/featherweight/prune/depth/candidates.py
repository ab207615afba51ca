"""What pruning of depth offers for each block: that it goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from featherweight.axes.blocks import droppable
from featherweight.judge.bench import bypass
from featherweight.judge.candidates import Candidate, Family, register
from featherweight.network import Network
from featherweight.prune.depth.step import LayerPlan
from featherweight.steps import Stage
from featherweight.task import Task

DROPPED = "dropped"


@dataclass(frozen=True)
class Drops(Family):
    """Every block that may be dropped, of every kind, gives back its input (or its shortcut).

    Example:
        >>> deep = fw.capture(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(2, 8))
        >>> [candidate.layer for candidate in fw.prune.Drops().candidates(deep, fw.Task())]
        ['0', '1']
    """

    name: ClassVar[str] = "prune.depth"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    single: ClassVar[bool] = False
    options: tuple[str, ...] = (DROPPED,)

    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        return tuple(Candidate(b.name, self.name, DROPPED, bypass(b.source, b.output),
                               partial(LayerPlan, (b,), {b.name: 0.0}))
                     for b in droppable(network).found if layer is None or b.name == layer)


register(Drops())

__all__ = ["Drops"]
