"""``Rungs``: scores a network on its way through a training, so that one that does badly need not end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.network import Network
from featherweight.seeds import generators_kept
from featherweight.steps import Companion, Context
from featherweight.task import Task

#: what the listener is told of a score
WHAT = "balance.Rungs"


@dataclass(frozen=True)
class Rungs:
    """Stands beside a training and tells the listener of its context the score on ``split`` when each of ``shares`` of
    the training is done. first: so many scores come before, of earlier trainings. Nothing that is trained is
    changed."""

    split: str = "validation"
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    first: int = 0

    def start(self, network: Network, task: Task, context: Context) -> Scoring:
        """The scores of one training."""
        return Scoring(self, network, task, context)


class Scoring(Companion):
    """The scores of one training."""

    def __init__(self, rungs: Rungs, network: Network, task: Task, context: Context) -> None:
        self.rungs, self.network, self.task, self.context = rungs, network, task, context
        self.done = 0

    def update(self, progress: float) -> None:
        reached = sum(progress >= share for share in self.rungs.shares)
        if reached > self.done:
            score = self._score()
            for rung in range(self.done, reached):
                number = self.rungs.first + rung + 1
                self.context.progress(WHAT, number, self.rungs.first + len(self.rungs.shares), {"score": score})
            self.done = reached

    def _score(self) -> float:
        mode = self.network.training
        try:
            self.network.eval()
            with torch.no_grad(), generators_kept():
                return float(self.task.score(self.network, self.task.batches(self.rungs.split)))  # type: ignore[misc]
        finally:
            self.network.train(mode)

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.done = int(state["done"])


__all__ = ["WHAT", "Rungs", "Scoring"]
