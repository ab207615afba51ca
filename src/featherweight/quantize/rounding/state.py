"""The float network and the one whose weights are rounded, walked through side by side.

Layers are rounded in the order of the graph. Each sees the inputs that it gets in the network as rounded so far (values
rounded at the points too), and aims at what the float network gives at the same place: what went wrong before is made
up for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.calibrate.walk import Half, Order, fitting, input_values
from featherweight.errors import TaskError
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, insert_call
from featherweight.numerics.formats import GRIDS, HALVES
from featherweight.numerics.grids import Spec, fake_quantize
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.store import Point, rounder
from featherweight.steps import Skipped
from featherweight.task import Task

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightGrid:
    """Where a layer's weights may lie: scale, one per weight, of its shape; kept: False where a weight stays zero."""

    scale: Tensor
    spec: Spec
    kept: Tensor | None


#: one batch in the float network, and in the one rounded so far
Pair = tuple[Half, Half]


class Walk:
    """The float network and the one rounded so far, all samples at the same place. In both graphs the readers of a
    point read a copy of its value, which is rounded in the second."""

    def __init__(self, network: Network, found: list[LayerForm], scales: Mapping[str, Tensor],
                 points: tuple[Point, ...]):
        self.whole = network.copy().eval()
        self.points = {_copy(self.whole, p): p for p in points}
        self.whole.changed()
        self.short = self.whole.copy()
        self.taps = {name: rounder(p) for name, p in self.points.items()}
        self.order = Order(self.whole)
        self.grids = {f.stored.weight: self._grid(f, scales[f.stored.weight]) for f in found
                      if f.stored.weight in scales}
        self.layers: list[LayerForm] = []
        self.skipped: list[Skipped] = []
        for layer in found:
            why = self._why_not(layer)
            if why is None:
                self.layers.append(replace(layer, nodes=tuple(self.order.named[n.name] for n in layer.nodes)))
            elif why:
                self.skipped.append(Skipped(layer.stored.weight, f"rounded to nearest: {why}"))
            if why is not None:
                self.set(layer.stored.weight, self._nearest(layer))
        self.states: list[Pair] = []

    def _grid(self, layer: LayerForm, scale: Tensor) -> WeightGrid:
        weight = self.whole.tensor(layer.stored.weight).detach()
        names = self.whole.tied_names(layer.stored.weight)
        spread = layer.stored.spread(scale.to(weight.device), weight.shape).expand(weight.shape)
        kept = weight != 0 if self.whole.patterns.keys() & set(names) else None
        return WeightGrid(spread, GRIDS[layer.stored.kind], kept)

    def _why_not(self, layer: LayerForm) -> str | None:
        """None where a layer can be rounded by data; nothing to say where it is not rounded to a grid."""
        if layer.stored.weight not in self.grids:
            return ""
        if len(layer.nodes) > 1:
            return "several calls read it"
        if layer.nodes[0].target not in WEIGHTED:
            return f"{layer.nodes[0].target} is no linear or convolution call"
        return None

    def _nearest(self, layer: LayerForm) -> Tensor:
        weight = self.whole.tensor(layer.stored.weight).detach()
        if layer.stored.kind in HALVES:
            return weight.to(HALVES[layer.stored.kind]).to(weight.dtype)
        grid = self.grids[layer.stored.weight]
        return fake_quantize(weight, grid.scale, torch.zeros((), dtype=torch.int32, device=weight.device), grid.spec)

    def set(self, name: str, value: Tensor) -> None:
        self.short.set_tensor(name, value.to(self.short.tensor(name)))

    def learned(self, point: str, scale: float) -> None:
        """Another scale for the point that the copy ``point`` rounds."""
        self.points[point] = replace(self.points[point], scale=scale)
        self.taps[point] = rounder(self.points[point])

    # ---- data
    def start(self, task: Task, limit: int | None) -> None:
        """All batches at the beginning, as many as there is room for."""
        needed = max(self.order.held(index) for index in range(1, len(self.order.calls) + 1))
        # in both networks, and once more for what is wanted in between
        batches, said = fitting(task.batches("calibration", limit), 3 * needed)
        if said:
            self.skipped.append(Skipped("calibration", f"weights are rounded by a part of it: {said}"))
        for inputs in batches:
            values = input_values(self.whole, inputs)
            self.states.append((Half(self.whole, self.order, dict(values)),
                                Half(self.short, self.order, dict(values), taps=self.taps)))
        if not self.states:
            raise TaskError("the calibration split is empty; rounding that looks at data needs it: "
                            "Task(calibration=lambda: my_batches, ...)")

    def ahead(self) -> list[Pair]:
        """Where the batches are now, to go ahead from there and come back."""
        return [(whole.split(), short.split()) for whole, short in self.states]


def advance(states: list[Pair], until: int, wanted: set[str]) -> None:
    """Both networks go up to call number ``until``, and keep what is ``wanted``."""
    for half in (half for pair in states for half in pair):
        half.advance(until, wanted)


def _copy(network: Network, point: Point) -> str:
    """Puts a copy of a point's value before its readers; its name."""
    node = network.node(point.node)
    copy = insert_call(network, aten.alias.default, (node,), after=node, like=node)
    for reader in point.readers:
        network.node(reader).replace_input_with(node, copy)
    return copy.name
