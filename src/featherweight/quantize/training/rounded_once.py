"""Values that are carried from one rounding to the next: where training rounds them.

A stored network rounds wherever a runtime wants to read integers: a value, then what a max pool takes of it, then
that once flattened. To numbers that lie on the grid already this does nothing. To gradients it does: they are stopped
at the ends of the grid, and where one bit is left every number lies at an end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.fx import Node

from featherweight.deploy.kernels import CLAMPS, SHARING, upper_end
from featherweight.network import Network
from featherweight.numerics.formats import DYNAMIC
from featherweight.quantize.placement import carried
from featherweight.quantize.store import Point

aten = torch.ops.aten


def rounded_once(network: Network, copies: Mapping[str, Point]) -> list[str]:
    """Which of the calls named in ``copies``, that copy an activation to round it, have to do so in training; in order.

    Not those whose activation was only carried on since it was rounded. A max pool is rounded behind it instead of
    before: the numbers are the same, and gradients go to what was largest before it was rounded (Rastegari et al. 2016,
    section 3.2, which pools before signs are taken for this reason)."""
    needed: list[str] = []
    lies: dict[Node, Point | None] = {}  # the grid that a value lies on
    for node in network.calls():
        point, lies[node] = copies.get(node.name), _kept(node, lies)
        if point is not None and not _same(point, lies[node]):
            if _pooled(node, copies):
                lies[node] = None
            else:
                lies[node] = point
                needed.append(node.name)
    return needed


def _kept(node: Node, lies: Mapping[Node, Point | None]) -> Point | None:
    """The grid that a call's activation lies on because what it carries does. (What dropout leaves is larger in
    training, and is read so.)"""
    if node.target in CLAMPS and math.isfinite(upper_end(node)):
        return None
    given: list[Node] = list(node.args[0]) if node.target in SHARING else carried(node)  # type: ignore[arg-type]
    grids = [lies.get(n) for n in given]
    first = grids[0] if grids else None
    return first if first is not None and all(_same(first, grid) for grid in grids) else None


def _same(one: Point, other: Point | None) -> bool:
    """Whether two points round to one grid, which no value moves."""
    return (other is not None and one.kind != DYNAMIC
            and (one.scale, one.zero_point, one.spec) == (other.scale, other.zero_point, other.spec))


def _pooled(copy: Node, copies: Mapping[str, Point]) -> bool:
    """Whether a max pool alone reads a copy, and the pool's value is read rounded to the same grid only."""
    pool, *others = copy.users
    return not others and pool.target is aten.max_pool2d.default and all(
        _same(copies[copy.name], copies.get(user.name)) for user in pool.users)


__all__ = ["rounded_once"]
