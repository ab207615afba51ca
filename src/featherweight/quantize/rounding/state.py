"""What rounding by data works on: the float network and the one rounded so far, which layers, and their grids.

Layers are rounded in the order of the graph. Each sees the inputs that it gets in the network as rounded so far
(activations rounded at the points too), and aims at what the float network gives at the same place: what went wrong
before is made up for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.calibrate.pair import Pair
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, insert_call
from featherweight.numerics.formats import GRIDS, HALVES
from featherweight.numerics.grids import Spec, fake_quantize
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.store import Point, rounder
from featherweight.steps import Skipped
from featherweight.task import Batch

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightGrid:
    """Where a layer's weights may lie. scale: one per weight, of its shape; kept: False where a weight stays zero."""

    scale: Tensor
    spec: Spec
    kept: Tensor | None


@dataclass(frozen=True)
class Rounding:
    """The layers that are rounded by data, and the float and the rounded network side by side.

    In both networks the readers of a point read a copy of its activation, which is rounded in the second one.
    layers: in graph order, their calls in the float network. grids: by weight's name. points: by name of the copy.
    """

    pair: Pair
    layers: tuple[LayerForm, ...]
    grids: Mapping[str, WeightGrid]
    points: dict[str, Point]

    @property
    def whole(self) -> Network:
        return self.pair.whole.network

    def learned(self, copy: str, scale: float) -> None:
        """Another scale for the point whose copy has this name."""
        self.points[copy] = replace(self.points[copy], scale=scale)
        self.pair.compressed.taps[copy] = rounder(self.points[copy])


def rounding(network: Network, found: list[LayerForm], scales: Mapping[str, Tensor], points: tuple[Point, ...],
             batches: Iterable[Batch]) -> tuple[Rounding, list[Skipped]]:
    """Both networks at their beginning, layers that data cannot round rounded to nearest; and which these are, and why.

    scales: weight's name -> those of its grid; a layer without any is rounded to no grid. No batch is read yet.
    """
    whole = network.copy()
    named = {_copy(whole, p): p for p in points}
    whole.changed()
    pair = Pair.of(whole, batches, taps={name: rounder(p) for name, p in named.items()})
    grids = {f.stored.weight: _grid(whole, f, scales[f.stored.weight]) for f in found if f.stored.weight in scales}
    layers, skipped = [], []
    for layer in found:
        grid = grids.get(layer.stored.weight)
        why = "" if grid is None else _why_not(layer)
        if why is None:
            layers.append(replace(layer, nodes=tuple(pair.whole.order.call(n.name) for n in layer.nodes)))
            continue
        pair.set(layer.stored.weight, _nearest(whole.tensor(layer.stored.weight).detach(), layer, grid))
        skipped += [Skipped(layer.stored.weight, f"rounded to nearest: {why}")] if why else []
    return Rounding(pair, tuple(layers), grids, named), skipped


def _grid(network: Network, layer: LayerForm, scale: Tensor) -> WeightGrid:
    weight = network.tensor(layer.stored.weight).detach()
    names = network.tied_names(layer.stored.weight)
    spread = layer.stored.spread(scale.to(weight.device), weight.shape).expand(weight.shape)
    kept = weight != 0 if network.patterns.keys() & set(names) else None
    return WeightGrid(spread, GRIDS[layer.stored.kind], kept)


def _why_not(layer: LayerForm) -> str | None:
    """Why data cannot round a layer; None where it can."""
    if len(layer.nodes) > 1:
        return "several calls read it"
    if layer.nodes[0].target not in WEIGHTED:
        return f"{layer.nodes[0].target} is no linear or convolution call"
    return None


def _nearest(weight: Tensor, layer: LayerForm, grid: WeightGrid | None) -> Tensor:
    if grid is None:
        return weight.to(HALVES[layer.stored.kind]).to(weight.dtype)
    return fake_quantize(weight, grid.scale, torch.zeros((), dtype=torch.int32, device=weight.device), grid.spec)


def _copy(network: Network, point: Point) -> str:
    """Puts a copy of a point's activation before its readers; its name."""
    node = network.node(point.node)
    copy = insert_call(network, aten.alias.default, (node,), after=node, like=node)
    for reader in point.readers:
        network.node(reader).replace_input_with(node, copy)
    return copy.name
