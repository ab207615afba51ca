"""Quantization-aware training: a network trains as the whole-number network that it will be.

Batch norm stays in the graph while weights are rounded before it: at the end it is folded, and a channel's scale takes
its factor, so that the numbers stay those that were trained. The first and last calls train on the grids of ``ends``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.network import Network, fold_batch_norm
from featherweight.network.fold import along_output, norm_scale
from featherweight.network.surgery import insert_call
from featherweight.numerics.grids import SMALLEST_SCALE
from featherweight.quantize import post
from featherweight.quantize.fake import LEARNERS, Quantizer
from featherweight.quantize.formats import GRIDS
from featherweight.quantize.layers import Layer, layers, weight_axis
from featherweight.quantize.store import Point, Stored, scale_name
from featherweight.seeds import generators_kept
from featherweight.steps import Driver, Skipped
from featherweight.task import Task

if TYPE_CHECKING:
    from featherweight.quantize.steps import Quantize, QuantizePlan

aten = torch.ops.aten


class Training(Driver):
    """A ``Quantize`` at work in a Fit: taps on weights, and on copies of the values that kernels read."""

    def __init__(self, step: Quantize, network: Network, task: Task) -> None:
        self.step, self.network = step, network
        with generators_kept(), torch.no_grad():
            folded = fold_batch_norm(network).eval()
            self.norms = folded_norms(network, folded)
            found, self.skipped = layers(folded, step.wish())
            self.found = [f for f in found if f.stored.kind in GRIDS]
            self.skipped += [Skipped(f.stored.weight, f"{f.stored.kind} is not trained; write Quantize after Train")
                             for f in found if f.stored.kind not in GRIDS]
            placed = step.placed(folded, self.found)
            self.skipped += placed.skipped
            self.points = post.points(step, folded, task, placed, self.found)
            scales = post.weight_scales(network, self.found, step.weight_ranges)
        self.leaders = placed.points
        make_weight, make_value = LEARNERS[step.learn]
        self.weights = {f.stored.weight: self._weight(f, scales[f.stored.weight], make_weight) for f in self.found}
        self.values: dict[str, Quantizer] = {}
        self.taps: list[Callable[[], None]] = []
        for layer in self.found:
            self._hold(layer)
        for point in self.points:
            self._round(point, make_value)
        network.changed()

    def _weight(self, layer: Layer, scale: Tensor, make: Callable[..., Quantizer]) -> Quantizer:
        stored = layer.stored
        weight = self.network.tensor(stored.weight)
        if stored.group is not None:
            raise RecipeError(f"granularity={stored.group} cannot be used during training; write granularity='channel' "
                              "or 'tensor', or put Quantize after Train")
        return make(GRIDS[stored.kind], stored.spread(scale, weight.shape).to(weight.device))

    def _hold(self, layer: Layer) -> None:
        names = self.network.tied_names(layer.stored.weight)
        quantizer = self.weights[layer.stored.weight]
        for node in self.network.graph.nodes:
            if node.op == "get_attr" and node.target in names:
                self.taps.append(self.network.add_tap(node.name, quantizer))

    def _round(self, point: Point, make: Callable[..., Quantizer]) -> None:
        """A copy of the point's value for its readers, tapped; points on one grid share one quantizer. In the training
        graph a batch norm gives what the call before it gives in the folded one."""
        node = self.network.node(self.norms.get(point.node, point.node))
        leader = self.leaders[point.node]
        if leader not in self.values:
            device = next(iter(self.network.tensors().values())).device
            self.values[leader] = make(point.spec, torch.tensor(point.scale, device=device), point.zero_point,
                                       values=True)
        copy = insert_call(self.network, aten.alias.default, (node,), after=node, like=node)
        for reader in point.readers:
            self.network.node(reader).replace_input_with(node, copy)
        self.taps.append(self.network.add_tap(copy.name, self.values[leader]))

    # ---- Driver
    def update(self, progress: float) -> None:
        for quantizer in (*self.weights.values(), *self.values.values()):
            quantizer.progress(progress)

    def parameters(self) -> list[Tensor]:
        return [t for q in (*self.weights.values(), *self.values.values()) for t in q.own]

    def finish(self) -> QuantizePlan:
        """The numbers that were trained, on the grids that were trained, with batch norm folded into the scales."""
        from featherweight.quantize.steps import QuantizePlan

        for remove in self.taps:
            remove()
        tensors: dict[str, Tensor] = {}
        stored = []
        with torch.no_grad():
            for layer in self.found:
                made, value, scale = self._settled(layer)
                stored.append(made)
                tensors |= {made.weight: value, scale_name(made.weight): scale}
        points = tuple(replace(p, scale=float(self.values[self.leaders[p.node]].scale(torch.empty(0))))
                       for p in self.points)
        return QuantizePlan(tuple(stored), points, tuple(sorted(s.weight for s in stored)),
                            skipped=tuple(dict.fromkeys(self.skipped)), tensors=tensors,
                            grows=self.step.grows(self.network, self.found, points))

    def _settled(self, layer: Layer) -> tuple[Stored, Tensor, Tensor]:
        """How a weight is stored, its values and its scales, once batch norm is folded."""
        stored, quantizer = layer.stored, self.weights[layer.stored.weight]
        weight = self.network.tensor(stored.weight).detach()
        value, scale = quantizer(weight).double(), quantizer.scale(weight).double()
        norm = self.norms.get(layer.nodes[0].name)
        if norm is None:
            return stored, value.float(), scale.reshape(-1 if stored.axis is not None else ()).float()
        stored = replace(stored, axis=weight_axis(layer.nodes[0]))
        channel = norm_scale(self.network, self.network.node(norm))
        factor = along_output(layer.nodes[0], channel, weight)
        return stored, (value * factor).float(), self._per_channel(stored, scale * factor.abs(), weight)

    def _per_channel(self, stored: Stored, scale: Tensor, weight: Tensor) -> Tensor:
        whole = scale.expand(weight.shape)
        return whole.movedim(int(stored.axis or 0), 0).flatten(1)[:, 0].clamp(min=SMALLEST_SCALE).float()


def folded_norms(network: Network, folded: Network) -> dict[str, str]:
    """Call's name -> the batch norm that is folded into it."""
    left = {n.name for n in folded.calls(aten.batch_norm.default)}
    return {str(n.args[0]): n.name for n in network.calls(aten.batch_norm.default) if n.name not in left}
