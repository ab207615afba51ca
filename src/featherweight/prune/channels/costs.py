"""What a cut network costs: MACs, parameters or bytes, as a function of the atoms that stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from featherweight.axes.groups import AxisGroup, AxisGroups
from featherweight.axes.labels import AtomSets
from featherweight.measure.macs import macs as count_macs
from featherweight.measure.weights import params as count_params
from featherweight.network import Network

#: kept atoms (bool, as ``kept_atoms`` gives them) -> what the network that keeps them costs
Cost = Callable[[npt.NDArray[np.bool_]], float]


def macs(network: Network, axes: AxisGroups) -> Cost:
    """Multiply-accumulates for one sample, those included that no channel has a share in."""
    rest = count_macs(network).total - axes.macs(everything(axes))
    return lambda kept: rest + axes.macs(kept)


def params(network: Network, axes: AxisGroups) -> Cost:
    """Number of parameters."""
    own = {n: 1 for n in axes.tensors if isinstance(network.tensor(n), nn.Parameter)}
    return _elements(axes, {n: network.tensor(n) for n in axes.tensors}, own, count_params(network))


def weight_bytes(network: Network, axes: AxisGroups) -> Cost:
    """Bytes of all stored tensors in their number types, buffers included, tied ones once. An index that a cut adds
    where the channels left make no regular pattern is not counted."""
    tensors = {id(t): t for t in network.tensors().values()}.values()
    sizes = {n: network.tensor(n).element_size() for n in axes.tensors}
    return _elements(axes, {n: network.tensor(n) for n in axes.tensors}, sizes,
                     sum(t.numel() * t.element_size() for t in tensors))


def _elements(axes: AxisGroups, tensors: dict[str, Tensor], each: dict[str, int], total: float) -> Cost:
    """``total`` less what the cut takes: elements of every tensor, times ``each``."""
    labelled = {n: [a for a in axes.tensors[n] if a is not None] for n in each}
    fixed = {n: math.prod(s for s, a in zip(tensors[n].shape, axes.tensors[n], strict=True) if a is None) for n in each}
    sets = AtomSets([a for own in labelled.values() for a in own])

    def size(kept: npt.NDArray[np.bool_]) -> float:
        counts = iter(sets.count(kept))
        return float(sum(each[n] * fixed[n] * math.prod(next(counts) for _ in own) for n, own in labelled.items()))

    rest = total - size(everything(axes))
    return lambda kept: rest + size(kept)


def everything(axes: AxisGroups) -> npt.NDArray[np.bool_]:
    """Every atom stays."""
    return np.ones(axes.component.shape, dtype=bool)


def saved_each(axes: AxisGroups, groups: Sequence[AxisGroup], cost: Cost) -> list[float]:
    """What one channel of each group saves, on average, when half of the group goes and all others stay; above 0."""
    full, found = cost(everything(axes)), []
    for group in groups:
        out = len(group) - len(group) // 2
        stays = np.ones(int(axes.component.max()) + 1, dtype=bool)
        stays[group.components[:out]] = False
        found.append((full - cost(stays[axes.component])) / out)
    least = 1e-9 * max([abs(full), *found], default=1.0)
    return [max(f, least) for f in found]


#: what a ``Channels`` step may ask a fraction of -> how it is counted; latency is a table of its own (``latency.py``)
COSTS: dict[str, Callable[[Network, AxisGroups], Cost]] = {"macs": macs, "params": params, "bytes": weight_bytes}
#: the fields of a ``Channels`` step that say what fraction shall remain
TARGETS = (*COSTS, "latency", "ratio")
