"""Where a graph reads its stored tensors, looked for once."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node


class Reads:
    """The ``get_attr`` nodes of every tensor. A walk over the graph for each tensor would take the square of the nodes;
    this takes one as often as nodes that read tensors came or went, which is checked at every question."""

    def __init__(self) -> None:
        self._all: list[Node] = []
        self._by_name: dict[str, list[Node]] = {}

    def nodes(self, graph: Graph, names: Iterable[str]) -> list[Node]:
        """The nodes that read tensors of these names, in the order of the graph."""
        now = graph.find_nodes(op="get_attr", sort=False)
        if now != self._all:
            self._note(now)
        found = [n for name in dict.fromkeys(names) for n in self._by_name.get(name, ()) if not n._erased]
        return sorted(found) if len(found) > 1 else found

    def _note(self, now: list[Node]) -> None:
        """torch's table has nodes in the order in which they came."""
        known = [node for node in self._all if not node._erased]
        new = now[len(known):]
        if now[:len(known)] != known:
            self._by_name, new = {}, now
        for node in new:
            self._by_name.setdefault(str(node.target), []).append(node)
        self._all = now


__all__ = ["Reads"]
