"""Scales of weights under which integer kernels saturate nowhere, on processors without VNNI instructions too
(``numerics/saturation``).

A channel's scale grows by what the largest activations of the calibration data ask for, and no further: most grow by
nothing, none by more than 2, which is one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.matrices import as_matrix
from featherweight.numerics.formats import DYNAMIC, GRIDS
from featherweight.numerics.saturation import factors
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.placement import Placement
from featherweight.quantize.ranges import Tops
from featherweight.quantize.store import Point

BYTE = 255  #: largest unsigned integer of 8 bits
#: activations may be so many times as far from zero as those of the calibration data
MARGIN = 1.25
#: processors that a file may be made for: whether sums of two products may be left to saturate in 16 bits
DEVICES = {"any": False, "vnni": True}


def channel_axes(network: Network, found: list[LayerForm], placed: Placement) -> dict[str, tuple[int, ...]]:
    """Activation's node -> the axes, counted from the end, of the channels that calls on integers read of it."""
    axes: dict[str, tuple[int, ...]] = {}
    for layer in found:
        for node in layer.nodes:
            if node.name not in placed.kernels:
                continue
            axis = 1 - network.tensor(layer.stored.weight).dim()
            axes[str(node.args[0])] = tuple(dict.fromkeys((*axes.get(str(node.args[0]), ()), axis)))
    return axes


def unsaturated(weights: Callable[[str], Tensor], found: list[LayerForm], scales: Mapping[str, Tensor],
                placed: Placement, points: tuple[Point, ...], tops: Tops) -> dict[str, Tensor]:
    """``scales``, larger where sums would saturate. weights: name -> the weight, before or after rounding. points: the
    grids of the activations; tops: how far their channels reach on calibration data. What is not there is taken to
    reach the end of its grid."""
    grids = {reader: point for point in points for reader in point.readers if reader in placed.kernels}
    made = dict(scales)
    for layer in found:
        name = layer.stored.weight
        for node in layer.nodes:
            if node.name in grids and layer.stored.kind in GRIDS and layer.stored.group is None:
                call = _Call(layer, node, grids[node.name], weights(name).detach().cpu())
                grown = call.factors(scales[name], tops)
                if (grown > 1).any():
                    made[name] = torch.maximum(made[name], (scales[name].double() * grown).float())
    return made


@dataclass(frozen=True)
class _Call:
    """A call that multiplies integers, its weight (before rounding), and the grid of what it reads."""

    layer: LayerForm
    node: Node
    point: Point
    weight: Tensor

    def factors(self, scale: Tensor, tops: Tops) -> Tensor:
        """By what the weight's scales have to grow."""
        stored = self.layer.stored
        steps = as_matrix(self.node, self.weight / stored.spread(scale, self.weight.shape))
        steps = steps.reshape(*steps.shape[:2], -1, self.weight[0, 0].numel()).transpose(2, 3)
        reach = self._reach(tops).expand(len(steps) * steps.shape[3]).view(len(steps), -1)
        found = torch.cat([factors(*group) for group in zip(steps, reach, strict=True)])
        return found.view(-1, scale.numel()).amax(0).view(scale.shape)

    def _reach(self, tops: Tops) -> Tensor:
        """The largest unsigned integer of each input channel, or of all: [channels] or [1]. Kernels add 128 to signed
        integers; padding is the zero point."""
        point, spec = self.point, self.point.spec
        top, largest = tops.found.get((point.node, 1 - self.weight.dim())), torch.tensor([float(spec.highest)])
        if top is not None and point.kind != DYNAMIC:
            largest = torch.round(MARGIN * top.double().cpu() / point.scale) + point.zero_point
        return largest.clamp(point.zero_point, spec.highest) + (BYTE + 1) // 2 * spec.signed


__all__ = ["DEVICES", "channel_axes", "unsaturated"]
