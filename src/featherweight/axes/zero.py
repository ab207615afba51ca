"""Zeroing channels instead of cutting them: the slow second implementation that every cut is held against.

Everything that a cut takes away is zero, readers' columns included, so that sums over weights come out as in the cut
network. Where channels are averaged, normalized or multiplied with one another, zeros would still count: what such a
call computes after a cut is *defined* over the channels that are kept. In the zero network these calls read the kept
channels only, and give zeros for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from featherweight.axes.groups import AxisGroups
from featherweight.axes.literals import MENDS, Cut
from featherweight.axes.rules.basics import operators
from featherweight.axes.rules.norms import REDUCTIONS, reduced_dims
from featherweight.network import Network
from featherweight.network.edit import insert_call
from featherweight.network.operators import schema_argument as argument
from featherweight.network.operators import set_schema_argument

aten = torch.ops.aten
#: (the argument's name, its axis, the same axis of the result or None if the call sums it away)
Place = tuple[str, int, int | None]
#: operator -> the axes over which a call mixes channels without a weight
MIXES: dict[Any, Callable[[Cut, Node], list[Place]]] = {}


def zero(network: Network, axes: AxisGroups, kept: np.ndarray) -> Network:
    """A copy in which everything that ``cut`` would take away is zero: every tensor keeps its shape, and the outputs
    are those of the cut network. ``kept`` [atoms] bool: what stays."""
    other = network.copy()
    for name, atoms in axes.tensors.items():
        value = other.tensor(name).detach().clone()
        touched = False
        for dim, own in enumerate(atoms):
            if own is not None and not kept[own].all():
                value.index_fill_(dim, torch.from_numpy(np.flatnonzero(~kept[own])).to(value.device), 0)
                touched = True
        if touched:
            other.set_tensor(name, value)
    work = Cut(other, axes, kept)
    found = [(n, _short(work, n)) for n in other.graph.nodes if n.op == "call_function" and n.target in MIXES]
    for node, places in found:
        if places and node.target in MENDS:
            MENDS[node.target](work, node)
    for node, places in found:
        _over_kept(work, node, places)
    other.changed()
    return other


def _short(cut: Cut, node: Node) -> list[tuple[Place, np.ndarray]]:
    """The axes that a call mixes and of which some positions are cut, with those that stay."""
    found = [(p, cut.stays(cut.labels(argument(node, p[0])), p[1])) for p in MIXES[node.target](cut, node)]
    return [(p, stays) for p, stays in found if not stays.all()]


def _over_kept(cut: Cut, node: Node, places: list[tuple[Place, np.ndarray]]) -> None:
    """Lets a call read the kept positions of the axes that it mixes, and spreads its result over all positions."""
    spread: dict[int, np.ndarray] = {}
    for (name, dim, there), stays in places:
        index = _stored(cut, node, f"{name}{dim}", np.flatnonzero(stays))
        given = insert_call(cut.network, aten.index_select.default, (argument(node, name), dim, index), before=node)
        set_schema_argument(node, name, given)
        if there is not None:
            spread[there] = stays
    for dim, stays in spread.items():
        _spread(cut, node, dim, stays)


def _spread(cut: Cut, node: Node, dim: int, stays: np.ndarray) -> None:
    """Puts the result's positions where they were, with zeros between: padded by one zero, which all others take."""
    where = np.where(stays, np.cumsum(stays) - 1, stays.sum())
    index = _stored(cut, node, f"back{dim}", where)
    users, widths = list(node.users), [0, 0] * (len(cut.labels(node).shape) - 1 - dim) + [0, 1]
    padded = insert_call(cut.network, aten.constant_pad_nd.default, (node, widths, 0), after=index)
    whole = insert_call(cut.network, aten.index_select.default, (padded, dim, index), after=padded)
    for user in users:
        user.replace_input_with(node, whole)


def _stored(cut: Cut, node: Node, what: str, index: np.ndarray) -> Node:
    name = f"{node.name}_{what}"
    cut.network.add_tensor(name, torch.from_numpy(index), buffer=True, persistent=False)
    place = cut.network.graph.inserting_after(node) if what.startswith("back") else \
        cut.network.graph.inserting_before(node)
    with place:
        made: Node = cut.network.graph.create_node("get_attr", name)
    return made


def mixes(*names: str) -> Callable[[Callable[[Cut, Node], list[Place]]], Callable[[Cut, Node], list[Place]]]:
    """Enters a function into the table for these operators."""

    def enter(function: Callable[[Cut, Node], list[Place]]) -> Callable[[Cut, Node], list[Place]]:
        MIXES.update(dict.fromkeys(operators(*names), function))
        return function

    return enter


@mixes("layer_norm", "rms_norm")
def layer_norm(cut: Cut, node: Node) -> list[Place]:
    count, rank = len(argument(node, "normalized_shape")), len(cut.labels(node.args[0]).shape)
    found: list[Place] = [("input", rank - count + i, rank - count + i) for i in range(count)]
    names = {a.name for a in node.target._schema.arguments} & {"weight", "bias"}  # type: ignore[union-attr]
    return found + [(n, i, None) for n in sorted(names) if argument(node, n) is not None for i in range(count)]


@mixes("group_norm")
def group_norm(cut: Cut, node: Node) -> list[Place]:
    found: list[Place] = [(n, 0, None) for n in ("weight", "bias") if argument(node, n) is not None]
    return [("input", 1, 1), *found]


@mixes(*REDUCTIONS)
def reduction(cut: Cut, node: Node) -> list[Place]:
    return [("self", dim, None) for dim in reduced_dims(node, cut.labels(node.args[0]))]


@mixes("matmul", "bmm", "mm")
def product(cut: Cut, node: Node) -> list[Place]:
    a, b = (cut.labels(n) for n in node.args[:2])
    other = "other" if node.target is aten.matmul.default else "mat2"
    return [("self", len(a.shape) - 1, None), (other, len(b.shape) - 2, None)]


@mixes("scaled_dot_product_attention")
def attention(cut: Cut, node: Node) -> list[Place]:
    return [(name, len(cut.labels(argument(node, name)).shape) - 1, None) for name in ("query", "key")]
