"""What stands in the graph in the place of a shared weight: a lookup of a codebook by an index."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.judge.costs import alone, file_bytes
from featherweight.network import Network
from featherweight.network.edit import insert_call, node_name

aten = torch.ops.aten


def growth_of(network: Network, name: str, entries: int, zeros: bool) -> int:
    """By how many bytes the file grows where a weight gets a codebook; negative where it shrinks. Counted on the layer
    alone, with all entries used."""
    layer = alone(network, name)
    weight, after = layer.tensor(name).detach(), layer.copy()
    index = (torch.arange(weight.numel()) % entries).to(torch.uint8).view(weight.shape)
    put(after, name, weight.new_zeros(entries), index, zeros)
    return file_bytes(after) - file_bytes(layer)


def put(network: Network, name: str, codebook: Tensor, index: Tensor, zeros: bool) -> None:
    """Puts a lookup in the place of every reading of a weight, and a codebook and an index in the place of it."""
    weight = network.tensor(name)
    trains = isinstance(weight, nn.Parameter) and weight.requires_grad
    values = codebook[int(zeros):]
    names = network.tied_names(name)
    table, rows = f"{name}_codebook", f"{name}_index"
    network.add_tensor(table, nn.Parameter(values.clone(), requires_grad=trains))
    network.add_tensor(rows, index, buffer=True)
    reads = [n for n in network.graph.nodes if n.op == "get_attr" and n.target in names]
    looked_up = _lookup(network, table, rows, zeros, reads[0])
    for node in reads:
        node.replace_all_uses_with(looked_up)
        network.graph.erase_node(node)
    for name in names:
        network.remove_tensor(name)


def _lookup(network: Network, table: str, rows: str, zeros: bool, before: Node) -> Node:
    """The calls that give the weight: an embedding, since that is what a runtime's Gather takes over as it is."""
    graph, like = network.graph, next(iter(before.users))
    with graph.inserting_before(before):
        values = graph.create_node("get_attr", table, name=node_name(table))
        index = graph.create_node("get_attr", rows, name=node_name(rows))

    def call(target: object, *args: object) -> Node:
        return insert_call(network, target, args, before=before, like=like)

    if zeros:
        values = call(aten.constant_pad_nd.default, values, [1, 0], 0.0)
    column = call(aten.unsqueeze.default, values, 1)
    wide = call(aten.to.dtype, index, torch.int32)
    return call(aten.squeeze.dim, call(aten.embedding.default, column, wide), -1)


__all__ = ["growth_of", "put"]
