"""Small edits that several techniques share: on nodes, and on the tensors they read."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from featherweight.network.network import Network
from featherweight.network.operators import ASSERTIONS, mutates
from featherweight.network.program import resolve

aten = torch.ops.aten

#: operators with a weight, and where their (input, weight, bias) stand among the arguments
WEIGHTED: dict[Any, tuple[int, int, int]] = {
    aten.linear.default: (0, 1, 2),
    aten.conv1d.default: (0, 1, 2),
    aten.conv2d.default: (0, 1, 2),
    aten.conv3d.default: (0, 1, 2),
    aten.conv1d.padding: (0, 1, 2),
    aten.conv2d.padding: (0, 1, 2),
    aten.conv3d.padding: (0, 1, 2),
    aten.conv_transpose1d.default: (0, 1, 2),
    aten.conv_transpose2d.input: (0, 1, 2),
    aten.conv_transpose3d.input: (0, 1, 2),
}
CONVOLUTIONS = {t for t in WEIGHTED if "conv" in str(t)}
TRANSPOSED = {t for t in WEIGHTED if "conv_transpose" in str(t)}


def weight_node(node: Node) -> Node | None:
    """The node of the stored weight that a linear or convolution call reads, also turned around (``aten.t``) by a
    linear one; None if the weight is computed."""
    given = _argument(node, 1)
    return stored_node(given) if node.target is aten.linear.default else _stored(given)


def weight_name(node: Node) -> str | None:
    """The name of the stored weight that a linear or convolution call reads; None if it is computed."""
    found = weight_node(node)
    return None if found is None else str(found.target)


def bias_name(node: Node) -> str | None:
    """The name of the stored bias that a linear or convolution call reads; None if there is none, or it is computed."""
    found = _stored(_argument(node, 2))
    return None if found is None else str(found.target)


def turned(node: Node) -> bool:
    """Whether a linear call reads its weight turned around: stored [i, o], as GPT-2's ``Conv1D`` has it, not [o, i]."""
    found = weight_node(node)
    return found is not None and found is not _argument(node, 1)


def out_axis(node: Node) -> int:
    """The axis of the stored weight along which the outputs of a linear or convolution call lie."""
    return int(node.target in TRANSPOSED or turned(node))


def _argument(node: Node, which: int) -> Any:
    index = WEIGHTED[node.target][which] if node.target in WEIGHTED else len(node.args)
    return node.args[index] if index < len(node.args) else None


def _stored(argument: Any) -> Node | None:
    return argument if isinstance(argument, Node) and argument.op == "get_attr" else None


def stored_node(argument: Any) -> Node | None:
    """The node of the stored tensor that an argument is, as it lies or turned around (``aten.t``); None if computed."""
    turns = isinstance(argument, Node) and argument.target is aten.t.default
    return _stored(argument.args[0] if turns else argument)


def readers_of(network: Network, name: str) -> list[Node]:
    """The calls that read the tensor ``name`` under any of its tied names, as it is or turned around (``aten.t``)."""
    return [reader for user in network.users_of(name)
            for reader in (user.users if user.target is aten.t.default else [user])]


def tensor_node(network: Network, name: str, before: Node) -> Node:
    """The node that reads tensor ``name``, made before ``before`` if the graph has none earlier than it."""
    made: Node
    for made in network.graph.nodes:
        if made is before:
            break
        if made.op == "get_attr" and made.target == name:
            return made
    with network.graph.inserting_before(before):
        made = network.graph.create_node("get_attr", name, name=node_name(name))
    return made


def node_name(name: str) -> str:
    """A tensor's dotted name as a node may be called."""
    return re.sub(r"\W", "_", name if not name[:1].isdigit() else f"_{name}")


def insert_call(network: Network, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *,
                after: Node | None = None, before: Node | None = None, like: Node | None = None,
                name: str | None = None) -> Node:
    """A new call placed after or before a node; it inherits the module path and source line of ``like``. name: what it
    is called, if that is free."""
    graph = network.graph
    place = graph.inserting_after(after) if after is not None else graph.inserting_before(before)
    with place:
        node = graph.create_node("call_function", target, args, kwargs or {}, name=name)
    origin = like or after or before
    if origin is not None:
        node.meta = {k: origin.meta[k] for k in ("module", "source") if k in origin.meta}
    return node


def drop_unread(network: Network, names: list[str]) -> None:
    """Removes those of ``names`` that no node reads any more, and their reading nodes."""
    for node in reversed(list(network.graph.nodes)):
        if node.op == "get_attr" and node.target in names and not node.users:
            network.graph.erase_node(node)
    unread = network.tensors().keys() - read_tensors(network)
    for name in names:
        if name in unread:
            network.remove_tensor(name)
    network.changed()


def clear_dead(network: Network, before: set[str] | None = None) -> None:
    """Removes dead calls, and every tensor that was read before the edit (``before``) and is not any more."""
    remove_dead(network.graph)
    if before is not None:
        drop_unread(network, sorted(before - read_tensors(network)))
        _drop_batch_counters(network)
    network.changed()


def constant_nodes(network: Network) -> set[Node]:
    """The nodes that depend on no input."""
    constant: set[Node] = set()
    for node in network.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(n in constant for n in node.all_input_nodes)):
            constant.add(node)
    return constant


@torch.no_grad()
def stored_value(network: Network, node: Node) -> Any:
    """What a node gives that is computed of stored tensors alone."""
    if node.op == "get_attr":
        return network.tensor(str(node.target)).detach()
    args, kwargs = (resolve(given, partial(stored_value, network)) for given in (node.args, list(node.kwargs.values())))
    return node.target(*args, **dict(zip(node.kwargs, kwargs, strict=True)))  # type: ignore[operator]


def origins(node: Node) -> set[Node]:
    """All nodes that a node is computed from, and itself."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo += one.all_input_nodes
    return found


def read_tensors(network: Network) -> set[str]:
    """Names of the tensors that the graph reads."""
    return {str(n.target) for n in network.graph.nodes if n.op == "get_attr"}


def _drop_batch_counters(network: Network) -> None:
    """A batch counter whose running mean is gone goes too."""
    known = network.tensors()
    for name in known:
        if name.endswith("num_batches_tracked") and name.replace("num_batches_tracked", "running_mean") not in known:
            network.remove_tensor(name)


def constant_value(network: Network, node: Any) -> Tensor | None:
    """The tensor behind a ``get_attr`` node, else None."""
    return network.tensor(str(node.target)) if isinstance(node, Node) and node.op == "get_attr" else None


def remove_dead(graph: Graph) -> None:
    """Removes calls that nobody reads and that write nothing, and tensors that nobody reads."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if node.op == "call_function" and node.target not in ASSERTIONS and mutates(node):
            continue
        graph.erase_node(node)
