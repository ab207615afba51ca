"""Calibration data in the middle of a graph: all batches wait at the same call, and what later calls read is held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

from torch import Tensor
from torch.fx import Node

from featherweight.network.devices import device_of
from featherweight.network.edit import stored_node
from featherweight.network.network import Network
from featherweight.network.program import Tap, resolve
from featherweight.task import Batch, Inputs, batch_size, call, move

BUDGET = 2 << 30  #: bytes of activations held between calls


@dataclass
class Waiting:
    """Calibration batches that wait until there is memory for what they hold, and the samples that wait no more."""

    batches: Iterator[Batch]
    samples: int = 0

    def admitted(self, sample_bytes: float) -> Iterator[Inputs]:
        """The inputs of the next batches that fit into ``BUDGET``, the very first batch in any case.

        sample_bytes: what is held of one sample, from here on.
        """
        for batch in self.batches:
            size = batch_size(batch[0])
            if self.samples and self.samples + size > BUDGET / max(1.0, sample_bytes):
                self.batches = chain([batch], self.batches)
                return
            self.samples += size
            yield batch[0]

    def left_out(self) -> str:
        """What is to be said of the batches that still wait; "" where none does."""
        batch = next(self.batches, None)
        if batch is None:
            return ""
        self.batches = chain([batch], self.batches)
        return (f"only the first {self.samples} samples were read: the values of more would take over "
                f"{BUDGET / 2**30:.3g} GiB")


@dataclass(frozen=True)
class Order:
    """The calls of a graph by number, and how long their activations are needed.

    number: a call's name -> its number. last: an activation's name -> number of the last call that reads it.
    freed: by number, the activations that no call after this one reads. size: an activation's name -> bytes of one
    sample. held: by number, bytes of one sample that are held before this call; one more entry for the graph's end.
    """

    calls: tuple[Node, ...]
    number: Mapping[str, int]
    last: Mapping[str, int]
    freed: tuple[tuple[str, ...], ...]
    size: Mapping[str, float]
    held: tuple[float, ...]

    @classmethod
    def of(cls, network: Network) -> Order:
        calls = tuple(n for n in network.calls() if stored_node(n) is None)
        number = {n.name: i for i, n in enumerate(calls)}
        last = {used.name: i for i, node in enumerate(calls) for used in node.all_input_nodes}
        args, kwargs = network.example_inputs()
        samples = max(1, next((t.shape[0] for t in network.signature.leaves(args, kwargs) if t.dim()), 1))
        size = {name: value.numel() * value.element_size() / samples
                for name, value in network.values().items() if isinstance(value, Tensor)}
        freed: list[list[str]] = [[] for _ in calls]
        change = [0.0] * (len(calls) + 1)
        for name, at in {**number, **last}.items():
            freed[at].append(name)
            if name in number:
                change[number[name] + 1] += size.get(name, 0.0)
                change[at + 1] -= size.get(name, 0.0)
        return cls(calls, number, last, tuple(map(tuple, freed)), size, tuple(accumulate(change)))

    def call(self, name: str) -> Node:
        return self.calls[self.number[name]]


def looked_up(node: Node, values: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> Any:
    """What a node gives: a stored tensor as it is now, turned around if the node turns it, or the value held of it."""
    stored = stored_node(node)
    if stored is None:
        return values[node.name]
    return tensor(str(stored.target)) if stored is node else tensor(str(stored.target)).t()


def run(nodes: Iterable[Node], values: dict[str, Any], tensor: Callable[[str], Tensor],
        taps: Mapping[str, Tap]) -> None:
    """Computes these calls, in order, out of the activations ``values`` (by node name) and into them.

    tensor: looks stored tensors up by name. taps: node name -> what its activation passes through.
    """
    def read(node: Node) -> Any:
        return looked_up(node, values, tensor)

    for node in nodes:
        args, kwargs = resolve(node.args, read), {k: resolve(v, read) for k, v in node.kwargs.items()}
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if node.name in taps:
            value = taps[node.name](value)
        values[node.name] = value


@dataclass
class Flow:
    """All calibration batches at the same call of one network.

    taps: node name -> what its activation passes through. batches: the activations still needed, by node name.
    done: number of calls that are done. kept: how often an activation is kept although no later call reads it.
    """

    network: Network
    order: Order
    taps: dict[str, Tap] = field(default_factory=dict)
    batches: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0
    kept: Counter[str] = field(default_factory=Counter)

    def add(self, inputs: Inputs) -> None:
        """Brings one more batch to where the others are."""
        self.take(call(lambda *args, **kwargs: self.network.signature.leaves(args, kwargs),
                       move(inputs, device_of(self.network))))

    def take(self, leaves: Sequence[Any]) -> None:
        """``add`` of a batch that is at hand as the tensor inputs of the network, on its device."""
        names = [n.name for n in self.network.graph.nodes if n.op == "placeholder"]
        values: dict[str, Any] = dict(zip(names, leaves, strict=True))
        self._run(values, 0, self.done)
        self.batches.append(values)

    # ---- going on
    def go_to(self, name: str) -> None:
        """Runs all calls before this one, if they are not done."""
        self._go(self.order.number[name])

    def go_past(self, name: str) -> None:
        """Runs all calls up to this one, if they are not done; nothing for an input of the network."""
        self._go(self.order.number.get(name, -1) + 1)

    def _go(self, until: int) -> None:
        if until > self.done:
            for values in self.batches:
                self._run(values, self.done, until)
            self.done = until

    def _run(self, values: dict[str, Any], start: int, stop: int) -> None:
        for node, freed in zip(self.order.calls[start:stop], self.order.freed[start:stop], strict=True):
            run((node,), values, self.network.tensor, self.taps)
            for name in freed:
                if not self.kept[name]:
                    values.pop(name, None)

    def ahead(self) -> Flow:
        """The same batches at the same call, which may go ahead while these stay."""
        return replace(self, batches=[dict(values) for values in self.batches], kept=Counter())

    # ---- activations
    def keep(self, names: Iterable[str]) -> None:
        """Keeps activations beyond their last use; once more for a name that is kept already."""
        self.kept.update(names)

    def release(self, names: Collection[str]) -> None:
        """Releases kept activations."""
        self.kept.subtract(names)
        self.kept = +self.kept
        for name in names:
            if not self.kept[name] and self.order.last.get(name, -1) < self.done:
                for values in self.batches:
                    values.pop(name, None)

    def gave(self, name: str) -> list[Tensor]:
        """The activation that node ``name`` gave, batch by batch."""
        return [values[name] for values in self.batches]

    def change(self, name: str, by: Callable[[Tensor], Tensor]) -> None:
        """Puts ``by(activation)`` in the place of an activation, for the calls that read it later on."""
        for values in self.batches:
            values[name] = by(values[name])

    def reads(self, name: str, argument: int = 0) -> list[Tensor]:
        """What call ``name`` reads as this positional argument, batch by batch."""
        given = self.order.call(name).args[argument]
        assert isinstance(given, Node)
        if given.op == "get_attr":
            return [self.network.tensor(str(given.target))] * len(self.batches)
        return self.gave(given.name)


__all__ = ["BUDGET", "Flow", "Order", "Waiting", "run"]
