"""A captured network in the forms that files are made of: public operators, zeros without a sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from featherweight.network.edit import insert_call, remove_dead
from featherweight.network.file.allowed import beyond, target_name
from featherweight.network.network import Network

aten = torch.ops.aten


#: (operator, *arguments) -> the node of a new call
Call = Callable[..., Node]
Shapes = Callable[[Node], torch.Size]


def _weight_norm(call: Call, shape: Shapes, v: Node, g: Node, dim: int = 0) -> Node:
    """w = g * v / |v|, |v| over all axes but ``dim``, over all if that is -1 (Salimans & Kingma 2016, equation 2)."""
    over = [axis for axis in range(len(shape(v))) if axis != dim]
    length = call(aten.linalg_vector_norm.default, v, 2, over, True)
    return call(aten.mul.Tensor, v, call(aten.div.Tensor, g, length))


def _grouped(call: Call, shape: Shapes, x: Node, weight: Node, offs: Node) -> Node:
    """[s, o]: rows of ``x`` [s, i] times the matrix of their group, of ``weight`` [g, i, o]; group j ends before row
    ``offs[j]``, and rows after the last one are zero. Every row takes its matrix: s * i * o numbers are held."""
    row = call(aten.arange.default, call(aten.sym_size.int, x, 0))
    behind = call(aten.ge.Tensor, call(aten.unsqueeze.default, row, 1), call(aten.unsqueeze.default, offs, 0))
    count = call(aten.sum.dim_IntList, behind, [1])
    group = call(aten.clamp.default, count, 0, shape(weight)[0] - 1)
    turned = weight.target is aten.transpose.int and sorted(a % 3 for a in weight.args[1:]) == [1, 2]  # type: ignore[operator]
    stacked = weight.args[0] if turned else weight
    taken = call(aten.index_select.default, stacked, 0, group)
    taken = call(aten.transpose.int, taken, 1, 2) if turned else taken
    made = call(aten.squeeze.dim, call(aten.bmm.default, call(aten.unsqueeze.default, x, 1), taken), 1)
    inside = call(aten.to.dtype, call(aten.lt.Scalar, count, shape(weight)[0]), torch.float32)
    return call(aten.mul.Tensor, made, call(aten.unsqueeze.default, inside, 1))


def _zeros(call: Call, shape: Shapes, like: Node, **options: Any) -> Node:
    """Memory that nobody wrote into yet: any numbers are as good."""
    return call(aten.zeros_like.default, like)


#: operator that no file may name (its kernel trusts its arguments, or another package has it) -> what writes it with
#: public ones, given (call, shape of a node, *arguments)
PUBLIC: dict[str, Callable[..., Node]] = {
    "aten._weight_norm.default": _weight_norm, "aten.empty_like.default": _zeros,
    "transformers.grouped_mm_fallback.default": _grouped}


def make_public(network: Network) -> None:
    """Writes private operators with public ones, and negative zeros (of ``weight * mask``) as zeros: their signs would
    take a bit each in an archive. Operators that no table knows are named in ``notes``."""
    for node in [n for n in network.calls() if str(n.target) in PUBLIC]:
        def call(target: Any, *args: Any, like: Node = node) -> Node:
            return insert_call(network, target, args, before=like, like=like)

        shapes = network.values()
        made = PUBLIC[str(node.target)](call, lambda n, known=shapes: known[n.name].shape, *node.args, **node.kwargs)
        node.replace_all_uses_with(made)
        network.graph.erase_node(node)
    for name, tensor in network.tensors().items():
        if tensor.is_floating_point() and tensor.element_size() > 1:
            with torch.no_grad():
                if bool((torch.signbit(tensor) & (tensor == 0)).any()):
                    network.set_tensor(name, tensor + 0.0)
    remove_dead(network.graph)
    network.changed()
    if others := beyond(target_name(n.target) for n in network.calls()):
        network.notes.append(f"calls operators that files name only with the reader's word: {', '.join(others)}; once "
                             f"saved, read it with fw.load(path, operators={others})")


__all__ = ["make_public"]
