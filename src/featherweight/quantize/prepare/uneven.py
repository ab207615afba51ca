"""Whether the channels of an activation, or parts of it, differ so much that one grid serves them badly."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.deploy.kernels import CLAMPS, SPLITTERS
from featherweight.network import Network
from featherweight.network.matrices import as_matrix
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.placement import Placement, carried, placement
from featherweight.quantize.ranges import Tops, watched
from featherweight.quantize.request import Request
from featherweight.task import Task

aten = torch.ops.aten

#: so many times the rounding error of even channels is worth a look at equalization: four bits are lost
UNEVEN = 16.0
BATCHES = 4  #: of calibration data, at most, that parts of activations are looked at on
#: operators that give a part of what they read
PARTS = {aten.slice.Tensor, aten.select.int, aten.index_select.default, operator.getitem}


def unevenness(calls: Iterable[tuple[Node, Tensor]], tops: Tops) -> float:
    """How many times larger the rounding error of a call's input is, beside what the call gives, than if all channels
    reached as far; of the worst call, 1 or more.

    calls: (call, its weight). One step for all channels gives each the same error, weighed by the norm of the weights
    that read it: with reach r_c and norm n_c, sqrt(max(r)^2 sum(n_c^2) / sum(r_c^2 n_c^2)).
    """
    worst = 1.0
    for node, weight in calls:
        key = str(node.args[0]), 1 - weight.dim()
        if key not in tops.found:
            continue
        reach = tops.reach(key).double().cpu()
        groups = as_matrix(node, weight).detach().double().cpu().square()
        norms = groups.reshape(*groups.shape[:2], -1, weight[0, 0].numel()).sum((1, 3)).flatten()
        given = float((reach.square() * norms).sum())
        if given > 0:
            worst = max(worst, math.sqrt(float(reach.max()) ** 2 * float(norms.sum()) / given))
    return worst


def evenly_placed(folded: Network, task: Task, found: Sequence[LayerForm], request: Request) -> Placement:
    """Where activations are rounded. Sums and the like stay float where a part of what shares their grid is read alone
    and reaches UNEVEN times less far than all of it: class tokens beside others (CaiT, XCiT), which add little work."""
    apart: set[str] = set()
    while True:
        placed = placement(folded, found, request, apart)
        more = _overshadowing(folded, task, placed, apart) - apart
        if not more:
            return placed
        apart |= more


def _overshadowing(network: Network, task: Task, placed: Placement, apart: Collection[str]) -> set[str]:
    """The joiners on grids that serve a part badly, also where it is read alone behind sums that stay float already."""
    shared = set(placed.joiners.values())
    points = {name: leader for name, leader in placed.points.items() if leader in shared}
    parts = {part.name: leader for name, leader in points.items() for part in _parts(network.node(name), apart)}
    if not parts:
        return set()
    reach: dict[str, float] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        def tap(value: Tensor) -> None:
            reach[name] = max(reach.get(name, 0.0), float(value.detach().abs().max()) if value.numel() else 0.0)

        return tap

    watched(network, task, {name: watch(name) for name in points.keys() | parts.keys()}, BATCHES)
    whole: dict[str, float] = {}
    for name, leader in points.items():
        whole[leader] = max(whole.get(leader, 0.0), reach[name])
    bad = {leader for part, leader in parts.items() if 0 < reach[part] * UNEVEN < whole[leader]}
    return {joiner for joiner, leader in placed.joiners.items() if leader in bad}


def _parts(node: Node, sums: Collection[str]) -> Iterator[Node]:
    """The parts of an activation that are read, however it is moved before, and whatever these ``sums`` add to it."""
    for user in node.users:
        if user.target in PARTS and (user.target is not operator.getitem or node.target in SPLITTERS):
            yield user
        elif user.target in SPLITTERS or user.name in sums or (user.target not in CLAMPS and node in carried(user)):
            yield from _parts(user, sums)


__all__ = ["UNEVEN", "evenly_placed", "unevenness"]
