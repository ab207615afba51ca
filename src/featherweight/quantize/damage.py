"""How much each layer matters: what changes when it alone is on a grid, and all others are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import TaskError
from featherweight.network import Network, fold_batch_norm
from featherweight.network.edit import insert_call
from featherweight.numerics import grids
from featherweight.numerics.formats import ACTIVATIONS, DYNAMIC, GRIDS, HALVES, check_kinds
from featherweight.quantize.grids import weight_scales
from featherweight.quantize.judging import HOW, Measure
from featherweight.quantize.layers import LayerForm, layers
from featherweight.quantize.ranges import Grid, activation_grids, usual_method
from featherweight.quantize.request import Request, split
from featherweight.quantize.search import data
from featherweight.quantize.step import Quantize
from featherweight.quantize.store import Point, rounder
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps.options import COUNT, SEED, check_batches, check_known, check_number, check_split
from featherweight.task import Task

aten = torch.ops.aten
FLOAT = "float"  #: the kind of a layer that stays as it is
#: weight's name -> kind -> the layer in that form
Forms = Mapping[str, Mapping[str, LayerForm]]


@dataclass(frozen=True)
class Damage:
    """What it does to a network that the weight ``layer`` (and what its calls read) is of this ``kind``."""

    layer: str
    kind: str
    damage: float


@dataclass(frozen=True)
class Judge:
    """How damage is measured: see ``sensitivity``."""

    how: str = "output"
    split: str = "calibration"
    batches: int | None = 2
    probes: int = 32
    seed: int = 0

    def check(self, name: str) -> None:
        """Raises RecipeError for options that make no sense."""
        check_known(name, "how", self.how, HOW)
        check_split(name, self.split)
        check_batches(name, self.batches)
        check_number(name, "probes", self.probes, COUNT)
        check_number(name, "seed", self.seed, SEED)


def sensitivity(network: Network, task: Task, kinds: Sequence[str] = ("int8", "int4"), how: str = "output",
                step: Quantize | None = None, split: str = "calibration", batches: int | None = 2, probes: int = 32,
                seed: int = 0) -> tuple[Damage, ...]:
    """The damage of every layer in every kind, rounded to nearest: one pass over the batches for each of them.

    kinds: as in ``Quantize(mixed=...)``: "int4", "int4/uint4" (with values), "int8/float"; "float" does no damage.
    how: "output": |y' - y|^2 / |y|^2 over all floating-point outputs. "score": how many points the task's score falls.
        "hessian": the mean trace of the loss's Hessian times |W - Q(W)|^2 (Dong et al. 2020, "HAWQ-V2", eq. 10), of
        weights alone; a negative trace counts as none. It takes ``probes`` double backward passes a batch, for all
        layers and kinds together. It forecasts small changes at a minimum of the loss: where the loss is near zero (on
        images that were trained on) or two bits are left, trust "output" rather.
    step: says the rest: activations where a kind names none, granularity, ranges, ignore, target.
    split, batches: what is read. Raises RecipeError for unknown options, TaskError for what the task lacks.
    """
    step = step or Quantize()
    judge = Judge(how, split, batches, probes, seed)
    judge.check("sensitivity")
    check_forms("kinds", kinds, step.activations)
    with generators_kept():
        folded = fold_batch_norm(network).eval()
        found = damages(folded, task, forms(folded, step, kinds), step, judge)
    return tuple(Damage(name, kind, d) for name, mine in found.items() for kind, d in mine.items())


def check_forms(where: str, kinds: Sequence[str], activations: str | None) -> None:
    for kind in kinds:
        if kind != FLOAT:
            check_kinds(where, *split(kind, activations))


def forms(folded: Network, step: Quantize, kinds: Sequence[str]) -> dict[str, dict[str, LayerForm]]:
    """The layers in each of the kinds that they can have, but "float", which all can; in graph order."""
    found: dict[str, dict[str, LayerForm]] = {}
    for kind in kinds:
        if kind != FLOAT:
            weights, values = split(kind, step.activations)
            wish = Request(weights, values, step.granularity, {}, None, step.ignore)
            for layer in layers(folded, wish)[0]:
                found.setdefault(layer.stored.weight, {})[kind] = layer
    return found


def damages(folded: Network, task: Task, choices: Forms, step: Quantize, judge: Judge) -> dict[str, dict[str, float]]:
    """Weight's name -> kind -> damage. Random generators are the caller's to keep."""
    seed_all(seed_from("quantize.sensitivity", judge.seed))
    task.require(judge.split)
    bench = Bench(folded, task, choices, step, judge)
    measure, forecast = HOW[judge.how]
    return forecast(bench) if forecast is not None else bench.each(measure(bench))


def together(folded: Network, task: Task, choices: Forms, step: Quantize, judge: Judge,
             picks: Sequence[Mapping[str, str]]) -> list[float]:
    """The damage of many layers at once, each in the kind that an entry of ``picks`` names ("float": as it is)."""
    seed_all(seed_from("quantize.sensitivity", judge.seed))
    bench = Bench(folded, task, choices, step, judge)
    measure, found = HOW[judge.how][0](bench), []
    for pick in picks:
        with ExitStack() as stack, torch.no_grad():
            for name, kind in pick.items():
                if kind != FLOAT:
                    stack.enter_context(bench.put(choices[name][kind]))
            found.append(measure())
    return found


class Bench:
    """A network whose layers are put into other forms one by one."""

    def __init__(self, folded: Network, task: Task, choices: Forms, step: Quantize, judge: Judge) -> None:
        self.task, self.choices, self.step, self.judge = task, choices, step, judge
        self.network = folded.copy().eval()
        self.weights = {name: [n.name for n in self.network.graph.nodes
                               if n.op == "get_attr" and n.target in self.network.tied_names(name)] for name in choices}
        self.grids = {} if judge.how == "hessian" else self._grids()
        self.read = {name: self._copied(name) for name in dict.fromkeys(call for call, _ in self.grids)}

    def data(self) -> list[Any]:
        found = list(data(self.network, self.task, self.judge.split, self.judge.batches))
        if not found:
            raise TaskError(f"the {self.judge.split} split is empty; damage is measured on data: "
                            f"Task({self.judge.split}=lambda: my_batches, ...)")
        return found

    def _grids(self) -> dict[tuple[str, str], Grid]:
        """(call, kind of values) -> the grid of what the call reads."""
        found: dict[tuple[str, str], Grid] = {}
        rules = self.step.request().rules()
        wanted: dict[str, list[Node]] = {}
        for layer in (layer for mine in self.choices.values() for layer in mine.values()):
            if layer.activations is not None:
                wanted.setdefault(layer.activations, []).extend(
                    n for n in layer.nodes if rules.takes(n, layer.activations))
        found |= {(n.name, DYNAMIC): Grid(1.0, 0, False) for n in wanted.pop(DYNAMIC, [])}
        for kind, nodes in wanted.items():
            inputs = {n.name: str(n.args[0]) for n in nodes}
            names = dict.fromkeys(inputs.values())
            method = self.step.ranges or usual_method(ACTIVATIONS[kind].bits)
            made = activation_grids(self.network, self.task, {n: [n] for n in names},
                                    dict.fromkeys(names, ACTIVATIONS[kind]), method, self.step.calibration_batches)
            found |= {(name, kind): made[given] for name, given in inputs.items()}
        return found

    def _copied(self, name: str) -> str:
        """A copy of what a call reads, for this call alone, so that it can be tapped."""
        node = self.network.node(name)
        given = node.args[0]
        assert isinstance(given, Node)
        copy = insert_call(self.network, aten.alias.default, (given,), before=node, like=node)
        node.args = (copy, *node.args[1:])
        self.network.changed()
        return copy.name

    def rounded(self, layer: LayerForm) -> Tensor:
        """The layer's weight on its grid."""
        stored = layer.stored
        weight = self.network.tensor(stored.weight).detach()
        if stored.kind in HALVES:
            return weight.to(HALVES[stored.kind]).to(weight.dtype)
        scale = weight_scales(self.network, [layer], self.step.weight_ranges)[stored.weight].to(weight.device)
        spread = stored.spread(scale, weight.shape)
        zero = torch.zeros((), dtype=torch.int32, device=weight.device)
        return grids.fake_quantize(weight.double(), spread, zero, GRIDS[stored.kind]).to(weight.dtype)

    @contextmanager
    def put(self, layer: LayerForm) -> Iterator[None]:
        """For a while, the layer alone is in its other form."""
        made = self.rounded(layer)
        taps: dict[str, Callable[[Any], Any]] = {n: lambda w: made for n in self.weights[layer.stored.weight]}
        for node in layer.nodes:
            grid = self.grids.get((node.name, str(layer.activations)))
            if grid is not None:
                taps[self.read[node.name]] = rounder(Point(node.name, grid.scale, grid.zero_point, (),
                                                           str(layer.activations), grid.signed))
        with self.network.taps(taps):
            yield

    def each(self, measure: Measure) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for name, mine in self.choices.items():
            for kind, layer in mine.items():
                with self.put(layer), torch.no_grad():
                    found.setdefault(name, {})[kind] = measure()
        return found


__all__ = ["FLOAT", "Bench", "Damage", "Forms", "Judge", "check_forms", "damages", "forms", "sensitivity", "together"]
