"""Running a graph in parts: a batch goes from call to call, and what is still needed of it is kept between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from featherweight.network.devices import device_of
from featherweight.network.edit import stored_node
from featherweight.network.network import Network
from featherweight.network.program import Tap
from featherweight.task import Batch, Inputs, batch_size, call, move

BUDGET = 2 << 30  #: bytes of values kept between calls


def fitting(batches: Iterable[Batch], sample_bytes: float) -> tuple[list[Inputs], str]:
    """The inputs of the first batches, at least one, whose values may be held at once; and what is to be said of
    those left out ("": all fit). sample_bytes: what is held of one sample."""
    room = BUDGET / max(1.0, sample_bytes)
    kept: list[Inputs] = []
    samples = 0
    for inputs, _ in batches:
        if kept and samples + batch_size(inputs) > room:
            return kept, (f"only the first {samples} samples were read: the values of more would take over "
                          f"{BUDGET / 2**30:.3g} GiB")
        kept.append(inputs)
        samples += batch_size(inputs)
    return kept, ""


def looked_up(node: Node, values: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> Any:
    """What a node gives: a stored tensor as it is now, turned around if the node turns it, or the value held of it."""
    stored = stored_node(node)
    if stored is None:
        return values[node.name]
    return tensor(str(stored.target)) if stored is node else tensor(str(stored.target)).t()


def run(nodes: Iterable[Node], values: dict[str, Any], tensor: Callable[[str], Tensor],
        taps: Mapping[str, Tap]) -> None:
    """Computes these calls, in order, out of ``values`` (by node name) and into them; ``tensor`` looks tensors up."""
    def get(argument: Any) -> Any:
        return map_arg(argument, lambda n: looked_up(n, values, tensor))

    for node in nodes:
        value = node.target(*get(node.args), **get(node.kwargs))  # type: ignore[operator]
        if node.name in taps:
            value = taps[node.name](value)
        values[node.name] = value


class Order:
    """The calls of a graph by number, the last call that reads each value, and the size of each value in bytes."""

    def __init__(self, network: Network) -> None:
        self.calls = [n for n in network.calls() if stored_node(n) is None]
        self.named = {n.name: n for n in self.calls}
        self.number = {n.name: i for i, n in enumerate(self.calls)}
        self.last = {used.name: i for i, node in enumerate(self.calls) for used in node.all_input_nodes}
        args, kwargs = network.example_inputs()
        samples = max(1, next((t.shape[0] for t in network.signature.leaves(args, kwargs) if t.dim()), 1))
        self.size = {name: value.numel() * value.element_size() / samples
                     for name, value in network.values().items() if isinstance(value, Tensor)}

    def held(self, before: int) -> float:
        """Bytes for one sample of the values that are held before call number ``before``."""
        return sum(self.size.get(n.name, 0) for i, n in enumerate(self.calls[:before])
                   if self.last.get(n.name, -1) >= before)


@dataclass
class Half:
    """One batch on its way through one network: how many calls are done, and the values still needed.

    taps: node name -> what its value passes through.
    """

    network: Network
    order: Order
    values: dict[str, Any]
    done: int = 0
    taps: Mapping[str, Tap] = field(default_factory=dict)

    def get(self, argument: Any) -> Any:
        return map_arg(argument, lambda n: looked_up(n, self.values, self.network.tensor))

    def advance(self, until: int, wanted: set[str]) -> None:
        """Runs the calls before number ``until``; values are dropped after their last use unless ``wanted``."""
        for index in range(self.done, until):
            node = self.order.calls[index]
            run([node], self.values, self.network.tensor, self.taps)
            for used in (*node.all_input_nodes, node):
                if self.order.last.get(used.name, -1) <= index and used.name not in wanted:
                    self.values.pop(used.name, None)
        self.done = max(self.done, until)

    def split(self) -> Half:
        """A second one, at the same place."""
        return Half(self.network, self.order, dict(self.values), self.done, self.taps)

    def forget(self, name: str) -> None:
        """A value that was wanted is so no more."""
        if self.order.last.get(name, -1) < self.done:
            self.values.pop(name, None)


def input_values(network: Network, inputs: Inputs) -> dict[str, Tensor]:
    """A batch's tensors by the names of the network's inputs, on its device."""
    names = [n.name for n in network.graph.nodes if n.op == "placeholder"]
    device = device_of(network)
    leaves = call(lambda *args, **kwargs: network.signature.leaves(args, kwargs), move(inputs, device))
    return dict(zip(names, leaves, strict=True))


__all__ = ["BUDGET", "Half", "Order", "fitting", "input_values", "run"]
