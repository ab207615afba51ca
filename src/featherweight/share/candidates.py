"""What sharing offers for each layer: its weights as indices of few bits into a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from featherweight.judge.bench import Form
from featherweight.judge.candidates import Candidate, Family, Option, register
from featherweight.network import Network
from featherweight.share.steps import Codebook, CodebookPlan
from featherweight.steps import Plan, Stage
from featherweight.task import Task


@dataclass(frozen=True)
class Bits(Family):
    """Every layer with a codebook of its own. options: bits of the index, 1 to 8. step: says the rest: keep_zeros,
    min_size, ignore.

    Example:
        >>> found = fw.share.Bits(options=(2, 4)).candidates(network, task, layer="3.weight")
        >>> [candidate.option for candidate in found]
        [2, 4]
    """

    name: ClassVar[str] = "share"
    stage: ClassVar[Stage] = Stage.PRECISION
    options: tuple[int, ...] = (2, 3, 4, 5)
    step: Codebook = field(default_factory=Codebook)

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        for bits in self.options:
            self._at(bits).check()

    def _at(self, bits: int) -> Codebook:
        return replace(self.step, bits=bits, clusters=None, fold_batch_norm=False)

    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        found: dict[str, list[Candidate]] = {}
        for bits in self.options:
            plan = self._at(bits).plan(network, task)
            for item in plan.shared:
                if layer is None or item.weight == layer:
                    found.setdefault(item.weight, []).append(_candidate(self.name, bits, plan.only(item.weight)))
        return tuple(c for mine in found.values() for c in mine)

    def joined(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        return _joined(plans)


@dataclass(frozen=True)
class Rates(Family):
    """Every layer with a codebook whose bits have a price. options: the prices, ``rate`` of ``Codebook``, above 0.
    step: says the rest: bits, importance, spacing, keep_zeros, min_size, ignore.

    ``balance.Mixed(archive=0.1, kinds=("float",), families=("share.rates",))`` finds the price of every layer that a
    budget of the archive's bytes leaves.

    Example:
        >>> family = fw.share.Rates(options=(0.003, 0.03), step=fw.share.Codebook(min_size=100))
        >>> found = family.candidates(network, task, layer="3.weight")
        >>> [candidate.option for candidate in found]
        [0.003, 0.03]
    """

    name: ClassVar[str] = "share.rates"
    stage: ClassVar[Stage] = Stage.PRECISION
    options: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03)
    step: Codebook = field(default_factory=lambda: Codebook(importance="inputs"))

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        for rate in self.options:
            replace(self.step, rate=rate).check()

    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        found: dict[str, list[Candidate]] = {}
        for rate in self.options:
            plan = replace(self.step, rate=rate, fold_batch_norm=False).plan(network, task)
            for item in plan.shared:
                if layer is None or item.weight == layer:
                    found.setdefault(item.weight, []).append(_candidate(self.name, rate, plan.only(item.weight)))
        return tuple(c for mine in found.values() for c in mine)

    def joined(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        return _joined(plans)


def _candidate(family: str, option: Option, plan: CodebookPlan) -> Candidate:
    """The candidate of a plan that is about one weight."""
    name = plan.shared[0].weight
    return Candidate(name, family, option, Form({name: partial(shared_weight, plan)}), partial(_itself, plan))


def _joined(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    mine = [p for p in plans if isinstance(p, CodebookPlan)]
    return (CodebookPlan(tuple(s for p in mine for s in p.shared),
                         tensors={n: t for p in mine for n, t in p.tensors.items()}),)


def shared_weight(plan: CodebookPlan, weight: Tensor) -> Tensor:
    """The weight as a plan of this weight alone gives it."""
    item = plan.shared[0]
    codebook, index = plan.codes(item, weight)
    if item.axis is None:
        return codebook[index.long()].to(weight.dtype)
    moved = index.movedim(item.axis, 0)
    return codebook.gather(1, moved.flatten(1).long()).view(moved.shape).movedim(0, item.axis).to(weight.dtype)


def _itself(plan: CodebookPlan) -> CodebookPlan:
    return plan


register(Bits())
register(Rates())

__all__ = ["Bits", "Rates"]
