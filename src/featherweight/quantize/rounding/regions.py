"""The parts of a network whose weights are rounded together: single layers, or blocks between two activations through
which everything flows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from featherweight.calibrate.walk import Order
from featherweight.deploy.kernels import CLAMPS, UNARY
from featherweight.network import Network
from featherweight.network.edit import stored_node
from featherweight.quantize.layers import LayerForm

#: layers that a block may have; parts with more are taken layer by layer
LARGEST = 4


@dataclass(frozen=True)
class Region:
    """Calls that compute the activation ``end`` out of the activations ``entries``, and the layers among them."""

    layers: tuple[LayerForm, ...]
    nodes: tuple[Node, ...]
    entries: tuple[str, ...]
    end: Node


def activation(node: Node) -> Node | None:
    """The activation function that alone reads a call, if it works on every number by itself."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.all_input_nodes != [node]:
        return None
    clamps = user.target in CLAMPS and CLAMPS[user.target](user)
    return user if clamps or user.target in UNARY else None


def single(layer: LayerForm, copies: Mapping[str, Any]) -> Region:
    """A layer with the rounding of its input and its activation function. copies: names of the calls that round."""
    node = layer.nodes[0]
    given = node.args[0]
    assert isinstance(given, Node)
    before = [given] if given.name in copies else []
    entry = given.all_input_nodes[0].name if before else given.name
    after = activation(node)
    nodes = (*before, node, *([after] if after is not None else []))
    return Region((layer,), nodes, (entry,), nodes[-1])


def blocks(network: Network, order: Order, layers: Sequence[LayerForm], copies: Mapping[str, Any]) -> list[Region]:
    """Every layer in one region, in graph order. A region ends in an activation that all that comes later is computed
    from, and has at most ``LARGEST`` layers; or it is a single layer."""
    two, three = network.values(2), network.values(3)
    tensors = {n for n, v in two.items() if isinstance(v, Tensor) and v.shape != three[n].shape}
    named = {layer.nodes[0]: layer for layer in layers}
    found: list[Region] = []
    for part in _parts(network, order, tensors, copies):
        inside = [named[n] for n in part if n in named]
        region = _region(part, inside, two, three) if 1 < len(inside) <= LARGEST else None
        found += [region] if region is not None else [single(layer, copies) for layer in inside]
    return found


def _parts(network: Network, order: Order, tensors: set[str], copies: Mapping[str, Any]) -> Iterator[list[Node]]:
    """The calls between one cut and the next. After a cut, its activation is all that is needed of what depends on the
    batch. An activation function stays with the call that it alone reads, a copy that is rounded with its reader."""
    alive = {n.name for n in network.graph.nodes if n.op == "placeholder"}
    part: list[Node] = []
    for index, node in enumerate(order.calls):
        part.append(node)
        alive.add(node.name)
        alive = {n for n in alive if order.last.get(n, -1) > index and n in tensors}
        if alive == {node.name} and node.name not in copies and activation(node) is None:
            yield part
            part = []
    yield part


def _region(part: list[Node], layers: list[LayerForm], two: Mapping[str, Any],
            three: Mapping[str, Any]) -> Region | None:
    """None where an entry has no samples along its first axis, or a layer does not reach the end."""
    end = part[-1]
    needed = {end}
    for node in reversed(part):
        if node in needed:
            needed.update(n for n in node.all_input_nodes if stored_node(n) is None)
    entries = [n.name for n in needed if n not in set(part)]
    nodes = tuple(n for n in part if n in needed)
    if not all(layer.nodes[0] in needed for layer in layers):
        return None
    for name in (*entries, end.name):
        if not isinstance(two[name], Tensor) or two[name].dim() == 0 or (two[name].shape[0], three[name].shape[0]) != (
                2, 3):
            return None
    return Region(tuple(layers), nodes, tuple(sorted(entries)), end)


__all__ = ["LARGEST", "Region", "activation", "blocks", "single"]
