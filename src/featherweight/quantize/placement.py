"""Where a network's activations are rounded to a grid, so that the runtime runs integer kernels from end to end.

``deploy.kernels`` says what operators do with a grid, and what differs between runtimes. An operator in none of its
tables computes in float, and is named with the reason "no integer kernel".
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.deploy.kernels import (
    CARRIERS,
    CLAMPS,
    ONNX_RUNTIME,
    SHARING,
    SPLITTERS,
    Rules,
    schema_argument_or,
    upper_end,
)
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED
from featherweight.numerics.formats import ACTIVATIONS, DYNAMIC
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.request import Request
from featherweight.steps import Skipped

aten = torch.ops.aten
APART = "parts of it that are read alone reach so much less far than it does that its grid would lose them four bits"


@dataclass(frozen=True)
class Placement:
    """What is to be rounded.

    points: node name -> name of the point whose grid it shares (its own, if it stands alone), in graph order.
    readers: node name -> names of the calls that read the rounded activation instead of the float one.
    kernels: names of the calls that are to run on integers with a stored weight.
    skipped: what stays float, and why.
    dynamic: node name -> names of the calls that read its value rounded when they run.
    joiners: sums, products, concatenations that run on integers -> the point whose grid they give.
    """

    points: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    dynamic: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joiners: Mapping[str, str] = field(default_factory=dict)

    def at_run_time(self, calls: Sequence[Node]) -> Placement:
        """This, and ``calls`` that round what they read when they run; what has a grid already is read from that."""
        readers, dynamic = dict(self.readers), dict(self.dynamic)
        for node in calls:
            given = str(node.args[0])
            found = readers if given in readers else dynamic
            found[given] = tuple(dict.fromkeys((*found.get(given, ()), node.name)))
        return replace(self, readers=readers, dynamic=dynamic, kernels=(*self.kernels, *(n.name for n in calls)))


def placement(folded: Network, found: Sequence[LayerForm], request: Request,
              apart: Collection[str] = ()) -> Placement:
    """Where activations are rounded: around the calls of ``found`` that compute on integers. apart: sums and the like
    that stay float (``prepare/uneven``)."""
    rules, placed = request.rules(), Placement()
    if request.activations in ACTIVATIONS or any(layer.on_grid for layer in found):
        placed = place(folded, integer_calls(found, rules), rules, apart)
    return placed.at_run_time([n for layer in found if layer.activations == DYNAMIC and layer.stored.group is None
                               for n in layer.nodes if rules.takes(n, DYNAMIC)])


def integer_calls(found: Sequence[LayerForm], rules: Rules) -> set[str]:
    """The calls that multiply integers: the target has a kernel for them, and what they read is on a grid."""
    return {n.name for layer in found if layer.on_grid for n in layer.nodes if rules.multiplies(n)}


def place(network: Network, kernels: set[str], rules: Rules = ONNX_RUNTIME,
          apart: Collection[str] = ()) -> Placement:
    """Places the points of a network; ``kernels`` names its calls of KERNELS that can run on integers."""
    return _Placer(network, kernels, rules, apart).place()


def carried(node: Node) -> list[Node]:
    """The activations that a call passes on (moved, clamped, cut in parts, or the largest of them)."""
    if node.target in CLAMPS and CLAMPS[node.target](node):
        return [node.args[0]]  # type: ignore[list-item]
    if node.target in SPLITTERS or node.target is operator.getitem:
        return [node.args[0]] if isinstance(node.args[0], Node) else []
    if node.target in CARRIERS and isinstance(node.args[0], Node):
        pads = node.target in (aten.pad.default, aten.constant_pad_nd.default)
        zero = schema_argument_or(node, "value", 0) in (None, 0)
        return [node.args[0]] if not pads or zero else []
    return []


class _Placer:
    def __init__(self, network: Network, kernels: set[str], rules: Rules, apart: Collection[str]) -> None:
        self.kernels, self.rules, self.apart = kernels, rules, apart
        self.calls = network.calls()
        values = network.values()
        self.float = {name for name, v in values.items() if isinstance(v, Tensor) and v.dtype == torch.float32}
        self.joined: dict[Node, list[Node]] = {}
        self.supplied: set[Node] = set()  # activations that come from an integer kernel
        self.demanded: set[Node] = set()  # activations that an integer kernel reads
        self.whole: set[Node] = set()  # joiners that run on integers
        self.compared = {n: given for n in self.calls if (given := self._computed(rules.compared(n)))}

    def place(self) -> Placement:
        for node in self.calls:
            inputs = [] if node.name in self.apart else self.rules.joined(node)
            if inputs and all(isinstance(i, Node) and i.op != "get_attr" and i.name in self.float for i in inputs):
                self.joined[node] = inputs
        self._flow()
        self.whole = {n for n, inputs in self.joined.items() if any(i in self.supplied for i in inputs)
                      and (n in self.demanded
                           or (self.rules.conv_rounds and all(i in self.supplied for i in inputs)))}
        points = self._points()
        groups = self._groups(points)
        readers = {p.name: tuple(self._readers(p, points)) for p in points}
        skipped = [Skipped(n.meta.get("module") or n.name, reason) for n in self.calls for reason in self._reasons(n)]
        return Placement({p.name: groups[p].name for p in points if readers[p.name]},
                         {name: r for name, r in readers.items() if r},
                         tuple(n.name for n in self.calls if n.name in self.kernels), tuple(dict.fromkeys(skipped)),
                         joiners={n.name: groups[p].name for n in self.whole if (p := self._settle(n)) in groups})

    def _computed(self, given: list[Any]) -> list[Node]:
        """``given`` if all of it is float values computed from the input, otherwise nothing."""
        plain = all(isinstance(v, Node) and v.op != "get_attr" and v.name in self.float for v in given)
        return given if plain and not any(self._weight(v) for v in given) else []

    def _weight(self, node: Node) -> bool:
        """Whether a value is a weight that was moved."""
        return node.op == "get_attr" or any(self._weight(given) for given in carried(node))

    # ---- who gives and who wants integers
    def _flow(self) -> None:
        for node in self.calls:
            given = [*self.joined.get(node, []), *carried(node), *self._fused(node)]
            gives = self._is_kernel(node) and (self.rules.must_round(node.target) or not self.rules.conv_rounds)
            if gives or any(i in self.supplied for i in given):
                self.supplied.add(node)
        for node in reversed(self.calls):
            wanted = node in self.demanded
            if self._is_kernel(node):
                self.demanded.add(node.args[0])  # type: ignore[arg-type]
            elif wanted:
                self.demanded.update([*self.joined.get(node, []), *carried(node), *self._fused(node)])

    def _is_kernel(self, node: Node) -> bool:
        return node.name in self.kernels

    def _fused(self, node: Node) -> list[Node]:
        """What this activation function is computed from, if a kernel may do so before it rounds."""
        given = node.args[0] if node.args else None
        known = self.rules.fused(node.target) and isinstance(given, Node) and len(given.users) == 1
        return [given] if known else []  # type: ignore[list-item]

    # ---- points
    def _points(self) -> list[Node]:
        """Nodes whose activation is rounded, in graph order."""
        found: set[Node] = set()
        for node in self.calls:
            if self._is_kernel(node):
                if self.rules.must_round(node.target) or node in self.demanded:
                    found.add(self._settle(node))
                found.add(node.args[0])  # type: ignore[arg-type]
            elif node in self.whole:
                found.add(self._settle(node))
                found.update(self.joined[node])
            elif node in self.compared:
                found.update(self._source(given) for given in self.compared[node])
            elif node in self.demanded and any(self._on_grid(i, found) for i in carried(node)):
                found.add(node)
        return [n for n in (*self._inputs(), *self.calls) if n in found and n.name in self.float]

    def _inputs(self) -> Iterator[Node]:
        graph = self.calls[0].graph if self.calls else None
        return iter([n for n in graph.nodes if n.op == "placeholder"] if graph is not None else [])

    def _settle(self, node: Node) -> Node:
        """Where the activation of ``node`` is rounded: after the clamp or fused activation that alone reads it, if
        any."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            dropout = user.target in (aten.dropout.default, aten.feature_dropout.default)
            if not (dropout or (user.target in CLAMPS and CLAMPS[user.target](user)) or self._fused(user)):
                break
            node = user
        return node

    def _source(self, node: Node) -> Node:
        """Where a value that is compared is rounded: as an integer kernel gives it, before it is moved, if nobody else
        reads it; otherwise as it comes."""
        source = node
        while (given := carried(source)) and len(given[0].users) == 1:
            source = given[0]
        return source if source in self.supplied else node

    def _on_grid(self, node: Node, found: set[Node]) -> bool:
        return node in found or (node.target in SPLITTERS and any(i in found for i in carried(node)))

    def _groups(self, points: list[Node]) -> dict[Node, Node]:
        """Point -> the first point of those that share its grid."""
        leader = {p: p for p in points}

        def find(p: Node) -> Node:
            while leader[p] is not p:
                p = leader[p]
            return p

        order = {p: i for i, p in enumerate(points)}

        def union(a: Node, b: Node) -> None:
            first, second = sorted((find(a), find(b)), key=order.__getitem__)
            leader[second] = first

        for point in points:
            for source in carried(point):
                root = carried(source)[0] if source.target in SPLITTERS and carried(source) else source
                if root in leader and point.target not in CLAMPS:
                    union(root, point)
        ends = self._cut()
        for node in self.whole:
            if node.target in SHARING and (settled := self._settle(node)) in leader:
                for given in self.joined[node]:
                    if given in leader and ends.get(given) == ends.get(settled):
                        union(given, settled)
        return {p: find(p) for p in points}

    def _cut(self) -> dict[Node, float | None]:
        """What clips an activation: None, or its clamp's upper end (the lower one is 0).

        Saturation stands for a clamp only where the grid ends with it: values cut off differently share no grid."""
        ends: dict[Node, float | None] = {}
        for node in self.calls:
            given = carried(node)
            if node.target in CLAMPS and given:
                ends[node] = upper_end(node)
            elif node.target in SHARING and node in self.joined:
                found = {ends.get(part) for part in self.joined[node]}
                ends[node] = found.pop() if len(found) == 1 else None
            elif given:
                ends[node] = ends.get(given[0])
        return ends

    def _readers(self, point: Node, points: list[Node]) -> list[str]:
        """Integer calls read the rounded activation. So does everybody else where an integer kernel gave it: the
        kernel has no float to give. (Where sums stay float, its value is float too.)"""
        given = [point, *carried(point)]
        if self.rules.adds and any(i in self.supplied for i in given):
            return [u.name for u in point.users]
        found = []
        for user in point.users:
            splits = user.target in SPLITTERS and user in self.demanded
            carries = bool(carried(user)) and (user in points or splits)
            if self._is_kernel(user) or user in self.whole or user in self.compared or carries:
                found.append(user.name)
        return found

    # ---- what stays float
    def _reasons(self, node: Node) -> Iterator[str]:
        if node.name not in self.float or self._is_kernel(node) or node in self.whole or node.target in WEIGHTED:
            return
        if any(i in self.supplied for i in self._fused(node)):
            return
        if node.name in self.apart:
            yield APART
        elif self.rules.joins(node.target):
            yield ("no rounded values on both sides: integers would cost more than they save"
                   if node in self.joined else f"{node.target} has no integer kernel in this form")
        elif not carried(node) and node.target not in CARRIERS:
            yield f"{node.target} has no integer kernel"
