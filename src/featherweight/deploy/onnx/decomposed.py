"""Decomposing an exported program into operators that ONNX has, left out where it has them all."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch._C import DispatchKey
from torch.export import ExportedProgram


def decompose_where_needed(program: ExportedProgram) -> None:
    """torch's exporter has every program decomposed, for which all calls are traced twice more: more than half of the
    time. From now on ``program`` stays as it is where nothing in it would be decomposed."""
    given = program.run_decompositions

    def decomposed(table: Mapping[Any, Any] | None = None, **options: Any) -> ExportedProgram:
        plain = table is not None and not options and all(_stays(node, table) for node in program.graph.nodes)
        return program if plain else given(table, **options)

    program.run_decompositions = decomposed


def _stays(node: torch.fx.Node, table: Mapping[Any, Any]) -> bool:
    """Whether decomposing leaves a node: an input, the output, or a call of an operator that writes nothing, that the
    table does not have, and that torch does not write with others whatever the table says (``aten.reshape``)."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return node.op in ("placeholder", "output")
    composed = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    return not (target in table or target._schema.is_mutable or (composed and target not in _may_stay()))


@cache
def _may_stay() -> frozenset[Any]:
    """The operators written with others that may be kept whole: torch's own table has them."""
    return frozenset(torch.export.default_decompositions())


__all__ = ["decompose_where_needed"]
