"""What stands in the graph in the place of a shared weight: a lookup of a codebook by an index."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.judge.costs import alone, file_bytes
from featherweight.network import Network
from featherweight.network.edit import insert_call, node_name

aten = torch.ops.aten


def growth_of(network: Network, name: str, entries: int, zeros: bool, axis: int | None = None) -> int:
    """By how many bytes the file grows where a weight gets a codebook (along ``axis``: one for each position); negative
    where it shrinks. Counted on the layer alone, with all entries used."""
    layer = alone(network, name)
    weight, after = layer.tensor(name).detach(), layer.copy()
    index = (torch.arange(weight.numel()) % entries).to(torch.uint8).view(weight.shape)
    codebook = weight.new_zeros(entries) if axis is None else weight.new_zeros(weight.shape[axis], entries)
    put(after, name, codebook, index, zeros, axis)
    return file_bytes(after) - file_bytes(layer)


def put(network: Network, name: str, codebook: Tensor, index: Tensor, zeros: bool, axis: int | None = None) -> None:
    """Puts a lookup in the place of every reading of a weight, and a codebook and an index in the place of it.

    codebook: [k]; or with an ``axis`` [c, k], one codebook for each of the c positions on this axis of the weight.
    """
    weight = network.tensor(name)
    trains = isinstance(weight, nn.Parameter) and weight.requires_grad
    values = codebook[..., int(zeros):]
    names = network.tied_names(name)
    table, rows, places = f"{name}_codebook", f"{name}_index", ""
    network.add_tensor(table, nn.Parameter(values.clone(), requires_grad=trains))
    network.add_tensor(rows, index, buffer=True)
    if axis is not None:
        places = f"{name}_places"
        first = torch.arange(codebook.shape[0], dtype=torch.int32, device=index.device) * codebook.shape[1]
        network.add_tensor(places, first.view([-1 if d == axis else 1 for d in range(index.dim())]), buffer=True)
    reads = network.reads_of(name)
    looked_up = _lookup(network, table, rows, places, zeros, reads[0])
    for node in reads:
        node.replace_all_uses_with(looked_up)
        network.graph.erase_node(node)
    for name in names:
        network.remove_tensor(name)


def _lookup(network: Network, table: str, rows: str, places: str, zeros: bool, before: Node) -> Node:
    """The calls that give the weight: an embedding, since that is what a runtime's Gather takes over as it is. places:
    the tensor that says where each channel's codebook begins; "" where there is one for all."""
    graph, like = network.graph, next(iter(before.users))
    with graph.inserting_before(before):
        values, index, *first = (graph.create_node("get_attr", name, name=node_name(name))
                                 for name in (table, rows, places) if name)

    def call(target: object, *args: object) -> Node:
        return insert_call(network, target, args, before=before, like=like)

    if zeros:
        values = call(aten.constant_pad_nd.default, values, [1, 0], 0.0)
    column = call(aten.reshape.default, values, [-1, 1]) if first else call(aten.unsqueeze.default, values, 1)
    wide = call(aten.to.dtype, index, torch.int32)
    if first:
        wide = call(aten.add.Tensor, wide, first[0])
    return call(aten.squeeze.dim, call(aten.embedding.default, column, wide), -1)


__all__ = ["growth_of", "put"]
