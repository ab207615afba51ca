"""A network on the bench: parts of it stand in other forms for a while, by taps; nothing is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import TaskError
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.network.edit import insert_call
from featherweight.network.program import Tap
from featherweight.task import Batch, Task, move

aten = torch.ops.aten
#: from a tensor, what stands in its place
Instead = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """Another form of some parts of a network: what stands in the place of tensors, of what calls read, of nodes.

    weights: stored tensor's name (any of its tied ones) -> its instead. inputs: call's name -> the instead of the first
    value that it reads, for this call alone. nodes: node's name -> its tap. reads: the number format of ``inputs``, ""
    where activations stay as they are.
    """

    weights: Mapping[str, Instead] = field(default_factory=dict)
    inputs: Mapping[str, Instead] = field(default_factory=dict)
    nodes: Mapping[str, Tap] = field(default_factory=dict)
    reads: str = ""


@contextmanager
def standing(network: Network, *forms: Form) -> Iterator[None]:
    """For a while, the parts of ``network`` are in these forms, the later ones put upon the earlier ones.

    What stands instead of a weight is computed once. Forms with ``inputs`` need a ``Bench``.
    """
    with ExitStack() as stack:
        for form in forms:
            for name, instead in form.weights.items():
                once = _once(instead)
                stack.enter_context(network.taps({node.name: once for node in readings(network, name)}))
            stack.enter_context(network.taps(form.nodes))
        yield


def readings(network: Network, name: str) -> list[Node]:
    """The nodes that give the tensor ``name``, under any of its tied names."""
    tied = set(network.tied_names(name))
    return [n for n in network.graph.find_nodes(op="get_attr") if n.target in tied]


def bypass(source: str, output: str) -> Form:
    """The form in which node ``output`` gives what node ``source`` gave."""
    held: dict[str, Any] = {}

    def keep(value: Any) -> None:
        held["x"] = value

    return Form(nodes={source: keep, output: lambda value: held.pop("x")})


class Bench:
    """A copy of a network in evaluation mode, and batches of one split; ``forms`` are all those that will be put.

    original: the network whose outputs the others are held against; None: this one, with nothing put.
    """

    def __init__(self, network: Network, task: Task, split: str, batches: int | None, forms: Iterable[Form] = (),
                 original: Network | None = None) -> None:
        self.network, self.task, self.split, self.limit = network.copy().eval(), task, split, batches
        self.original = self.network if original is None else original.copy().eval()
        calls = dict.fromkeys(call for form in forms for call in form.inputs)
        self.read = {call: self._copied(call) for call in calls}
        #: the network on the same batches again and again: what comes before the forms is computed once
        self.run = self.network.replay()

    def _copied(self, name: str) -> str:
        """A copy of what a call reads first, for this call alone, so that it can be tapped."""
        node = self.network.node(name)
        given = node.args[0]
        assert isinstance(given, Node)
        copy = insert_call(self.network, aten.alias.default, (given,), before=node, like=node)
        node.args = (copy, *node.args[1:])
        self.network.changed()
        return copy.name

    def batches(self) -> list[Batch]:
        """The batches, on the network's device. Raises TaskError where the split is missing or empty."""
        device = device_of(self.network)
        found = [(move(x, device), move(y, device)) for x, y in self.task.batches(self.split, self.limit)]
        if not found:
            raise TaskError(f"the {self.split} split is empty; damage is measured on data: "
                            f"Task({self.split}=lambda: my_batches, ...)")
        return found

    @contextmanager
    def put(self, *forms: Form) -> Iterator[None]:
        """For a while, the network is in these forms."""
        with standing(self.network, *forms), ExitStack() as stack:
            for form in forms:
                stack.enter_context(self.network.taps({self.read[c]: tap for c, tap in form.inputs.items()}))
            yield

    def away(self, form: Form) -> dict[str, float]:
        """Tensor's name -> |W' - W|^2 of what stands in its place."""
        found = {}
        for name, instead in form.weights.items():
            weight = self.network.tensor(name).detach()
            found[name] = float((instead(weight) - weight).double().square().sum())
        return found


def _once(instead: Instead) -> Tap:
    """A tap that computes anew only where it is given another tensor than before."""
    last: list[Tensor] = []

    def tap(value: Tensor) -> Tensor:
        if not last or last[0] is not value:
            last[:] = [value, instead(value.detach())]
        return last[1]

    return tap


__all__ = ["Bench", "Form", "Instead", "bypass", "readings", "standing"]
