"""What of a network's depth may be dropped: places where one value may stand for another computed from it.

Four kinds, all the same edit (the node ``source`` is put in the place of the node ``output``):
    residual  x + f(x) -> x
    shortcut  s(x) + f(x) -> s(x), where the shortcut is computed itself (a projection, a padded and strided slice)
    plain     a layer with what follows it (norm, activation), of the same shape at stride 1: f(x) -> x
    layer     a whole module of two or more residual blocks (a transformer's encoder layer), of the same shape
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import CONVOLUTIONS, WEIGHTED, clear_dead, read_tensors, weight_name
from featherweight.network.operators import has_schema, schema_argument
from featherweight.steps import Skipped

aten = torch.ops.aten
KINDS = ("residual", "shortcut", "plain", "layer")
RELUS = (aten.relu.default, aten.relu_.default)
ADDS = (aten.add.Tensor, aten.add_.Tensor)
#: what follows a layer and goes with it, beside point-wise functions of one value
NORMS = {aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default,
         aten.rms_norm.default, aten.dropout.default, aten.dropout_.default}
ATTENTIONS = {aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default}


@dataclass(frozen=True)
class Block:
    """A part of the network that may be dropped: the node ``source`` then stands where ``output`` was.

    name: module path; where one path has several, ``path:2`` and so on, and ``path (layer)`` for a whole module.
    """

    name: str
    output: str
    source: str
    kind: str = "residual"


@dataclass(frozen=True)
class Blocks:
    """The blocks in the order of their outputs, what is none and why, and the nodes that each one consists of."""

    found: tuple[Block, ...]
    skipped: tuple[Skipped, ...]
    regions: dict[str, frozenset[str]]

    def overlap(self, a: Block, b: Block) -> bool:
        return bool(self.regions[a.name] & self.regions[b.name])


class Reach:
    """Which nodes every node is computed from, as sets of bits: ``reads[node]`` has bit i for node i, its own too."""

    def __init__(self, network: Network) -> None:
        self.network, self.values = network, network.values()
        self.nodes: list[Node] = list(network.graph.nodes)
        self.reads: dict[Node, int] = {}
        self.bits = {n: 1 << i for i, n in enumerate(self.nodes)}
        inputs = 0
        for node, mask in self.bits.items():
            inputs |= mask if node.op == "placeholder" else 0
            for used in node.all_input_nodes:
                mask |= self.reads[used]
            self.reads[node] = mask
        self.live = {n for n in self.nodes if self.reads[n] & inputs}

    def members(self, mask: int) -> Iterator[Node]:
        """The live nodes of a set, in order."""
        while mask:
            node = self.nodes[(mask & -mask).bit_length() - 1]
            mask &= mask - 1
            if node in self.live:
                yield node

    def weights(self, mask: int) -> list[str]:
        """The stored weights of convolutions and linear calls in a set."""
        return [name for n in self.members(mask) if n.target in WEIGHTED and (name := weight_name(n)) is not None]

    def layers(self, mask: int) -> tuple[int, int]:
        """Number of layers in a set, and of their weights: which of two is the deeper."""
        calls = [n for n in self.members(mask) if n.target in WEIGHTED]
        return len(calls), sum(self.network.tensor(w).numel() for w in self.weights(mask))

    def alike(self, a: Node, b: Node) -> bool:
        """Same shape and number type."""
        x, y = self.values[a.name], self.values[b.name]
        return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype

    def shape(self, node: Node) -> list[int]:
        """Without the samples' axis."""
        value = self.values[node.name]
        return list(value.shape[1:]) if isinstance(value, Tensor) else []

    def entries(self, mask: int) -> list[Node]:
        """The live tensors that a set reads from outside; sizes, which no block changes, are none."""
        inside = {n for n in self.members(mask) if not isinstance(self.values[n.name], int)}
        return list(dict.fromkeys(u for n in inside for u in n.all_input_nodes if u in self.live and u not in inside
                                  and not isinstance(self.values[u.name], int)))


def droppable(network: Network) -> Blocks:
    """Everything that may be dropped from ``network``, of every kind. Reads shapes only, no data."""
    reach = Reach(network)
    names: dict[str, int] = {}
    found: list[tuple[Block, int]] = []
    left: list[Skipped] = []
    covered = 0

    def named(node: Node) -> str:
        path = str(node.meta.get("module", "")) or node.name
        names[path] = names.get(path, 0) + 1
        return path if names[path] == 1 else f"{path}:{names[path]}"

    def enter(node: Node, kind: str, source: Node | None, reason: str) -> None:
        if source is None or reason:
            left.append(Skipped(named(node), reason))
        else:
            found.append((Block(named(node), node.name, source.name, kind), reach.reads[node] & ~reach.reads[source]))

    for node in reach.nodes:
        sides = [a for a in node.args[:2] if isinstance(a, Node)] if node.target in ADDS else []
        if len(sides) == 2 and all(a in reach.live and isinstance(reach.values[a.name], Tensor) for a in sides):
            kind, source, reason, own = _addition(reach, node, sides)
            if own:
                enter(node, kind, source, reason)
                covered |= 0 if reason else own
    for node in network.calls(*WEIGHTED):
        if node in reach.live and not covered & reach.bits[node]:
            last = _followed(reach, node)
            reason = _plain_reason(reach, node, last)
            if reason:
                left.append(Skipped(named(node), reason))
            else:
                source = node.all_input_nodes[0]
                region = reach.reads[last] & ~reach.reads[source]
                found.append((Block(named(node), last.name, source.name, "plain"), region))
    found += list(_whole_layers(reach, [b for b, _ in found if b.kind == "residual"]))
    order = {n.name: i for i, n in enumerate(reach.nodes)}
    found.sort(key=lambda f: order[f[0].output])
    regions = {b.name: frozenset(n.name for n in reach.members(mask)) for b, mask in found}
    return Blocks(tuple(b for b, _ in found), tuple(left), regions)


def without(network: Network, blocks: tuple[Block, ...]) -> Network:
    """A copy in which each block's source stands where its output was."""
    other = network.copy()
    before = read_tensors(other)
    nodes = {n.name: n for n in other.graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    for block in sorted(blocks, key=lambda b: -order[b.output]):
        output, source = nodes[block.output], nodes[block.source]
        for user in list(output.users):  # relu(relu(x)) = relu(x)
            if user.target in RELUS and source.target in RELUS:
                user.replace_all_uses_with(source)
                other.graph.erase_node(user)
        output.replace_all_uses_with(source)
    for node in other.calls(aten.view.default):  # what comes now may lie otherwise in memory
        node.target = aten.reshape.default
    clear_dead(other, before)
    other.changed()
    return other


def _addition(reach: Reach, node: Node, sides: Sequence[Node]) -> tuple[str, Node | None, str, int]:
    """(kind, what stays, why it may not be dropped, the nodes of its paths) of an addition; no nodes if there is
    nothing of interest in it."""
    for shortcut, branch in ((sides[0], sides[1]), (sides[1], sides[0])):
        own = reach.reads[branch] & ~reach.reads[shortcut]
        if reach.reads[shortcut] & ~reach.reads[branch] == 0 and shortcut is not branch:
            reason = _sum_reason(reach, node, shortcut) or ("" if reach.layers(own)[0] else "its branch has no weights")
            return "residual", shortcut, reason, own
    owns = [reach.reads[a] & ~reach.reads[b] for a, b in (sides, tuple(reversed(sides)))]
    sizes = [reach.layers(own) for own in owns]
    if not any(count for count, _ in sizes):
        return "", None, "", 0
    deep = int(sizes[1] > sizes[0])
    shortcut = sides[1 - deep]
    starts = [set(reach.entries(own)) for own in owns]
    inside = {*reach.members(owns[deep]), node}
    reason = _sum_reason(reach, node, shortcut)
    if len(starts[0] | starts[1]) != 1 or not all(starts):
        reason = "its two paths do not start from one value"
    elif sizes[0] == sizes[1]:
        reason = "its two paths are as deep as one another: neither is the shortcut"
    elif any(u not in inside for n in inside - {node} if not isinstance(reach.values[n.name], int) for u in n.users):
        reason = "a value inside its branch is read elsewhere too"
    return "shortcut", shortcut, reason, owns[0] | owns[1]


def _sum_reason(reach: Reach, node: Node, shortcut: Node) -> str:
    if node.kwargs.get("alpha", 1) != 1 and node.args[1] is shortcut:
        return "it adds a multiple"
    return "" if reach.alike(shortcut, node) else "its input has another shape than its output"


def _followed(reach: Reach, node: Node) -> Node:
    """The last of the calls that only go on with a layer's result: norm, activation, dropout."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        others = [u for u in user.all_input_nodes if u is not node and u in reach.live]
        pointwise = has_schema(user.target) and torch.Tag.pointwise in user.target.tags  # type: ignore[union-attr]
        if others or not (user.target in NORMS or (pointwise and user.target not in ADDS)):
            break
        if not reach.alike(node, user):
            break
        node = user
    return node


def _plain_reason(reach: Reach, node: Node, last: Node) -> str:
    source: Any = node.args[0]
    if not isinstance(source, Node) or source not in reach.live:
        return "it reads no value of the network"
    if not reach.alike(source, last):
        return f"its output has another shape than its input ({reach.shape(source)} to {reach.shape(last)})"
    if node.target in CONVOLUTIONS and any(s != 1 for s in _strides(node)):
        return f"its stride is {_strides(node)}"
    if any(u.op == "output" for u in last.users):
        return "it makes the network's output"
    return ""


def _strides(node: Node) -> list[int]:
    stride: Any = schema_argument(node, "stride")
    return [int(s) for s in (stride if isinstance(stride, (list, tuple)) else [stride])]


def _whole_layers(reach: Reach, residual: Sequence[Block]) -> Iterator[tuple[Block, int]]:
    """Innermost modules of two or more residual blocks: additions of their own, or around an attention."""
    paths: dict[str, list[str]] = {}
    module = {n.name: str(n.meta.get("module", "")) for n in reach.nodes}
    for block in residual:
        steps = module[block.output].split(".")
        for i in range(1, len(steps) + 1):
            paths.setdefault(".".join(steps[:i]), []).append(module[block.output])
    several = {p: own for p, own in paths.items() if p and len(own) > 1}
    for path, own in several.items():
        inside = [n for n in reach.nodes if n in reach.live and n.op == "call_function"
                  and f"{module[n.name]}.".startswith(f"{path}.")]
        if any(p.startswith(f"{path}.") for p in several):
            continue
        if not (set(own) == {path} or any(n.target in ATTENTIONS for n in inside)):
            continue
        mask = sum(reach.bits[n] for n in inside)
        region = set(inside)
        exits = [n for n in inside if any(u not in region for u in n.users)
                 and isinstance(reach.values[n.name], Tensor)]
        entries = [e for e in reach.entries(mask) if len(exits) == 1 and reach.alike(e, exits[0])]
        if len(exits) == 1 and len(entries) == 1:
            yield Block(f"{path} (layer)", exits[0].name, entries[0].name, "layer"), mask
