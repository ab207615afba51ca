"""Products with a stored matrix written as linear calls, so that all who know linear layers know them.

``x @ w``, ``addmm`` (GPT-2's ``Conv1D``) and ``einsum("...i,io->...o", x, w)`` read a weight that is stored [i, o], and
``aten.linear`` wants [o, i]. The tensor stays as the model has it: the call reads it through ``aten.t``, which copies
nothing. The node keeps its name. Products with what is no parameter and no buffer of the model stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from featherweight.network.operators import schema_argument

aten = torch.ops.aten
#: views that may turn a matrix around
TURNS: set[Any] = {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default}


@dataclass(frozen=True)
class Product:
    """x [..., i] times a matrix, plus a bias [o] or None. inputs_first: the matrix is [i, o], not [o, i]."""

    x: Any
    matrix: Any
    inputs_first: bool
    bias: Any = None


def write_linear(graph: Graph, constants: Collection[str]) -> None:
    """Makes a linear call of every product of a computed value with a stored matrix. constants: names of the tensors
    that were written into the code rather than held by the model; they are no weights."""
    live: set[Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder" or not live.isdisjoint(node.all_input_nodes):
            live.add(node)
        found = FORMS[node.target](node) if node.op == "call_function" and node.target in FORMS else None
        if found is not None and found.x in live:
            stored, inputs_first = _source(found.matrix, found.inputs_first)
            if stored.op == "get_attr" and stored.target not in constants and len(_shape(stored)) == 2:
                _rewrite(graph, node, found, stored, inputs_first)


def _rewrite(graph: Graph, node: Node, found: Product, stored: Node, inputs_first: bool) -> None:
    weight = stored
    if inputs_first:
        with graph.inserting_before(node):
            weight = graph.call_function(aten.t.default, (stored,))
        weight.meta = {**node.meta, "val": stored.meta["val"].t()}
    bias = () if found.bias is None else (found.bias,)
    node.target, node.args, node.kwargs = aten.linear.default, (found.x, weight, *bias), {}


def _source(matrix: Node, inputs_first: bool) -> tuple[Node, bool]:
    """What views turn around, and whether its inputs come first."""
    while matrix.op == "call_function" and matrix.target in TURNS and len(_shape(matrix)) == 2:
        probe = matrix.target(torch.empty(1, 2), *matrix.args[1:], **matrix.kwargs)  # type: ignore[operator]
        inputs_first = inputs_first != (probe.shape == (2, 1))
        matrix = matrix.args[0]  # type: ignore[assignment]
    return matrix, inputs_first


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


# ---- the forms
def _linear(node: Node) -> Product | None:
    x, matrix = node.args[:2]
    return Product(x, matrix, False, schema_argument(node, "bias")) if matrix.op == "call_function" else None  # type: ignore[union-attr]


def _matmul(node: Node) -> Product:
    return Product(*node.args[:2], True)


def _addmm(node: Node) -> Product | None:
    bias, x, matrix = node.args
    plain = schema_argument(node, "beta") == 1 == schema_argument(node, "alpha")
    return Product(x, matrix, True, bias) if plain and _shape(bias) == _shape(matrix)[1:] else None


def _einsum(node: Node) -> Product | None:
    """Where the last axis of the first operand, and no other, is summed with an axis of a matrix."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    terms, arrow, result = equation.partition("->")
    first, _, second = terms.partition(",")
    i, o = first[-1:], second.replace(first[-1:], "")
    letters = first.replace("...", "")
    if not arrow or len(operands) != 2 or not (i.isalpha() and len(o) == 1 and o.isalpha() and len(second) == 2):
        return None
    if result != first[:-1] + o or o in letters or len(set(letters)) < len(letters):
        return None
    return Product(*operands, second[0] == i)


#: operator -> what its call multiplies; None where that is no linear layer
FORMS: dict[Any, Callable[[Node], Product | None]] = {
    aten.linear.default: _linear, aten.matmul.default: _matmul, aten.mm.default: _matmul, aten.addmm.default: _addmm,
    aten.einsum.default: _einsum,
}
