"""A network called on the same inputs again and again, with other taps each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from featherweight.network import trees
from featherweight.network.operators import TRAINING_FLAGS, is_random, mutates
from featherweight.network.program import Program, Tap, tapped
from featherweight.network.signature import Signature

HELD = 2 << 30  #: bytes of values held for all inputs


@dataclass(frozen=True)
class Halt:
    """A run without taps that halted before step number ``at``: the inputs, and the values that later steps read."""

    inputs: list[Tensor]
    at: int
    values: dict[Node, Any]
    bytes: int


class Replay:
    """The network in evaluation mode: its calls before the first one that a tap reaches are done once for each inputs.

    It remembers where it halted for the very tensors that it was given before, so that asking for taps in graph order
    does the least work. The graph and the tensors, weights and inputs, must stay as they are. A graph that writes into
    its values or draws numbers is run as a whole.
    """

    def __init__(self, graph: Graph, signature: Signature, tensor: Callable[[str], Tensor],
                 taps: Mapping[str, list[Tap]]) -> None:
        self._program, self._signature, self._tensor, self._taps = Program(graph, False), signature, tensor, taps
        self._nodes = {n.name: n for n in graph.nodes}
        number = {s if isinstance(s, Node) else s.node: i for i, s in enumerate(self._program.steps)}
        self._reached = {n.name: _reached(n, number) for n in graph.nodes}
        self._whole = any(mutates(n) or (is_random(n) and n.target not in TRAINING_FLAGS) for n in number)
        self._halts: dict[tuple[int, ...], Halt] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._signature.leaves(args, kwargs)
        start = 0 if self._whole else min((self._reached[name] for name in self._taps), default=0)
        values = self._before(inputs, start)
        for node in (self._nodes[name] for name in self._taps):
            if node in values:
                values[node] = tapped(node, values[node], self._taps)
        self._program.go(values, start, len(self._program.steps), self._tensor, self._taps)
        return trees.unflatten(self._program.end(values), self._signature.out_spec)

    def _before(self, inputs: list[Tensor], stop: int) -> dict[Node, Any]:
        """The values before step number ``stop``, without taps."""
        key = tuple(id(t) for t in inputs)
        halt = self._halts.pop(key, None)
        if halt is None or halt.at > stop:
            halt = Halt(inputs, 0, self._program.begin(inputs, {}), 0)
        values = dict(halt.values)
        self._program.go(values, halt.at, stop, self._tensor, {})
        size = sum(v.nbytes for n, v in values.items() if isinstance(v, Tensor) and n.op != "get_attr")
        if stop and size + sum(h.bytes for h in self._halts.values()) <= HELD:
            self._halts[key] = Halt(inputs, stop, dict(values), size)
        return values


def _reached(node: Node, number: Mapping[Node, int]) -> int:
    """The number of the first step that computes something else where ``node`` is tapped."""
    if node.op == "get_attr":
        return min((number[u] for u in node.users if u in number), default=number[node])
    return number.get(node, 0)
