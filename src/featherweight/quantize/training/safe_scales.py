"""Scales of weights that are trained, held as large as sums of products ask for (``quantize/sums``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from featherweight.network import Network
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.placement import Placement
from featherweight.quantize.ranges import Tops, watched
from featherweight.quantize.store import Point
from featherweight.quantize.sums import channel_axes, unsaturated
from featherweight.quantize.training.quantizers import Quantizer
from featherweight.task import Task

#: shares of the training at which the least scales are found anew; at the last, what is read is looked at anew too
CHECKS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class SafeScales:
    """The trained layers, and the calls that compute on integers."""

    found: list[LayerForm]
    placed: Placement

    def hold(self, network: Network, quantizers: Mapping[str, Quantizer], points: tuple[Point, ...],
             tops: Tops) -> None:
        """No scale becomes smaller from now on than the weights, as they are now, and activations on these ``points``
        ask for; ``tops`` says how far these reach."""
        weights = {f.stored.weight: network.tensor(f.stored.weight).detach() for f in self.found}
        scales = {f.stored.weight: _flat(f, quantizers[f.stored.weight].scale(weights[f.stored.weight]))
                  for f in self.found}
        grown = unsaturated(lambda name: quantizers[name](weights[name]).detach(), self.found, scales, self.placed,
                            points, tops)
        for layer in self.found:
            name = layer.stored.weight
            if grown[name] is not scales[name] and quantizers[name].holds:
                least = layer.stored.spread(grown[name], weights[name].shape)
                quantizers[name].hold(least.view(quantizers[name].start.shape).to(weights[name].device))

    def reach(self, network: Network, task: Task, names: Mapping[str, str], batches: int | None) -> Tops:
        """How far the channels that calls on integers read reach on calibration data. names: activation's node -> what
        it is called in ``network``, where that is another name."""
        tops = Tops({name: axes for name, axes in channel_axes(network, self.found, self.placed).items()
                     if name in self.placed.points})
        taps: dict[str, Callable[[Tensor], None]] = {
            names.get(name, name): partial(_look, tops, name) for name in tops.axes}
        if taps:
            watched(network, task, taps, batches)
        return tops


def _look(tops: Tops, name: str, value: Tensor) -> None:
    tops.look(name, value.detach())


def _flat(layer: LayerForm, scale: Tensor) -> Tensor:
    return scale.detach().reshape(-1 if layer.stored.axis is not None else ()).cpu()


__all__ = ["CHECKS", "SafeScales"]
