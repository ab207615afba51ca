"""Products with a stored matrix written as linear calls, so that all who know linear layers know them.

``x @ w``, ``addmm`` (GPT-2's ``Conv1D``) and ``einsum("...i,io->...o", x, w)`` read a weight that is stored [i, o], and
``aten.linear`` wants [o, i]. The tensor stays as the model has it: the call reads it through ``aten.t``, which copies
nothing. The node keeps its name. Products with anything but a parameter or a persistent buffer stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from featherweight.network.edit import constant_nodes, constant_value, insert_call, remove_dead
from featherweight.network.network import Network
from featherweight.network.operators import schema_argument

aten = torch.ops.aten
#: views that may turn a matrix around
TURNS: set[Any] = {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default}


@dataclass(frozen=True)
class MatrixProduct:
    """x [..., i] times a matrix, plus a bias [o] or None. inputs_first: the matrix is [i, o], not [o, i]."""

    x: Node
    matrix: Node
    inputs_first: bool
    bias: Node | None = None


def write_linear(network: Network) -> None:
    """Makes a linear call of every product of a computed value with a stored matrix."""
    constant, weights = constant_nodes(network), set(network.state_dict())
    for node in network.calls(*FORMS):
        found = FORMS[node.target](node)
        if found is None or found.x in constant:
            continue
        stored, views = _source(found.matrix)
        matrix, bias = (constant_value(network, n) for n in (stored, found.bias))
        if matrix is None or matrix.dim() != 2 or stored.target not in weights:
            continue
        inputs_first = found.inputs_first != (sum(map(_turns, views)) % 2 == 1)
        if found.bias is None or (bias is not None and bias.shape == matrix.shape[int(inputs_first):][:1]):
            _rewrite(network, node, found, stored, inputs_first)
    remove_dead(network.graph)
    network.changed()


def _rewrite(network: Network, node: Node, found: MatrixProduct, stored: Node, inputs_first: bool) -> None:
    weight = insert_call(network, aten.t.default, (stored,), before=node, like=node) if inputs_first else stored
    bias = () if found.bias is None else (found.bias,)
    node.target, node.args, node.kwargs = aten.linear.default, (found.x, weight, *bias), {}


def _source(node: Node) -> tuple[Node, list[Node]]:
    """What is viewed, and the views of TURNS between."""
    views: list[Node] = []
    while node.target in TURNS:
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, views


def _turns(view: Node) -> bool:
    """Whether a view turns a matrix around."""
    turned = view.target(torch.empty(1, 2), *view.args[1:], **view.kwargs)  # type: ignore[operator]
    return bool(turned.shape == (2, 1))


# ---- the forms
def _linear(node: Node) -> MatrixProduct | None:
    x, matrix, bias = (schema_argument(node, name) for name in ("input", "weight", "bias"))
    return MatrixProduct(x, matrix, False, bias) if matrix.op == "call_function" else None


def _matmul(node: Node) -> MatrixProduct | None:
    x, matrix = node.args
    return MatrixProduct(x, matrix, True)  # type: ignore[arg-type]


def _addmm(node: Node) -> MatrixProduct | None:
    bias, x, matrix = node.args
    plain = schema_argument(node, "beta") == 1 == schema_argument(node, "alpha")
    return MatrixProduct(x, matrix, True, bias) if plain else None  # type: ignore[arg-type]


def _einsum(node: Node) -> MatrixProduct | None:
    """Where the last axis of the first operand, and no other, is summed with an axis of a matrix."""
    operands: Any = node.args[1]
    terms, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    letters = first.replace("...", "")
    i, o = letters[-1:], second.replace(letters[-1:], "")
    if not arrow or len(operands) != 2 or not (len(second) == 2 and len(o) == 1 and o.isalpha()):
        return None
    if not first.endswith(i) or result != first[:-1] + o or o in letters or len(set(letters)) < len(letters):
        return None
    return MatrixProduct(operands[0], operands[1], second[0] == i)


#: operator -> what its call multiplies; None where that is no linear layer
FORMS: dict[Any, Callable[[Node], MatrixProduct | None]] = {
    aten.linear.default: _linear, aten.matmul.default: _matmul, aten.mm.default: _matmul, aten.addmm.default: _addmm,
    aten.einsum.default: _einsum,
}
