"""Where a network's values are rounded to a grid, so that the runtime runs whole-number kernels from end to end.

Four tables say what operators do with a grid; add a row to teach a new one. An operator in none of them computes in
float, and is named with the reason "no whole-number kernel".

- KERNELS: convolutions and linear calls, which multiply whole numbers wherever their weight is stored. A convolution
  must then give a rounded value; a linear call can give a float as cheaply.
- JOINERS: add, mul, cat, pools, which have a whole-number kernel but little work: they run on whole numbers only where
  they save a way to float and back, i.e. where a rounded value comes in and a rounded one is wanted.
- CARRIERS: operators that move values or take the largest of them, on whatever grid the values are.
- CLAMPS: activations that saturation does for free when the value before them is not rounded but the one after is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.operators import schema_argument
from featherweight.network.surgery import TRANSPOSED, WEIGHTED
from featherweight.steps import Skipped

aten = torch.ops.aten

#: operator -> whether its output must be rounded for the call to run on whole numbers
KERNELS: dict[Any, bool] = {target: "conv" in str(target) for target in WEIGHTED if target not in TRANSPOSED}


def _first(node: Node) -> list[Any]:
    return [node.args[0]]


def _two(node: Node) -> list[Any]:
    return list(node.args[:2]) if schema_argument_or(node, "alpha", 1) == 1 else []


def _listed(node: Node) -> list[Any]:
    return list(node.args[0])  # type: ignore[arg-type]


def _spatial(node: Node) -> list[Any]:
    """A pool to one value per channel; pools to other sizes are averages of unequal windows."""
    size = node.args[1]
    return [node.args[0]] if set(size if isinstance(size, (list, tuple)) else [size]) == {1} else []


def _mean(node: Node) -> list[Any]:
    axes = node.args[1] if len(node.args) > 1 else None
    return [node.args[0]] if isinstance(axes, (list, tuple)) and sorted(axes) in ([2, 3], [-2, -1]) else []


#: operator -> function giving the arguments that it joins ([]: in this form it has no whole-number kernel)
JOINERS: dict[Any, Callable[[Node], list[Any]]] = {
    aten.add.Tensor: _two,
    aten.mul.Tensor: _two,
    aten.cat.default: _listed,
    aten.concat.default: _listed,
    aten.avg_pool2d.default: _first,
    aten.adaptive_avg_pool2d.default: _spatial,
    aten.mean.dim: _mean,
    aten.leaky_relu.default: _first,
}
#: joiners whose inputs and output share one grid
SHARING: set[Any] = {aten.cat.default, aten.concat.default}

#: operators that carry values along, on one grid with what goes in
CARRIERS: set[Any] = {
    aten.max_pool2d.default, aten.flatten.using_ints, aten.unflatten.int, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.transpose.int, aten.permute.default, aten.t.default, aten.slice.Tensor,
    aten.select.int, aten.index_select.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.expand.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.pad.default, aten.constant_pad_nd.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.upsample_nearest2d.vec, aten.dropout.default,
    aten.feature_dropout.default,
}
#: operators that give a list whose items (read by getitem) are carried
SPLITTERS: set[Any] = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
                       aten.split.sizes}


def _clamps_at_zero(node: Node) -> bool:
    return bool(schema_argument_or(node, "min", None) == 0)


#: operator -> whether in this form the activation only cuts off ends, the lower one at zero
CLAMPS: dict[Any, Callable[[Node], bool]] = {
    aten.relu.default: lambda node: True,
    aten.relu6.default: lambda node: True,
    aten.hardtanh.default: lambda node: schema_argument_or(node, "min_val", -1) == 0,
    aten.clamp.default: _clamps_at_zero,
    aten.clamp_min.default: _clamps_at_zero,
    aten.clip.default: _clamps_at_zero,
}


#: clamp -> function giving its upper end; those not listed have the argument "max" or "max_val", or none
UPPER_END: dict[Any, Callable[[Node], float]] = {aten.relu6.default: lambda node: 6.0}


def _upper_end(node: Node) -> float:
    end = schema_argument_or(node, "max", schema_argument_or(node, "max_val", None))
    return float("inf") if end is None else float(end)


def schema_argument_or(node: Node, name: str, default: Any) -> Any:
    try:
        return schema_argument(node, name)
    except KeyError:
        return default


@dataclass(frozen=True)
class Placement:
    """What is to be rounded.

    points: node name -> name of the point whose grid it shares (its own, if it stands alone), in graph order.
    readers: node name -> names of the calls that read the rounded value instead of the float one.
    kernels: names of the calls that are to run on whole numbers with a stored weight.
    skipped: what stays float, and why.
    """

    points: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def place(network: Network, kernels: set[str]) -> Placement:
    """Places the points of a network; ``kernels`` names its calls of KERNELS that can run on whole numbers."""
    return _Placer(network, kernels).place()


class _Placer:
    def __init__(self, network: Network, kernels: set[str]) -> None:
        self.kernels = kernels
        self.calls = network.calls()
        values = network.values()
        self.float = {name for name, v in values.items() if isinstance(v, Tensor) and v.dtype == torch.float32}
        self.joined: dict[Node, list[Node]] = {}
        self.supplied: set[Node] = set()  # values that come from a whole-number kernel
        self.demanded: set[Node] = set()  # values that a whole-number kernel reads
        self.whole: set[Node] = set()  # joiners that run on whole numbers

    def place(self) -> Placement:
        for node in self.calls:
            if node.target in JOINERS:
                inputs = JOINERS[node.target](node)
                if inputs and all(isinstance(i, Node) and i.op != "get_attr" and i.name in self.float for i in inputs):
                    self.joined[node] = inputs
        self._flow()
        self.whole = {n for n, inputs in self.joined.items() if any(i in self.supplied for i in inputs)
                      and (n in self.demanded or all(i in self.supplied for i in inputs))}
        points = self._points()
        groups = self._groups(points)
        readers = {p.name: tuple(self._readers(p, points)) for p in points}
        skipped = [Skipped(n.meta.get("module") or n.name, reason) for n in self.calls for reason in self._reasons(n)]
        return Placement({p.name: groups[p].name for p in points if readers[p.name]},
                         {name: r for name, r in readers.items() if r},
                         tuple(n.name for n in self.calls if n.name in self.kernels), tuple(dict.fromkeys(skipped)))

    # ---- who gives and who wants whole numbers
    def _flow(self) -> None:
        for node in self.calls:
            if (self._is_kernel(node) and KERNELS[node.target]) or any(
                    i in self.supplied for i in [*self.joined.get(node, []), *self._carried(node)]):
                self.supplied.add(node)
        for node in reversed(self.calls):
            wanted = node in self.demanded
            if self._is_kernel(node):
                self.demanded.add(node.args[0])  # type: ignore[arg-type]
            elif wanted:
                self.demanded.update([*self.joined.get(node, []), *self._carried(node)])

    def _is_kernel(self, node: Node) -> bool:
        return node.name in self.kernels

    def _carried(self, node: Node) -> list[Node]:
        """The values that this call passes on (clamped, or cut in parts)."""
        if node.target in CLAMPS and CLAMPS[node.target](node):
            return [node.args[0]]  # type: ignore[list-item]
        if node.target in SPLITTERS or node.target is operator.getitem:
            return [node.args[0]] if isinstance(node.args[0], Node) else []
        if node.target in CARRIERS and isinstance(node.args[0], Node):
            pads = node.target in (aten.pad.default, aten.constant_pad_nd.default)
            zero = schema_argument_or(node, "value", 0) in (None, 0)
            return [node.args[0]] if not pads or zero else []
        return []

    # ---- points
    def _points(self) -> list[Node]:
        """Nodes whose value is rounded, in graph order."""
        found: set[Node] = set()
        for node in self.calls:
            if self._is_kernel(node):
                if KERNELS[node.target] or node in self.demanded:
                    found.add(self._settle(node))
                found.add(node.args[0])  # type: ignore[arg-type]
            elif node in self.whole:
                found.add(self._settle(node))
                found.update(self.joined[node])
            elif node in self.demanded and any(self._on_grid(i, found) for i in self._carried(node)):
                found.add(node)
        return [n for n in (*self._inputs(), *self.calls) if n in found and n.name in self.float]

    def _inputs(self) -> Iterator[Node]:
        graph = self.calls[0].graph if self.calls else None
        return iter([n for n in graph.nodes if n.op == "placeholder"] if graph is not None else [])

    def _settle(self, node: Node) -> Node:
        """Where the value of ``node`` is rounded: after the clamp that alone reads it, if there is one."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            dropout = user.target in (aten.dropout.default, aten.feature_dropout.default)
            if not (dropout or (user.target in CLAMPS and CLAMPS[user.target](user))):
                break
            node = user
        return node

    def _on_grid(self, node: Node, found: set[Node]) -> bool:
        return node in found or (node.target in SPLITTERS and any(i in found for i in self._carried(node)))

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
            for source in self._carried(point):
                root = self._carried(source)[0] if source.target in SPLITTERS and self._carried(source) else source
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
        """What cuts a value off: None, or its clamp's upper end (the lower one is 0).

        Saturation stands for a clamp only where the grid ends with it: values cut off differently share no grid."""
        ends: dict[Node, float | None] = {}
        for node in self.calls:
            carried = self._carried(node)
            if node.target in CLAMPS and carried:
                ends[node] = UPPER_END.get(node.target, _upper_end)(node)
            elif node.target in SHARING and node in self.joined:
                found = {ends.get(given) for given in self.joined[node]}
                ends[node] = found.pop() if len(found) == 1 else None
            elif carried:
                ends[node] = ends.get(carried[0])
        return ends

    def _readers(self, point: Node, points: list[Node]) -> list[str]:
        """Whole-number calls read the rounded value. So does everybody else where a whole-number kernel gave it: the
        kernel has no float to give."""
        if point in self.supplied or any(i in self.supplied for i in self._carried(point)):
            return [u.name for u in point.users]
        found = []
        for user in point.users:
            splits = user.target in SPLITTERS and user in self.demanded
            carries = bool(self._carried(user)) and (user in points or splits)
            if self._is_kernel(user) or user in self.whole or carries:
                found.append(user.name)
        return found

    # ---- what stays float
    def _reasons(self, node: Node) -> Iterator[str]:
        if node.name not in self.float or self._is_kernel(node) or node in self.whole or node.target in WEIGHTED:
            return
        if node.target in JOINERS:
            yield ("no rounded values on both sides: whole numbers would cost more than they save"
                   if node in self.joined else f"{node.target} has no whole-number kernel in this form")
        elif not self._carried(node) and node.target not in CARRIERS:
            yield f"{node.target} has no whole-number kernel"
