"""Which calls read the channels that a call gives, and between which nothing stands but what lets a scale pass.

f lets a scale pass if f(s x) = s f(x) for s > 0. A tensor of labels (the number of the channel that an element belongs
to) takes the place of the value and goes through the same operators; ``PASS`` is the table of how. What is in no table
stops the channels that reach it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from featherweight.network import Network
from featherweight.network.edit import CONVOLUTIONS, WEIGHTED, bias_name, out_axis, readers_of, weight_name
from featherweight.network.matrices import as_matrix, from_matrix
from featherweight.network.operators import schema_argument

aten = torch.ops.aten

#: labels of elements that belong to no channel of the call looked at: foreign values, and zeros (whose scale is free)
FOREIGN, ZERO = -1.0, -2.0
#: batch that graphs are followed with
BATCH = 3


@dataclass(frozen=True)
class ScaleReader:
    """A linear or convolution call and the channel, [i], that each of its input channels holds; below 0: none."""

    node: Node
    labels: Tensor


@dataclass(frozen=True)
class Paths:
    """Where the channels of a call go.

    free: [c] bool, the channels that only ``readers`` see. reasons: what the others are stopped by.
    """

    readers: tuple[ScaleReader, ...]
    free: Tensor
    reasons: tuple[str, ...]


class Follower:
    """Follows the channels of calls through a graph."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.values = network.values(BATCH)
        self.calls = network.calls()

    def follow(self, source: Node, axis: int) -> Paths:
        """Where the channels that lie along ``axis`` of what ``source`` gives go."""
        shape = self.values[source.name].shape
        width = shape[axis]
        start = torch.arange(width, dtype=torch.float32)
        view = [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
        held: dict[Node, Any] = {source: start.view(view).expand(shape)}
        readers: list[ScaleReader] = []
        free, reasons = torch.ones(width, dtype=torch.bool), []
        for node in self.calls[self.calls.index(source) + 1:]:
            given = [i for i in node.all_input_nodes if i in held]
            if not given:
                continue
            if node.target in WEIGHTED:
                found, why = self._reader(node, held)
                readers += [] if found is None else [found]
            else:
                passed = PASS[node.target](self, node, held) if node.target in PASS else None
                ended = [node.args[i] for i in ENDS.get(node.target, ())]
                given = [i for i in given if passed is None or i in ended]
                why = f"{node.target} stands between" if given else ""
                if passed is not None:
                    held[node] = passed
            if why:
                reasons.append(why)
                for one in given:
                    _stop(free, held[one])
                if not free.any():
                    break
        for node in (n for n in held if any(u.op == "output" for u in n.users)):
            reasons.append("it is an output of the network")
            _stop(free, held[node])
        return Paths(tuple(readers), free, tuple(dict.fromkeys(reasons)))

    def _reader(self, node: Node, held: Mapping[Node, Any]) -> tuple[ScaleReader | None, str]:
        why = unfit(self.network, node)
        if why or any(i in held for i in node.all_input_nodes if i is not node.args[0]):
            return None, why or f"{node.target} computes with it as a weight"
        labels = held[node.args[0]]  # type: ignore[index]
        axis = channel_axis(self.network, node) % labels.dim()
        found = alike(labels, [i for i in range(labels.dim()) if i != axis])
        if found is None:
            return None, f"{node.name} reads several channels as one"
        return ScaleReader(node, found.flatten()), ""

    def resolved(self, argument: Any, held: Mapping[Node, Any]) -> Any:
        """An argument with labels and whole numbers in the place of nodes."""
        return map_arg(argument, lambda n: held[n] if n in held else self.values[n.name])

    def shape(self, node: Any) -> torch.Size:
        shape: torch.Size = self.values[node.name].shape
        return shape


def _stop(free: Tensor, labels: Any) -> None:
    for part in labels if isinstance(labels, (list, tuple)) else [labels]:
        free[part[part >= 0].long().unique()] = False


def alike(labels: Tensor, axes: list[int]) -> Tensor | None:
    """The labels along the other axes (those of ``axes`` get length 1), if they are the same all along ``axes``."""
    if not axes:
        return labels
    zero = labels == ZERO
    high = labels.masked_fill(zero, -torch.inf).amax(axes, keepdim=True)
    low = labels.masked_fill(zero, torch.inf).amin(axes, keepdim=True)
    low, high = (torch.where(high == -torch.inf, ZERO, end) for end in (low, high))
    return high if torch.equal(low, high) else None


# ---- operators
def _first(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Tensor | None:
    """Element by element, with no other value of the channels' in it."""
    alone = [i for i in node.all_input_nodes if i in held] == [node.args[0]]
    return held[node.args[0]] if alone else None  # type: ignore[index]


def _moved(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Any:
    """Elements get another place and nothing else."""
    if _first(follower, node, held) is None:
        return None
    target = aten.reshape.default if node.target in VIEWS else node.target  # labels may lie in memory in another order
    return target(*follower.resolved(node.args, held), **follower.resolved(node.kwargs, held))  # type: ignore[operator]


def _padded(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Tensor | None:
    if node.target is aten.pad.default and schema_argument(node, "mode") != "constant":
        moved: Tensor | None = _moved(follower, node, held)
        return moved
    labels, sizes = _first(follower, node, held), follower.resolved(schema_argument(node, "pad"), held)
    if labels is None or schema_argument(node, "value") not in (None, 0):
        return None
    return torch.nn.functional.pad(labels, list(sizes), value=ZERO)


def _pooled(axes: int) -> Callable[[Follower, Node, Mapping[Node, Any]], Tensor | None]:
    def rule(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Tensor | None:
        labels = _first(follower, node, held)
        same = None if labels is None else alike(labels, list(range(labels.dim() - axes, labels.dim())))
        return None if same is None else same.expand(follower.shape(node))

    return rule


def _reduced(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Tensor | None:
    labels, axes = _first(follower, node, held), schema_argument(node, "dim")
    if labels is None or not isinstance(axes, (list, tuple)):
        return None
    same = alike(labels, [a % labels.dim() for a in axes] or list(range(labels.dim())))
    return None if same is None else same.reshape(follower.shape(node))


def _joined(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Tensor:
    parts = [held[p] if p in held else torch.full(follower.shape(p), FOREIGN) for p in node.args[0]]  # type: ignore
    return torch.cat(parts, int(schema_argument(node, "dim")))


def _factor(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Tensor | None:
    """A product with something else."""
    given = [a for a in node.args[:2] if isinstance(a, Node) and a in held]
    if len(given) != 1 or (node.target is aten.div.Tensor and given[0] is not node.args[0]):
        return None
    labels: Tensor = held[given[0]]
    return labels.expand(follower.shape(node))


def _mixed(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Tensor | None:
    """A matrix product with something else, which sums over elements of one channel each."""
    if len([a for a in node.args[:2] if a in held]) != 1:
        return None
    right = node.args[1] in held
    labels: Tensor = held[node.args[1] if right else node.args[0]]  # type: ignore[index]
    if labels.dim() < 2 or len(follower.shape(node.args[0])) < 2:
        return None
    same = alike(labels, [labels.dim() - (2 if right else 1)])
    return None if same is None else same.expand(follower.shape(node))


def _attended(follower: Follower, node: Node, held: Mapping[Node, Any]) -> Tensor | None:
    """Attention averages its values over their places."""
    if node.args[2] not in held or any(i in held for i in node.all_input_nodes if i not in node.args[:3]):
        return None
    labels, shape = held[node.args[2]], follower.shape(node)  # type: ignore[index]
    same = alike(labels, [labels.dim() - 2])
    return same.expand(shape) if same is not None and same.shape[:-2] == shape[:-2] else None


VIEWS: set[Any] = {aten.view.default, aten._unsafe_view.default}

#: operator -> (follower, call, labels by node) -> labels of what it gives; None: in this form it lets no scale pass
PASS: dict[Any, Callable[[Follower, Node, Mapping[Node, Any]], Any]] = {
    **dict.fromkeys([aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.dropout.default,
                     aten.feature_dropout.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
                     aten.detach.default], _first),
    **dict.fromkeys([aten.flatten.using_ints, aten.unflatten.int, aten.view.default, aten.reshape.default,
                     aten._unsafe_view.default, aten.transpose.int, aten.permute.default, aten.t.default,
                     aten.slice.Tensor, aten.select.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
                     aten.unsqueeze.default, aten.expand.default, aten.pixel_shuffle.default,
                     aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.upsample_nearest2d.vec,
                     aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
                     aten.split.sizes, operator.getitem], _moved),
    **dict.fromkeys([aten.pad.default, aten.constant_pad_nd.default], _padded),
    **dict.fromkeys([aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default], _pooled(1)),
    **dict.fromkeys([aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default], _pooled(2)),
    **dict.fromkeys([aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default], _pooled(3)),
    **dict.fromkeys([aten.mean.dim, aten.sum.dim_IntList, aten.amax.default], _reduced),
    **dict.fromkeys([aten.cat.default, aten.concat.default], _joined),
    **dict.fromkeys([aten.mul.Tensor, aten.div.Tensor], _factor),
    **dict.fromkeys([aten.matmul.default, aten.bmm.default], _mixed),
    aten.scaled_dot_product_attention.default: _attended,
}
#: operator -> positions of arguments whose channels end there, while others pass: queries and keys
ENDS: dict[Any, tuple[int, ...]] = {aten.scaled_dot_product_attention.default: (0, 1)}


# ---- weights
def unfit(network: Network, node: Node) -> str:
    """Why the weight and the bias of a linear or convolution call cannot be scaled; "" where they can."""
    name, bias = weight_name(node), bias_name(node)
    if name is None or (bias is None and len(node.args) > 2 and node.args[2] is not None):
        return "its weight or bias is computed, or stored in another form"
    known = [t for t in (name, bias) if t is not None]
    if any(len(readers_of(network, t)) > 1 for t in known):
        return "its weight or bias is read by several calls"
    return "" if all(network.tensor(t).is_floating_point() for t in known) else "its weight is not of floats"


def channel_axis(network: Network, node: Node) -> int:
    """The axis, counted from the end, that input and output channels of a linear or convolution call lie along."""
    return 1 - network.tensor(str(weight_name(node))).dim() if node.target in CONVOLUTIONS else -1


def by_channel(node: Node, weight: Tensor) -> Tensor:
    """A weight as [g, o, i, k]: groups, outputs and inputs of each, places of the kernel."""
    matrix = as_matrix(node, weight)
    groups = matrix.shape[0]
    inputs = weight.shape[0] // groups if out_axis(node) else weight.shape[1]
    return matrix.reshape(groups, matrix.shape[1], inputs, -1)


def output_ranges(node: Node, weight: Tensor) -> Tensor:
    """[o]: the largest magnitude among the weights of each output channel."""
    return by_channel(node, weight).abs().amax((2, 3)).flatten()


def input_ranges(node: Node, weight: Tensor) -> Tensor:
    """[i]: the largest magnitude among the weights of each input channel."""
    return by_channel(node, weight).abs().amax((1, 3)).flatten()


def scaled(node: Node, weight: Tensor, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
    """The weight times ``outputs`` [o] along its output channels and ``inputs`` [i] along its input channels."""
    parts = by_channel(node, weight)
    if outputs is not None:
        parts = parts * outputs.view(parts.shape[0], parts.shape[1], 1, 1)
    if inputs is not None:
        parts = parts * inputs.view(parts.shape[0], 1, parts.shape[2], 1)
    return from_matrix(node, parts.flatten(2), weight.shape)


def widest(values: Tensor, labels: Tensor, width: int) -> Tensor:
    """[width]: for each channel the largest of ``values`` [i] whose label it is; 0 where there is none."""
    mine = labels >= 0
    return values.new_zeros(width).scatter_reduce(0, labels[mine].long(), values[mine], "amax")


def spread(scale: Tensor, labels: Tensor) -> Tensor:
    """[i]: the scale of the channel that each input holds; 1 where it holds none."""
    return torch.where(labels >= 0, scale[labels.long().clamp(min=0)], 1.0)


__all__ = ["PASS", "Follower", "Paths", "ScaleReader", "channel_axis", "input_ranges", "output_ranges", "scaled",
           "spread", "unfit", "widest"]
