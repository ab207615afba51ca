"""Integers and zero points of a weight for each call that reads them.

In a session that asks for exact sums (``session.x64quantprecision``), ONNX Runtime makes uint8 of int8 weights, once
for every call, and fails (1.32) at integers or zero points that it has met before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featherweight.deploy.onnx.edit import constant, constant_value, through

#: where an initializer remembers how many calls were given its numbers
READ = "featherweight_read"


def own_zero(graph: Any, node: Any) -> bool:
    """A weight's zero points for itself."""
    if len(node.inputs) > 2 and constant_value(through(node.inputs[0])) is not None:
        zero = node.inputs[2]
        numbers = constant_value(zero)
        if numbers is not None and numbers.dtype == np.int8 and len(zero.uses()) > 1:
            node.replace_input_with(2, constant(graph, f"{node.name}_zero", numbers))
    return False


def own_numbers(graph: Any, node: Any) -> bool:
    """A weight's integers for each call. They lie in the file once: every further call reads them through a Reshape,
    which is computed at load."""
    import onnx_ir as ir

    back = node.inputs[1].producer()
    kept = node.inputs[1] if back is None else back.inputs[0] if back.op_type == "DequantizeLinear" else None
    numbers = None if kept is None else kept.const_value
    if kept is None or numbers is None or numbers.dtype != ir.DataType.INT8:
        return False
    times = kept.meta[READ] = kept.meta.get(READ, -1) + 1
    if times in range(1, len(numbers.shape) + 1):  # each time another form of the same shape, or they would be joined
        shape = np.where(np.arange(len(numbers.shape)) == times - 1, -1, numbers.shape.numpy()).astype(np.int64)
        again = ir.node("Reshape", [kept, constant(graph, f"{node.name}_shape", shape)], name=f"{node.name}_again")
        made = [again]
        if back is not None:
            zeros = [constant(graph, f"{node.name}_{i}", v.const_value.numpy()) for i, v in enumerate(back.inputs[2:])]
            read = ir.node("DequantizeLinear", [again.outputs[0], back.inputs[1], *zeros], dict(back.attributes),
                           name=f"{node.name}_own")
            made.append(read)
        graph.insert_before(node, made)
        node.replace_input_with(1, made[-1].outputs[0])
    return False


#: (kinds of nodes, function (graph, node) that gives them their own)
OWN = ((("DequantizeLinear",), own_zero), (("Conv", "Gemm", "MatMul", "MatMulInteger"), own_numbers))

__all__ = ["OWN"]
