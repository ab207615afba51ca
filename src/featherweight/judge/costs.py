"""What a network costs, counted without a runtime: parameters, MACs, bytes in its file and in its archive, all exact.

What a change of one layer costs is counted on the layer alone: the network of the calls that read its weight. Such
changes add up over layers; the bytes of names and places in a file's header do to a few bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from featherweight import measure
from featherweight.codec import archive_bytes
from featherweight.judge.bench import readings
from featherweight.network import Network, trees
from featherweight.network.edit import constant_nodes
from featherweight.network.file.file import lengths
from featherweight.network.signature import Input, Signature
from featherweight.steps import Plan


def file_bytes(network: Network) -> int:
    """Length of the network's ``.fw`` file."""
    return lengths(network.snapshot())[0]


def tensor_bytes(network: Network) -> int:
    """Bytes of all tensors as they lie in the network's ``.fw`` file: tied ones once, few bits packed."""
    return lengths(network.snapshot())[1]


def macs(network: Network) -> int:
    """Multiply-accumulates of one sample."""
    return measure.macs(network).total


#: name -> what it counts
COSTS: dict[str, Callable[[Network], float]] = {
    "params": measure.params, "macs": macs, "tensor_bytes": tensor_bytes, "file_bytes": file_bytes,
    "archive_bytes": archive_bytes}
#: measures that a plan may say to grow -> what counts them
GROWS = {"params": "params", "macs": "macs", "bytes": "file_bytes"}


def changes(before: Network, plan: Plan, wanted: Collection[str]) -> dict[str, float]:
    """Name in ``COSTS`` -> by how much ``plan`` changes what ``before`` costs; negative where it saves."""
    after = plan.apply(before)
    return {name: COSTS[name](after) - COSTS[name](before) for name in wanted}


def growth(before: Network, after: Network, measures: Collection[str] = tuple(GROWS)) -> tuple[str, ...]:
    """Those of the ``measures`` (keys of ``GROWS``) that are larger of ``after``: what a plan's ``grows`` says."""
    return tuple(m for m in measures if COSTS[GROWS[m]](after) > COSTS[GROWS[m]](before))


def alone(network: Network, weight: str) -> Network:
    """The layer of a weight as a network of its own: the calls that read it, each an output, with all the tensors that
    they read; other values that they read are inputs, of one sample. Nodes and tensors keep their names."""
    graph, values = Graph(), network.values(1)
    constant = constant_nodes(network)
    calls = _readers(network, weight, constant)
    made: dict[Node, Node] = {}
    inputs: list[Input] = []

    def take(node: Node) -> Any:
        if node in made:
            return made[node]
        if isinstance(values[node.name], int):  # a size
            return values[node.name]
        if node.op == "get_attr":
            made[node] = graph.create_node("get_attr", node.target, name=node.name)
        elif node in constant or node in calls:
            args, kwargs = map_arg((node.args, node.kwargs), take)
            made[node] = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        else:
            made[node] = graph.create_node("placeholder", node.name, name=node.name)
            value = values[node.name]
            inputs.append(Input(node.name, tuple(value.shape), value.dtype, False))
        made[node].meta = dict(node.meta)
        return made[node]

    graph.create_node("output", "output", (tuple([take(call) for call in calls]),))
    _, in_spec = trees.flatten((tuple(range(len(inputs))), {}))
    _, out_spec = trees.flatten(tuple(range(len(calls))))
    found = Network(graph, Signature(in_spec, out_spec, tuple(inputs), {}))
    for name in {str(n.target) for n in graph.nodes if n.op == "get_attr"}:
        for tied in network.tied_names(name):
            if tied not in found.tensors():
                tensor = network.tensor(tied)
                found.add_tensor(tied, tensor, buffer=not isinstance(tensor, torch.nn.Parameter))
    found.patterns = {n: p for n, p in network.patterns.items() if n in found.tensors()}
    return found


def _readers(network: Network, weight: str, constant: Collection[Node]) -> list[Node]:
    """The calls in which a weight meets data, also where constants are computed from it before, in graph order."""
    reached = set(readings(network, weight))
    for node in network.calls():
        if node in constant and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return [n for n in network.calls() if n not in constant and not reached.isdisjoint(n.all_input_nodes)]


__all__ = ["COSTS", "GROWS", "alone", "changes", "file_bytes", "growth", "macs", "tensor_bytes"]
