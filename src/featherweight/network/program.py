"""Runs a graph: the nodes in order, one operator call each, values freed after their last use.

No source text is made or executed, so a graph that came out of a file can only do what its operators do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from featherweight.network.operators import TRAINING_FLAGS, schema_argument
from featherweight.network.recurrent import checked

Tap = Callable[[Any], Any]


@dataclass(frozen=True)
class Call:
    """One operator call of a program, ready to run; ``frees``: nodes whose values are needed no more after it."""

    node: Node
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    counter: str | None
    frees: tuple[Node, ...]


class Program:
    """A graph made ready to run, in training or in evaluation mode."""

    def __init__(self, graph: Graph, training: bool) -> None:
        self.inputs: list[Node] = []
        self.steps: list[Call | Node] = []
        self.outputs: Sequence[Any] = ()
        last_use: dict[Node, Node] = {}
        for node in graph.nodes:
            for used in node.all_input_nodes:
                last_use[used] = node
        frees: dict[Node, list[Node]] = {}
        for used, user in last_use.items():
            frees.setdefault(user, []).append(used)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.inputs.append(node)
            elif node.op == "get_attr":
                self.steps.append(node)
            elif node.op == "output":
                self.outputs = node.args[0]
            else:
                self.steps.append(_call(node, training, tuple(frees.get(node, ()))))

    def run(self, tensor: Callable[[str], Tensor], inputs: list[Tensor], taps: Mapping[str, list[Tap]]) -> list[Any]:
        """The outputs, flat. ``tensor`` looks tensors up by name."""
        values = self.begin(inputs, taps)
        self.go(values, 0, len(self.steps), tensor, taps)
        return self.end(values)

    def begin(self, inputs: list[Tensor], taps: Mapping[str, list[Tap]]) -> dict[Node, Any]:
        """The values before the first step: the inputs."""
        return {node: tapped(node, given, taps) for node, given in zip(self.inputs, inputs, strict=True)}

    def go(self, values: dict[Node, Any], start: int, stop: int, tensor: Callable[[str], Tensor],
           taps: Mapping[str, list[Tap]]) -> None:
        """Does the steps from ``start`` on, before ``stop``, out of ``values`` and into them."""
        for step in self.steps[start:stop]:
            if isinstance(step, Node):
                values[step] = tapped(step, tensor(str(step.target)), taps)
                continue
            args = [resolve(a, values.__getitem__) for a in step.args]
            kwargs = {k: resolve(v, values.__getitem__) for k, v in step.kwargs.items()} if step.kwargs else {}
            if step.counter is not None:
                share = _count(tensor(step.counter))
                if step.node.meta.get("cumulative"):
                    args[MOMENTUM] = share
            values[step.node] = tapped(step.node, step.target(*args, **kwargs), taps)
            for used in step.frees:
                del values[used]

    def end(self, values: Mapping[Node, Any]) -> list[Any]:
        """The outputs, once all steps are done."""
        return [resolve(o, values.__getitem__) for o in self.outputs]


def tapped(node: Node, value: Any, taps: Mapping[str, list[Tap]]) -> Any:
    """A node's value, passed through its taps."""
    for tap in taps.get(node.name, ()):
        instead = tap(value)
        value = value if instead is None else instead
    return value


def resolve(argument: Any, value: Callable[[Node], Any]) -> Any:
    """An argument of a call, nodes in it replaced by their values."""
    if isinstance(argument, Node):
        return value(argument)
    if isinstance(argument, (list, tuple)):
        return [resolve(a, value) for a in argument]
    if isinstance(argument, slice):
        return slice(*(resolve(a, value) for a in (argument.start, argument.stop, argument.step)))
    return argument


def _call(node: Node, training: bool, frees: tuple[Node, ...]) -> Call:
    """One call, its training flag flipped where the mode asks for it. A flag that was on at capture stays on."""
    args, kwargs, counter = tuple(node.args), dict(node.kwargs), None
    flag = TRAINING_FLAGS.get(node.target)
    if training and flag is not None and not schema_argument(node, flag):
        index = next(i for i, a in enumerate(node.target._schema.arguments) if a.name == flag)  # type: ignore[union-attr]
        if index < len(args):
            args = (*args[:index], True, *args[index + 1:])
        else:
            kwargs[flag] = True
        counter = node.meta.get("counter")
    return Call(node, checked(node.target), args, kwargs, counter, frees)


def _count(counted: Tensor) -> float:
    """Counts a batch as ``torch.nn.BatchNorm`` does; gives the weight of this batch in a cumulative average."""
    with torch.no_grad():
        counted.add_(1)
    return 1.0 / float(counted)


#: position of ``momentum`` among the arguments of ``aten.batch_norm``
MOMENTUM = 6
