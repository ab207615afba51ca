"""Candidates: the forms that each layer, or group of channels, may take. A family offers them, the judge measures them.

A family enters itself into ``FAMILIES`` with one instance; ``fw.sensitivity`` and ``fw.balance.Mixed`` know it by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from featherweight.errors import RecipeError, did_you_mean
from featherweight.judge.bench import Form
from featherweight.judge.costs import alone, changes
from featherweight.judge.damage import Judge, damages
from featherweight.network import Network
from featherweight.steps import Plan, Stage
from featherweight.steps.shipped import shipped
from featherweight.task import Task

#: what a family is asked for by: a number format, or a share
Option = str | int | float


@dataclass(frozen=True)
class Candidate:
    """One form that one layer may take.

    layer: the name of the layer's weight; where a family changes no single weight, that of its group or block. family,
    option: who offers it. form: what stands in the layer's place on a bench. plan: makes the plan that gives the layer
    this form, and changes nothing else. costs: name in ``COSTS``, or "seconds" -> by how much the network's changes;
    what is not in it was not counted. damage: as a ``Judge`` measured it; None: it was not measured.
    """

    layer: str
    family: str
    option: Option
    form: Form
    plan: Callable[[], Plan]
    costs: Mapping[str, float] = field(default_factory=dict)
    damage: float | None = None


class Family(ABC):
    """What a technique offers for each layer. Implementations are frozen dataclasses with a field ``options``."""

    #: the name in ``FAMILIES``
    name: ClassVar[str]
    #: where its plans come among those of other families
    stage: ClassVar[Stage]
    #: whether every candidate is another form of one stored weight, its ``layer``, and of nothing else
    single: ClassVar[bool] = True
    #: what is offered for each layer that can have it
    options: tuple[Option, ...]

    @abstractmethod
    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        """What is offered for ``layer`` (None: for all), layer after layer in the order of the graph. May read the
        task's data; leaves the network as it was. The network is one that ``prepared`` gave."""

    def prepared(self, network: Network) -> Network:
        """The network, computing the same, that the candidates are forms of."""
        return network

    def joined(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        """The plans of candidates for different layers, as fewer ones that do the same one after another."""
        return tuple(plans)

    def check(self) -> None:  # noqa: B027  (many have nothing to check)
        """Raises RecipeError for options that make no sense."""


#: name -> the family with the options that it has where none are asked for
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Puts a family into the table, under its name."""
    FAMILIES[family.name] = family
    return family


def family_of(given: str | Family, options: Collection[Option] | None = None) -> Family:
    """The family of this name, with these ``options`` (None: its own). Raises RecipeError if there is none, or its
    options make no sense."""
    if isinstance(given, str):
        if given not in FAMILIES:
            shipped()
        if given not in FAMILIES:
            raise RecipeError(f"there is no family {given!r}; {did_you_mean(given, FAMILIES)}")
        given = FAMILIES[given]
    found = given if options is None else replace(given, options=tuple(options))  # type: ignore[type-var]
    found.check()
    return found


def judged(network: Network, task: Task, candidates: Sequence[Candidate], judge: Judge) -> tuple[Candidate, ...]:
    """The candidates with their damages, each measured by itself."""
    found = damages(network, task, [c.form for c in candidates], judge)
    return tuple(replace(c, damage=d) for c, d in zip(candidates, found, strict=True))


def priced(network: Network, candidates: Sequence[Candidate], wanted: Collection[str]) -> tuple[Candidate, ...]:
    """The candidates with what they change of the ``wanted`` costs (keys of ``COSTS``), counted on the layer alone
    where there is one, else on the whole network."""
    known, layers, found = network.tensors(), {}, []
    for c in candidates:
        if c.layer not in layers:
            layers[c.layer] = alone(network, c.layer) if c.layer in known else network
        found.append(replace(c, costs={**c.costs, **changes(layers[c.layer], c.plan(), wanted)}))
    return tuple(found)


__all__ = ["FAMILIES", "Candidate", "Family", "Option", "family_of", "judged", "priced", "register"]
