"""What quantization offers for each layer: its weight in a number format, with what its calls read in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.judge.bench import Form
from featherweight.judge.candidates import Candidate, Family, register
from featherweight.network import Network, fold_batch_norm
from featherweight.numerics import grids
from featherweight.numerics.formats import ACTIVATIONS, DYNAMIC, GRIDS, HALVES, check_kinds
from featherweight.quantize.layers import LayerForm, layers
from featherweight.quantize.plan import QuantizePlan
from featherweight.quantize.ranges import Grid, activation_grids, usual_method
from featherweight.quantize.request import Request, split
from featherweight.quantize.step import Quantize
from featherweight.quantize.store import Point, Stored, chosen_scale, rounder, scale_name
from featherweight.steps import Plan, Stage
from featherweight.task import Task


@dataclass(frozen=True)
class Kinds(Family):
    """Every layer in every number format, rounded to nearest.

    options: as in ``Quantize(mixed=...)``: "int4", or with activations "int4/uint4", "int8/float". step: says the rest:
    activations where an option names none, granularity, ranges, ignore, target.

    Example:
        >>> found = fw.quantize.Kinds(options=("int8", "int4")).candidates(network, task, layer="3.weight")
        >>> [candidate.option for candidate in found]
        ['int8', 'int4']
    """

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.PRECISION
    options: tuple[str, ...] = ("int8", "int6", "int4", "int3", "ternary")
    step: Quantize = field(default_factory=Quantize)

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        for option in self.options:
            check_kinds("options", *split(option, self.step.activations))
        self.step.check()

    def prepared(self, network: Network) -> Network:
        """A copy with batch norm folded."""
        return fold_batch_norm(network)

    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        """Activations' grids are found on calibration data when the first of them is needed."""
        found = [(option, form) for name, mine in self.forms(network).items() if layer in (None, name)
                 for option, form in mine.items()]
        return candidates_of(network, task, found, self.step)

    def forms(self, network: Network) -> dict[str, dict[str, LayerForm]]:
        """Weight's name -> option -> the layer in that form, for the forms that it can have; in graph order."""
        found: dict[str, dict[str, LayerForm]] = {}
        for option in self.options:
            weights, activations = split(option, self.step.activations)
            request = Request(weights, activations, self.step.granularity, {}, None, self.step.ignore)
            for form in layers(network, request)[0]:
                found.setdefault(form.stored.weight, {})[option] = form
        return found

    def joined(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        """One plan; ``Quantize`` itself, with ``mixed``, also says where activations are rounded best."""
        found = [p for p in plans if isinstance(p, QuantizePlan)]
        return (QuantizePlan(tuple(s for p in found for s in p.stored), tuple(t for p in found for t in p.points),
                             tensors={n: t for p in found for n, t in p.tensors.items()}),)


def candidates_of(network: Network, task: Task, forms: Sequence[tuple[str, LayerForm]],
                  step: Quantize) -> tuple[Candidate, ...]:
    """The candidates of layers of ``network`` in forms that are chosen already: pairs (option, form). step: how their
    grids are found."""
    read = _Read(network, task, [form for _, form in forms], step)
    return tuple(_candidate(network, option, form, read, step.weight_ranges) for option, form in forms)


def _candidate(network: Network, option: str, layer: LayerForm, read: _Read, method: str | None) -> Candidate:
    stored, kind = layer.stored, str(layer.activations)
    inputs = {node.name: partial(read.rounded, (node.name, kind))
              for node in layer.nodes if (node.name, kind) in read.inputs}

    def plan() -> Plan:
        points = tuple(read.point((name, kind)) for name in inputs)
        scale = _scale(network.tensor(stored.weight).detach(), stored, method)
        tensors = {} if scale is None else {scale_name(stored.weight): scale}
        return QuantizePlan((stored,), points, tensors=tensors)

    form = Form({stored.weight: partial(rounded_weight, stored, method)}, inputs, reads=layer.activations or "")
    return Candidate(stored.weight, Kinds.name, option, form, plan)


def _scale(weight: Tensor, stored: Stored, method: str | None) -> Tensor | None:
    """The scales of a weight's grid; None for halves."""
    if stored.kind in HALVES:
        return None
    return chosen_scale(weight.cpu(), stored, method or usual_method(GRIDS[stored.kind].bits))


def rounded_weight(stored: Stored, method: str | None, weight: Tensor) -> Tensor:
    """The weight on its grid, rounded to nearest. method: the option ``weight_ranges`` of ``Quantize``."""
    scale = _scale(weight, stored, method)
    if scale is None:
        return weight.to(HALVES[stored.kind]).to(weight.dtype)
    spread = stored.spread(scale.to(weight.device), weight.shape)
    zero = torch.zeros((), dtype=torch.int32, device=weight.device)
    return grids.fake_quantize(weight.double(), spread, zero, GRIDS[stored.kind]).to(weight.dtype)


class _Read:
    """What calls read, rounded: (call's name, number format) -> its grid."""

    def __init__(self, network: Network, task: Task, forms: Sequence[LayerForm], step: Quantize) -> None:
        self.network, self.task, self.step = network, task, step
        rules = step.request().rules()
        self.inputs: dict[tuple[str, str], Node] = {
            (n.name, layer.activations): n for layer in forms if layer.activations is not None
            for n in layer.nodes if rules.takes(n, layer.activations)}

    @cached_property
    def grids(self) -> Mapping[tuple[str, str], Grid]:
        """One pass over the calibration data for all (two where ranges are searched for)."""
        found: dict[tuple[str, str], Grid] = {}
        for kind in dict.fromkeys(kind for _, kind in self.inputs):
            mine = [name for name, k in self.inputs if k == kind]
            if kind == DYNAMIC:
                found |= {(name, kind): Grid(1.0, 0, False) for name in mine}
                continue
            given = {name: self.given(name, kind) for name in mine}
            names = dict.fromkeys(given.values())
            method = self.step.ranges or usual_method(ACTIVATIONS[kind].bits)
            made = activation_grids(self.network, self.task, {n: [n] for n in names},
                                    dict.fromkeys(names, ACTIVATIONS[kind]), method, self.step.calibration_batches)
            found |= {(name, kind): made[node] for name, node in given.items()}
        return found

    def given(self, name: str, kind: str) -> str:
        """The node that a call reads."""
        return str(self.inputs[name, kind].args[0])

    def point(self, key: tuple[str, str]) -> Point:
        grid = self.grids[key]
        return Point(self.given(*key), grid.scale, grid.zero_point, (key[0],), key[1], grid.signed)

    def rounded(self, key: tuple[str, str], value: Tensor) -> Tensor:
        return rounder(self.point(key))(value)


register(Kinds())

__all__ = ["Kinds", "candidates_of", "rounded_weight"]
