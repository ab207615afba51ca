"""Which values of a graph may lie in the same memory."""

from __future__ import annotations

from collections import deque

from torch.fx import Graph, Node

from featherweight.network.operators import returns_view


class Memory:
    """Which values may share memory. ``bases(node)``: the calls, inputs and tensors whose memory a value may lie in."""

    def __init__(self, graph: Graph) -> None:
        self._bases: dict[Node, frozenset[Node]] = {}
        self._members: dict[Node, dict[Node, None]] = {}
        for node in graph.nodes:
            self._place(node)

    def bases(self, node: Node) -> frozenset[Node]:
        return self._bases[node]

    def sharing(self, node: Node) -> set[Node]:
        """All values that may share memory with ``node``'s, itself among them."""
        return {member for base in self._bases[node] for member in self._members[base]}

    def update(self, nodes: list[Node]) -> None:
        """To be called after the operators or arguments of ``nodes`` changed: their views follow."""
        waiting = deque(nodes)
        while waiting:
            node = waiting.popleft()
            before = self._bases.get(node)
            self._place(node)
            if before != self._bases[node]:
                waiting += [u for u in node.users if u.op == "call_function" and returns_view(u)]

    def _place(self, node: Node) -> None:
        for base in self._bases.get(node, ()):
            self._members[base].pop(node, None)
        bases = frozenset({node})
        if node.op == "call_function" and returns_view(node):
            bases = frozenset(b for used in node.all_input_nodes for b in self._bases[used]) or bases
        self._bases[node] = bases
        for base in bases:
            self._members.setdefault(base, {})[node] = None
