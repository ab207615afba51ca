"""What follows from a network's graph and the shapes of its tensors: found once, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph


@dataclass(frozen=True)
class Structure:
    """All that shapes follow from: every node with its arguments, every tensor's name, ties, type and layout.

    Two forms are equal where the same nodes have the same arguments still: a node's arguments are replaced, never
    changed in place.
    """

    nodes: list[Any]
    tensors: list[Any]

    @classmethod
    def of(cls, graph: Graph, tensors: Mapping[str, Tensor]) -> Structure:
        nodes: list[Any] = []
        for node in graph.nodes:
            nodes += (node, node.name, node.target, node.args, node.kwargs)
        first: dict[int, str] = {}
        return cls(nodes, [(name, first.setdefault(id(t), name), type(t), t.dtype, t.device, t.requires_grad, t.shape,
                            t.stride() if t.layout is torch.strided else ()) for name, t in tensors.items()])


class Facts:
    """Results by key, and the form of the network that they were found for."""

    def __init__(self, form: Structure | None = None, found: Mapping[Hashable, Any] | None = None) -> None:
        self._form = form
        self._found = dict(found or {})

    def get(self, form: Structure, key: Hashable, find: Callable[[], Any]) -> Any:
        """What ``find`` gave for a network of this form, asked once."""
        if form != self._form:
            self._form, self._found = form, {}
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def carried(self, form: Structure, other: Structure) -> Facts:
        """The same results for a copy of the network, which has this ``form``; the copy's is ``other``. None where a
        tensor's copy lies otherwise in memory."""
        return Facts(other, self._found) if form == self._form and form.tensors == other.tensors else Facts()
