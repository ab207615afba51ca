"""Weights that a model computes from its parameters (weight_norm, pruning masks, LoRA), made stored ones.

In evaluation such a weight is a constant. Stored as one it can be pruned, factorized and quantized like any other, and
the deployed file computes nothing anew. Training goes on from the same weight, without the parametrization.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from featherweight.network.edit import WEIGHTED, constant_nodes, drop_unread, node_name, origins, remove_dead
from featherweight.network.network import Network
from featherweight.network.operators import is_random, mutates, returns_view

aten = torch.ops.aten

#: operator -> its arguments that are weights, by position, and what each is called where it needs a name
READS: dict[Any, dict[int, str]] = {
    **{target: {weight: "weight", bias: "bias"} for target, (_, weight, bias) in WEIGHTED.items()},
    aten.embedding.default: {0: "weight"},
    aten.matmul.default: {0: "weight", 1: "weight"}, aten.mm.default: {0: "weight", 1: "weight"},
    aten.addmm.default: {0: "bias", 2: "weight"}, aten.bmm.default: {1: "weight"},
    aten.lstm.input: {2: "weight"}, aten.gru.input: {2: "weight"}, aten.rnn_tanh.input: {2: "weight"},
    aten.rnn_relu.input: {2: "weight"},
}
#: operators that only lay stored elements side by side
JOINS = {aten.cat.default, aten.stack.default, aten.clone.default, aten.contiguous.default, aten.reshape.default}


@dataclass(frozen=True)
class ComputedWeight:
    """A weight that a call computes from stored tensors: the node that gives it, its name as a stored tensor, the
    tensors it is made of, and whether a mask of zeros and ones is among them."""

    node: Node
    name: str
    leaves: tuple[str, ...]
    masked: bool


def store_computed_weights(network: Network) -> None:
    """Stores every weight that is computed from parameters, in evaluation, in the place of what it is computed from.

    A weight that other calls need as well, or whose parameters together have fewer elements than it, stays as it is.
    Zeros of a mask are kept in training (``Network.patterns``). ``Network.notes`` lists what was stored.
    """
    found = list(_computed_weights(network))
    values = _values(network, found)
    found = [weight for weight in found if values[weight.node].numel() <= _parts(network, weight)]
    if not found:
        return
    for weight in found:
        _store(network, weight, values[weight.node])
    remove_dead(network.graph)
    parts = {name for weight in found for name in weight.leaves} & set(network.tensors())
    drop_unread(network, sorted(name for part in parts for name in network.tied_names(part)))
    named = ", ".join(f"{w.name} (from {', '.join(w.leaves)})" for w in found)
    network.notes.append(f"computed weights are stored as they are in evaluation: {named}; to train what they are "
                         "computed from, write capture(..., keep_parametrizations=True)")


def _computed_weights(network: Network) -> Iterator[ComputedWeight]:
    constant, taken = constant_nodes(network), set(network.tensors())
    reads = {node: (call, what) for call in network.calls(*READS) if call not in constant
             for node, what in _weights_of(call) if node in constant and node.op == "call_function"}
    for node, (call, what) in reads.items():
        inside = origins(node)
        leaves = {str(n.target): network.tensor(str(n.target)) for n in inside if n.op == "get_attr"}
        if _is_arithmetic(inside) and _is_all_its_own(network, node, inside, leaves):
            name = _free_name(call, what, node, set(leaves), taken)
            taken.add(name)
            yield ComputedWeight(node, name, tuple(sorted(leaves)), any(map(_is_mask, leaves.values())))


def _parts(network: Network, weight: ComputedWeight) -> int:
    """Elements of the parameters that a weight is computed from."""
    leaves = [network.tensor(name) for name in weight.leaves]
    return sum(tensor.numel() for tensor in leaves if isinstance(tensor, nn.Parameter))


def _weights_of(call: Node) -> Iterator[tuple[Node, str]]:
    for index, what in READS[call.target].items():
        given: Any = call.args[index] if index < len(call.args) else None
        yield from ((n, what) for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, Node))


def _is_arithmetic(inside: set[Node]) -> bool:
    """Whether more is done than moving elements, and the same at every run."""
    calls = [n for n in inside if n.op == "call_function"]
    return not all(returns_view(n) or n.target in JOINS for n in calls) and not any(
        is_random(n) or mutates(n) for n in calls)


def _is_all_its_own(network: Network, node: Node, inside: set[Node], leaves: dict[str, Tensor]) -> bool:
    """Whether the parameters that a weight is computed from serve nothing else, by any of their names."""
    parameters = [name for name, tensor in leaves.items() if isinstance(tensor, nn.Parameter)]
    within = inside - {node}
    return bool(parameters) and all(user in inside for name in parameters for user in network.users_of(name)) and all(
        user in inside for n in within if n.op == "call_function" for user in n.users)


def _is_mask(tensor: Tensor) -> bool:
    if isinstance(tensor, nn.Parameter) or tensor.numel() < 2:
        return False
    return bool(((tensor == 0) | (tensor == 1)).all()) and not bool(tensor.all())


def _free_name(call: Node, what: str, node: Node, leaves: set[str], taken: set[str]) -> str:
    """The call's module with "weight" or "bias" behind it, as torch names a plain weight; else the node's own name."""
    path = str(call.meta.get("module", ""))
    first = f"{path}.{what}" if path else what
    known = {name for tensor in taken for name in _prefixes(tensor)}
    return next(n for n in (first, f"{first}_{node.name}", node.name, f"{node.name}_stored")
                if (n in leaves or n not in taken) and n not in known and not set(_prefixes(n)) & taken)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _values(network: Network, found: list[ComputedWeight]) -> dict[Node, Tensor]:
    """What the nodes give, computed once from the stored tensors."""
    values: dict[Node, Any] = {}
    wanted: set[Node] = set().union(*(origins(w.node) for w in found))
    with torch.no_grad():
        for node in network.graph.nodes:
            if node in wanted and node.op == "get_attr":
                values[node] = network.tensor(str(node.target)).detach()
            elif node in wanted:
                values[node] = node.target(*map_arg(node.args, values.__getitem__),
                                           **map_arg(node.kwargs, values.__getitem__))
    return {w.node: values[w.node] for w in found}


def _store(network: Network, weight: ComputedWeight, value: Tensor) -> None:
    if weight.name in weight.leaves:  # it takes the place of one of its parts, which is read no more
        network.remove_tensor(weight.name)
    network.add_tensor(weight.name, nn.Parameter(value.clone().contiguous()))
    if weight.masked:
        network.patterns[weight.name] = "single"
    with network.graph.inserting_before(weight.node):
        read = network.graph.create_node("get_attr", weight.name, name=node_name(weight.name))
    weight.node.replace_all_uses_with(read)


__all__ = ["store_computed_weights"]
