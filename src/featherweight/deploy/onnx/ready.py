"""Calls of a graph brought into forms that the ONNX exporter takes, exactly; on a copy of the network."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import (
    WEIGHTED,
    clear_dead,
    constant_nodes,
    insert_call,
    read_tensors,
    stored_value,
    tensor_node,
)
from featherweight.network.operators import schema_argument

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

#: so many numbers less than a byte has are no matter: symmetric grids leave out the lowest
NEARLY = 254


def cut_off(network: Network) -> None:
    """Rounding to a grid of fewer numbers than a byte has says so in a clamp: ONNX rounds to all that the type has."""
    for node in network.calls(decomposed.quantize_per_tensor.default):
        low, high, dtype = (schema_argument(node, name) for name in ("quant_min", "quant_max", "dtype"))
        if high - low >= NEARLY or dtype not in (torch.int8, torch.uint8):
            continue
        readers = list(node.users)
        cut = insert_call(network, aten.clamp.default, (node, low, high), after=node, like=node)
        for reader in readers:
            reader.replace_input_with(node, cut)
    network.changed()


def unrounded(network: Network) -> None:
    """What is rounded when the network runs is not: for a runtime that does so by itself."""
    for node in network.calls(decomposed.dequantize_per_tensor.tensor):
        whole = node.args[0]
        assert isinstance(whole, Node)
        node.replace_all_uses_with(whole.args[0])  # type: ignore[arg-type]
    network.graph.eliminate_dead_code()
    network.changed()


def computed_beforehand(network: Network) -> None:
    """Linear calls and convolutions of stored tensors alone are computed, and what they give is stored: for a runtime
    that fails at those whose weight is read back from integers (OpenVINO 2026.4; tables of relative positions)."""
    constant, before = constant_nodes(network), read_tensors(network)
    for node in [n for n in network.calls(*WEIGHTED) if n in constant]:
        network.add_tensor(f"{node.name}_computed", stored_value(network, node), buffer=True)
        node.replace_all_uses_with(tensor_node(network, f"{node.name}_computed", node))
    clear_dead(network, before)


def four_axes(network: Network) -> None:
    """Gives attention on [n, length, width] an axis of one head, and that on more than four axes one for all that lie
    before the heads: ONNX has it on four axes only."""
    attention = network.calls(aten.scaled_dot_product_attention.default)
    values = network.values() if attention else {}
    for node in attention:
        axes, readers = values[node.name].dim(), list(node.users)
        if axes == 4:
            continue
        before = [insert_call(network, aten.sym_size.int, (node.args[0], axis), before=node)
                  for axis in range(axes - 3)] if axes > 4 else []
        given: dict[Any, Any] = {**dict(enumerate(node.args[:4])), "attn_mask": node.kwargs.get("attn_mask")}
        ready = {where: _on_four(network, node, one, values[one.name].dim(), before)
                 for where, one in given.items() if isinstance(one, Node)}
        for where, one in ready.items():
            node.update_kwarg(where, one) if isinstance(where, str) else node.update_arg(where, one)
        back = (insert_call(network, aten.unflatten.int, (node, 0, before), after=node) if before else
                insert_call(network, aten.squeeze.dim, (node, 1), after=node))
        for reader in readers:
            reader.replace_input_with(node, back)
    network.changed()


def _on_four(network: Network, node: Node, given: Node, axes: int, before: list[Node]) -> Node:
    """What attention reads, on four axes or as many as it has of them from the end. before: the sizes of all axes
    before the heads; none where there are no heads."""
    if not before:
        return insert_call(network, aten.unsqueeze.default, (given, 1), before=node) if axes == 3 else given
    if axes < 4:
        return given
    for _ in range(len(before) + 3 - axes):
        given = insert_call(network, aten.unsqueeze.default, (given, 0), before=node)
    given = insert_call(network, aten.expand.default, (given, [*before, -1, -1, -1]), before=node)
    return insert_call(network, aten.flatten.using_ints, (given, 0, len(before) - 1), before=node)


def slices_of_batch(network: Network) -> None:
    """Chunks along a free axis (RAFT takes its two images so) become slices: the exporter takes known lengths only."""
    chunks = network.calls(aten.chunk.default)
    two, three = (network.values(batch) if chunks else {} for batch in (2, 3))
    for node in chunks:
        given, count, dim = node.args[0], int(schema_argument(node, "chunks")), int(schema_argument(node, "dim"))
        if two[str(given)].shape[dim] == three[str(given)].shape[dim]:
            continue
        size = insert_call(network, aten.sym_size.int, (given, dim), before=node)
        more = insert_call(network, operator.add, (size, count - 1), before=node)
        each = insert_call(network, operator.floordiv, (more, count), before=node)
        for reader in list(node.users):
            at: Any = reader.args[1]
            low, high = (insert_call(network, operator.mul, (each, at + i), before=node) for i in (0, 1))
            reader.replace_all_uses_with(insert_call(network, aten.slice.Tensor, (given, dim, low, high), before=node))
            network.graph.erase_node(reader)
        network.graph.erase_node(node)
    network.changed()


__all__ = ["computed_beforehand", "cut_off", "four_axes", "slices_of_batch", "unrounded"]
