"""A captured network in the forms that files are made of: public operators, zeros without a sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from featherweight.network.file.allowed import beyond, target_name
from featherweight.network.network import Network

aten = torch.ops.aten


def _weight_norm(graph: Graph, axes: int, v: Node, g: Node, dim: int = 0) -> Node:
    """w = g * v / |v|, |v| over all axes but ``dim``, over all if that is -1 (Salimans & Kingma 2016, equation 2)."""
    over = [axis for axis in range(axes) if axis != dim]
    length = graph.call_function(aten.linalg_vector_norm.default, (v, 2, over, True))
    scale = graph.call_function(aten.div.Tensor, (g, length))
    return graph.call_function(aten.mul.Tensor, (v, scale))


#: private operator, whose kernel trusts its arguments -> what writes it with public ones; it is told how many axes the
#: first argument has
PUBLIC: dict[Any, Callable[..., Node]] = {aten._weight_norm.default: _weight_norm}


def make_public(network: Network) -> None:
    """Writes private operators with public ones, and negative zeros (of ``weight * mask``) as zeros: their signs would
    take a bit each in an archive. Operators that no table knows are named in ``notes``."""
    for node in network.calls(*PUBLIC):
        with network.graph.inserting_before(node):
            axes = network.values()[node.all_input_nodes[0].name].dim()
            made = PUBLIC[node.target](network.graph, axes, *node.args, **node.kwargs)
        for call in [made, *made.all_input_nodes]:
            if call.op == "call_function" and "module" not in call.meta:
                call.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        network.graph.erase_node(node)
    for name, tensor in network.tensors().items():
        if tensor.is_floating_point() and tensor.element_size() > 1:
            with torch.no_grad():
                if bool((torch.signbit(tensor) & (tensor == 0)).any()):
                    network.set_tensor(name, tensor + 0.0)
    network.changed()
    if others := beyond(target_name(n.target) for n in network.calls()):
        network.notes.append(f"calls operators that files name only with the reader's word: {', '.join(others)}; once "
                             f"saved, read it with fw.load(path, operators={others})")


__all__ = ["make_public"]
