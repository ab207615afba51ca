"""What factorizing offers for each layer: thinner layers in its place that keep a part of its energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from featherweight.factorize.plan import LowRankPlan, Split
from featherweight.factorize.steps import LowRank
from featherweight.factorize.surgery import links_of, weight_of
from featherweight.judge.bench import Form
from featherweight.judge.candidates import Candidate, Family, register
from featherweight.network import Network
from featherweight.network.layers import select
from featherweight.steps import Plan, Stage
from featherweight.task import Task


@dataclass(frozen=True)
class Energies(Family):
    """Every layer split so that it keeps this part of its energy, where that saves parameters and MACs.

    options: parts of the sum of squared singular values, 0..1. step: says the rest: ignore.

    Example:
        >>> wide = fw.capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(2, 64))
        >>> [candidate.option for candidate in fw.factorize.Energies(options=(0.5,)).candidates(wide, fw.Task())]
        [0.5]
    """

    name: ClassVar[str] = "factorize"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    options: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    step: LowRank = field(default_factory=lambda: LowRank(min_gain=0.0))

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        for energy in self.options:
            replace(self.step, energy=energy).check()

    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        found: dict[str, list[Candidate]] = {}
        calls = {one.weight: one.calls[0] for one in select(network).layers}
        for energy in self.options:
            for split in replace(self.step, energy=energy).plan(network, task).splits:
                if layer is None or split.weight == layer:
                    found.setdefault(split.weight, []).append(
                        Candidate(split.weight, self.name, energy,
                                  Form({split.weight: partial(split_weight, split, calls[split.weight])}),
                                  partial(LowRankPlan, (split,))))
        return tuple(c for mine in found.values() for c in mine)

    def joined(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        return (LowRankPlan(tuple(s for p in plans if isinstance(p, LowRankPlan) for s in p.splits)),)


def split_weight(split: Split, call: Node, weight: Tensor) -> Tensor:
    """The product of the layers that the weight, which ``call`` reads, is split into."""
    return weight_of(call, links_of(call, weight, split.name, split.ranks), weight.shape).to(weight.dtype)


register(Energies())

__all__ = ["Energies"]
