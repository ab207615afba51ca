"""What pruning of weights offers for each layer: a share of its weights is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from featherweight.judge.bench import Form
from featherweight.judge.candidates import Candidate, Family, register
from featherweight.network import Network
from featherweight.prune.weights.step import WeightPlan, Weights
from featherweight.steps import Plan, Stage
from featherweight.task import Task


@dataclass(frozen=True)
class Sparsities(Family):
    """Every layer at every sparsity. options: fractions of zeros, 0..1. step: says the rest: score, pattern, ignore.

    Example:
        >>> found = fw.prune.Sparsities(options=(0.5, 0.75)).candidates(network, task, layer="3.weight")
        >>> [candidate.option for candidate in found]
        [0.5, 0.75]
    """

    name: ClassVar[str] = "prune.weights"
    stage: ClassVar[Stage] = Stage.SPARSITY
    options: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    step: Weights = field(default_factory=lambda: Weights(allocation="layer"))

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        for sparsity in self.options:
            replace(self.step, sparsity=sparsity).check()

    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        plans = {s: replace(self.step, sparsity=s).plan(network, task) for s in self.options}
        layers = dict.fromkeys(name for plan in plans.values() for name in plan.zeros)
        order = [name for name in network.tensors() if name in layers and layer in (None, name)]
        return tuple(self._candidate(name, s, plan)
                     for name in order for s, plan in plans.items() if name in plan.zeros)

    def _candidate(self, name: str, sparsity: float, plan: WeightPlan) -> Candidate:
        mask = plan.tensors[f"mask.{name}"]
        one = partial(WeightPlan, {name: plan.zeros[name]}, plan.pattern, tensors={f"mask.{name}": mask})
        return Candidate(name, self.name, sparsity, Form({name: partial(masked, mask)}), one)

    def joined(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        found = [p for p in plans if isinstance(p, WeightPlan)]
        return (WeightPlan({n: z for p in found for n, z in p.zeros.items()}, self.step.pattern,
                           tensors={n: t for p in found for n, t in p.tensors.items()}),)


def masked(mask: Tensor, weight: Tensor) -> Tensor:
    """The weight with zeros where the mask (bool, True = kept) says so."""
    return weight.masked_fill(~mask.to(weight.device), 0)


register(Sparsities())

__all__ = ["Sparsities"]
