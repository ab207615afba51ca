"""Measured latency per layer and width: what a cut is worth in the runtime that the network will live in.

Every distinct convolution or linear call is exported alone, at a few widths of the axes that channels sit in, and
timed; the latency of any cut is the sum over calls, interpolated between the measured widths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.fx import Node

from featherweight.axes.groups import AxisGroups
from featherweight.axes.labels import Ints
from featherweight.judge.elsewhere import TimesElsewhere, times_of
from featherweight.judge.layer_times import TimedLayer, Timer, Times
from featherweight.network import Network
from featherweight.network.edit import CONVOLUTIONS, bias_name, turned, weight_name
from featherweight.network.layers import path_of, select
from featherweight.network.operators import schema_argument
from featherweight.steps import Skipped

#: shares of an axis that are measured
SHARES = (0.25, 0.5, 1.0)
#: differences of width that are tried, to find those that make a layer faster
STEPS = (1, 4, 8, 16)
#: where times of layers come from
Table = Times | TimesElsewhere


@dataclass(frozen=True)
class Timing:
    """Latency of one call of the network: ``seconds`` at every combination of the ``widths`` of its weight's ``dims``,
    and the ``step`` of width below which it does not get faster."""

    node: str
    weight: str
    dims: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    seconds: npt.NDArray[np.float64]
    step: int = 1

    def at(self, lengths: Sequence[int]) -> float:
        """Interpolated along one axis after the other; below the least width, on towards zero."""
        values = self.seconds
        for own, length in zip(reversed(self.widths), reversed(list(lengths)), strict=True):
            lines = values.reshape(-1, len(own))
            values = np.array([_between(own, line, length) for line in lines]).reshape(values.shape[:-1])
        return float(values)


def _between(widths: Sequence[int], values: npt.NDArray[np.float64], length: int) -> float:
    if length >= widths[0]:
        return float(np.interp(length, widths, values))
    slope = (values[1] - values[0]) / (widths[1] - widths[0]) if len(widths) > 1 else values[0] / widths[0]
    return float(max(values[0] - max(slope, 0.0) * (widths[0] - length), 0.0))


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of the convolution and linear calls of a network in ``target``, batch of one.

    Other operators are not in it, nor what a runtime gains by fusing calls. ``skipped``: calls that could not be
    measured, and why.
    """

    axes: AxisGroups
    timings: tuple[Timing, ...]
    target: str
    threads: int
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def measure(cls, network: Network, axes: AxisGroups, target: str = "onnxruntime", threads: int = 1,
                path: str | Path | None = None, shares: Sequence[float] = SHARES,
                timer: Timer | None = None, times: str | Path | None = None) -> LatencyTable:
        """Times every distinct layer at ``shares`` of its axes that hold channels.

        path: a JSON file with what was measured before, on this kind of machine and with these versions; new
        measurements are added to it as they are taken, by several processes at once if need be. By default
        latency.json in $FEATHERWEIGHT_CACHE, else in ~/.cache/featherweight.
        times: the folder of another device, in the place of this machine (``judge/elsewhere``).
        Raises ExportError if there is no such target, Untimed for layers that the other device did not time.
        """
        file = times_of(target, threads, times, Path(path) if path is not None else None, timer)
        layers, skipped = timed_layers(network)
        free = _free(axes)
        timings: dict[str, Timing] = {}
        for node, layer in layers.items():
            name = str(weight_name(network.node(node)))
            name = next(n for n in network.tied_names(name) if n in axes.tensors)
            dims = tuple(d for d, a in enumerate(axes.tensors[name]) if a is not None and bool(free[a].any()))
            dims = dims[:1] if layer.groups > 1 and not layer.keeps_groups() else dims
            timings[node] = _timing(node, name, layer, dims, shares, file)
        found = _stepped(timings, layers, file)
        file.settled()
        return cls(axes, found, target, threads, tuple(skipped))

    def cost(self, kept: npt.NDArray[np.bool_]) -> float:
        """Seconds of the network that keeps the atoms ``kept``, as ``kept_atoms`` gives them."""
        return sum(t.at([int(np.count_nonzero(kept[self._atoms(t.weight, d)])) for d in t.dims]) for t in self.timings)

    def steps(self) -> dict[tuple[str, int], int]:
        """(weight, axis) -> its lengths that are worth having are multiples of this."""
        return {(t.weight, d): t.step for t in self.timings for d in t.dims}

    def _atoms(self, weight: str, dim: int) -> Ints:
        atoms = self.axes.tensors[weight][dim]
        assert atoms is not None
        return atoms


def _free(axes: AxisGroups) -> npt.NDArray[np.bool_]:
    """[atoms]: it is in a group that can be cut."""
    free = np.zeros(int(axes.component.max(initial=-1)) + 1, dtype=bool)
    for group in axes.groups:
        free[group.components] = True
    found: npt.NDArray[np.bool_] = free[axes.component]
    return found


def timed_layers(network: Network) -> tuple[dict[str, TimedLayer], list[Skipped]]:
    """Node -> the layer that it computes; and calls that are none."""
    values, selected = network.values(1), select(network)
    found, left = {}, list(selected.skipped)
    for node in (n for layer in selected.layers for n in layer.calls):
        shape, x = tuple(network.tensor(str(weight_name(node))).shape), values[str(node.args[0])]
        options: list[tuple[str, Any]] = []
        if node.target in CONVOLUTIONS:
            options = _options(node)
            if any(isinstance(v, Node) for _, o in options for v in (o if isinstance(o, tuple) else [o])):
                left.append(Skipped(path_of(node), "its options are computed: its latency was not measured"))
                continue
        channel = (1 if x.dim() == len(shape) else 0) if options else x.dim() - 1
        size = tuple(int(s) for d, s in enumerate(x.shape) if d != channel and (d > 0 or not options))
        found[node.name] = TimedLayer(str(node.target), shape, size, _has_bias(node), tuple(options), turned(node))
    return found, left


def timed_chains(network: Network) -> list[TimedLayer]:
    """The layers of ``timed_layers``, those that only read one another as one."""
    timed, found = timed_layers(network)[0], dict[str, list[TimedLayer]]()
    for node in (n for n in network.calls() if n.name in timed):
        before = node.args[0]
        only = before.name if isinstance(before, Node) and len(before.users) == 1 else ""
        found[node.name] = [*found.pop(only, []), timed[node.name]]
    return [replace(first, then=tuple(rest)) for first, *rest in found.values()]


def _has_bias(node: Node) -> bool:
    return bias_name(node) is not None or (len(node.args) > 2 and node.args[2] is not None)


def _options(node: Node) -> list[tuple[str, Any]]:
    names = [a.name for a in node.target._schema.arguments][3:]  # type: ignore[union-attr]
    return [(n, tuple(v) if isinstance(v := schema_argument(node, n), (list, tuple)) else v) for n in names]


def _timing(node: str, weight: str, layer: TimedLayer, dims: tuple[int, ...], shares: Sequence[float],
            file: Table) -> Timing:
    """Measures one layer on a grid of widths."""
    widths = [_grid(layer.weight[d], shares, _unit(layer, d)) for d in dims]
    grid = [layer.at(dict(zip(dims, w, strict=True))) for w in itertools.product(*widths)]
    seconds = np.array(file.times(grid), dtype=np.float64).reshape([len(w) for w in widths])
    return Timing(node, weight, dims, tuple(tuple(w) for w in widths), seconds)


def _grid(length: int, shares: Sequence[float], unit: int) -> list[int]:
    """Widths near these shares of ``length``, in multiples of 16 or of 8 where there is room for some."""
    step = next((s for s in (16, 8) if length >= 4 * s), 1)
    step = math.lcm(step, unit)
    return sorted({min(max(round(length * s / step), 1) * step, length) for s in shares} | {length})


def _unit(layer: TimedLayer, dim: int) -> int:
    """Positions of one axis of the weight that a grouped convolution can only lose together."""
    if dim or layer.groups == 1:
        return 1
    return layer.groups if layer.keeps_groups() else layer.weight[0] // layer.groups


def _stepped(timings: Mapping[str, Timing], layers: Mapping[str, TimedLayer], file: Table) -> tuple[Timing, ...]:
    """The timings with their steps of width, which are looked for in the slowest layer of every kind."""
    slowest: dict[tuple[str, bool], str] = {}
    kinds = {n: (layer.operator, layer.groups > 1) for n, layer in layers.items()}
    for node, timing in timings.items():
        room = timing.dims and all(layers[node].weight[d] >= 32 and _unit(layers[node], d) == 1 for d in timing.dims)
        other = slowest.get(kinds[node])
        if room and (other is None or timing.seconds.max() > timings[other].seconds.max()):
            slowest[kinds[node]] = node
    steps = {kind: _step(layers[n], timings[n].dims, file) for kind, n in slowest.items()}
    return tuple(replace(t, step=steps.get(kinds[n], 1)) for n, t in timings.items())


def _step(layer: TimedLayer, dims: tuple[int, ...], file: Table) -> int:
    """The least of STEPS by which all axes must get shorter, from a multiple of 32, to save at least half of what the
    arithmetic does; the largest if none does."""
    start = {d: max(32, layer.weight[d] // 2 // 32 * 32) for d in dims}
    tried = [{d: w - s for d, w in start.items()} for s in STEPS]
    first, *others = file.times([layer.at(start), *(layer.at(t) for t in tried)])
    for step, widths, seconds in zip(STEPS, tried, others, strict=True):
        share = math.prod(widths[d] / start[d] for d in dims)
        if seconds < first * (1 - (1 - share) / 2):
            return step
    return max(STEPS)
