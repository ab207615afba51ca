"""Small edits on models of ``onnx_ir`` that the rewriting passes share."""

from __future__ import annotations

from typing import Any

import numpy as np


def constant_value(value: Any) -> Any:
    """The numbers behind a value that never changes, else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def constant(graph: Any, name: str, numbers: Any, kind: str | None = None) -> Any:
    """A new initializer; kind: name of the ONNX type that it is stored in, if not the array's own."""
    import onnx_ir as ir

    if kind is not None:
        numbers = np.asarray(numbers).astype(ir.DataType[kind].numpy())
    tensor = ir.tensor(numbers, dtype=None if kind is None else ir.DataType[kind], name=name)
    made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(made)
    return made


def replace(graph: Any, node: Any, made: list[Any]) -> None:
    """Puts the chain ``made`` in the place of ``node``."""
    old, new = node.outputs[0], made[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    graph.insert_before(node, made)
    name = old.name
    old.name = f"{name}_gone"
    new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def same_grid(one: Any, other: Any) -> bool:
    """Whether two nodes round, or read back, on one grid that is known."""
    if len(one.inputs) < 3 or len(other.inputs) < 3:
        return False
    pairs = [(constant_value(a), constant_value(b)) for a, b in zip(one.inputs[1:3], other.inputs[1:3], strict=True)]
    return all(a is not None and b is not None and a.dtype == b.dtype and a.shape == () and np.array_equal(a, b)
               for a, b in pairs)


def sweep(graph: Any) -> None:
    """Removes nodes and initializers that nobody reads."""
    for node in reversed(list(graph)):
        kept = any(v.is_graph_output() for v in node.outputs)
        if not kept and not any(v.uses() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def through(value: Any) -> Any:
    """The value that reshapes, if any, give another shape."""
    node = value.producer()
    while node is not None and node.op_type == "Reshape":
        value = node.inputs[0]
        node = value.producer()
    return value


__all__ = ["constant", "constant_value", "replace", "same_grid", "sweep", "through"]
