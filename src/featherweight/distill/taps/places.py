"""Places in a network where an activation may be compared: the trunk, the ends of its stages, the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.distill.taps.paths import output_node
from featherweight.errors import RecipeError
from featherweight.network import Network

aten = torch.ops.aten
#: places by depth, where the resolution does not change
COUNT = 4


@dataclass(frozen=True)
class Place:
    """The activation that a node gives: its module's path, its shape without the samples, and the axis of its channels.

    depth: 0..1, the node's position among the network's nodes.
    """

    node: str
    path: str
    shape: tuple[int, ...]
    axis: int
    depth: float

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.shape[self.axis - 1] if self.axis > 0 else self.shape[-1]

    @property
    def resolution(self) -> tuple[int, ...]:
        """Sizes of the axes other than samples and channels."""
        axis = (self.axis - 1) % len(self.shape) if self.axis > 0 else len(self.shape) - 1
        return self.shape[:axis] + self.shape[axis + 1:]

    @property
    def reads(self) -> tuple[str, ...]:
        """The nodes whose activations say it."""
        return (self.node,)

    def of(self, seen: Mapping[str, Tensor]) -> Tensor:
        """The activation, of what its nodes gave by name."""
        return seen[self.node]

    def __str__(self) -> str:
        return self.path or self.node


def places(network: Network) -> dict[str, Place]:
    """Node's name -> place, of every floating activation of two or more axes that the input reaches, in order."""
    values, order = network.values(), list(network.graph.nodes)
    reached: set[Node] = set()
    found: dict[str, Place] = {}
    for index, node in enumerate(order):
        if node.op == "placeholder":
            reached.add(node)
        value = values.get(node.name)
        live = node.op == "call_function" and bool(reached.intersection(node.all_input_nodes))
        if not live or not isinstance(value, Tensor):
            continue
        reached.add(node)
        if value.is_floating_point() and value.dim() > 1:
            found[node.name] = Place(node.name, str(node.meta.get("module", "")), tuple(map(int, value.shape[1:])),
                                     channels_axis(network, value.dim()), index / len(order))
    return found


def channels_axis(network: Network, dims: int) -> int:
    """The axis of the channels: 1 of maps; of three axes the last (tokens), or 1 in a network of 1-d convolutions."""
    if dims != 3:
        return 1
    convolved = network.calls(aten.conv1d.default)
    return 1 if convolved or any(network.values()[n.name].dim() == 3 for n in network.calls(aten.convolution.default)
                                 ) else -1


def trunk(network: Network) -> list[Place]:
    """Places that every path from the input to the output goes through, in order, without the output itself."""
    known, order = places(network), list(network.graph.nodes)
    index = {node: i for i, node in enumerate(order)}
    tensors = [n for n in order if n.op == "placeholder" or n.name in known]
    ends = {n: max((index[u] for u in n.users if u.op == "output" or u.name in known), default=-1) for n in tensors}
    closing: dict[int, int] = {}
    for end in ends.values():
        closing[end] = closing.get(end, 0) + 1
    held, found = 0, []
    for i, node in enumerate(order):
        held -= closing.get(i, 0)
        if node in ends and ends[node] > i:
            held += 1
            if held == 1 and node.name in known and ends[node] < len(order) - 1:
                found.append(known[node.name])
    return found


def stages(network: Network) -> list[Place]:
    """The last place of the trunk at every resolution; evenly over the depth where there is one resolution only.

    Of a network without a trunk (several outputs, a pyramid of features) the last of all places at every resolution.
    """
    wide = [p for p in trunk(network) if _has_room(p)]
    if not wide:
        wide = [p for p in places(network).values() if _has_room(p) and p.axis == 1]
    by_size: dict[tuple[int, ...], Place] = {p.resolution: p for p in wide}
    if len(by_size) > 1:
        return sorted(by_size.values(), key=lambda p: p.depth)
    count = min(COUNT, len(wide))
    return [wide[(i + 1) * len(wide) // count - 1] for i in range(count)]


def _has_room(place: Place) -> bool:
    return len(place.shape) > 1 and max(place.resolution, default=1) > 1


def layers(network: Network) -> list[Place]:
    """What every module gives that gives one activation, but for the network's output."""
    known = places(network)
    output = {n.name for n in next(n for n in network.graph.nodes if n.op == "output").all_input_nodes}
    found: dict[str, Place] = {}
    for path in network.paths():
        try:
            node = output_node(network, path) if path else ""
        except RecipeError:
            continue
        if node in known and node not in output and known[node].shape:
            found[node] = known[node]
    return sorted(found.values(), key=lambda p: p.depth)
