"""Values that are rounded when a network runs: DynamicQuantizeLinear and MatMulInteger.

Seen on ONNX Runtime 1.32, one thread, an x86 CPU with VNNI, 768 to 3072 numbers, weights of 8 bits, medians in ms: one
row 0.12 (as a MatMulNBits of weights alone: 0.11; float: 0.27), 16 rows 0.26 (0.62; 0.92), 128 rows 1.7 (4.4; 6.0);
benchmarks/dynamic_values.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from featherweight.deploy.onnx.edit import constant, replace
from featherweight.deploy.onnx.weights import matrix, turned_at_load

#: where an initializer remembers what was made of it
KNOWN = "featherweight_dynamic"

decomposed = torch.ops.quantized_decomposed


def _choose(value: Any, low: int, high: int, smallest: float, dtype: int) -> Any:
    from onnxscript.onnx_opset import opset18 as op

    _, scale, zero = op.DynamicQuantizeLinear(value)
    return scale, zero


def _quantize(value: Any, scale: Any, zero: Any, low: int, high: int, dtype: int) -> Any:
    from onnxscript.onnx_opset import opset18 as op

    return op.QuantizeLinear(value, scale, zero)


def _dequantize(numbers: Any, scale: Any, zero: Any, low: int, high: int, dtype: int, out_dtype: int = -1) -> Any:
    from onnxscript.onnx_opset import opset18 as op

    return op.DequantizeLinear(numbers, scale, zero)


#: operator -> what the exporter writes for it
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    decomposed.choose_qparams.tensor: _choose,
    decomposed.quantize_per_tensor.tensor: _quantize,
    decomposed.dequantize_per_tensor.tensor: _dequantize,
}


def multiply_whole_numbers(graph: Any, node: Any) -> None:
    """A MatMul, or Gemm, of a value rounded at run time and a dequantized weight: MatMulInteger, times the scales."""
    import onnx_ir as ir

    chosen, found = _rounded(node), matrix(node)
    if chosen is None or found is None:
        return
    kept, numbers, scales = found
    if not (scales == scales[:1]).all():
        return  # several scales a column
    weight = turned_at_load(graph, node, kept, numbers) or _columns(graph, kept, numbers)
    steps = constant(graph, f"{kept.name}_{node.name}_scale", np.ascontiguousarray(scales[0]))
    whole, scale, zero = chosen.outputs
    sums = ir.node("MatMulInteger", [whole, weight, zero], name=f"{node.name}_whole")
    made = [sums, ir.node("Cast", [sums.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}_float"),
            ir.node("Mul", [scale, steps], name=f"{node.name}_scale")]
    made.append(ir.node("Mul", [made[1].outputs[0], made[2].outputs[0]], name=f"{node.name}_read"))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        made.append(ir.node("Add", [made[-1].outputs[0], node.inputs[2]], name=node.name))
    replace(graph, node, made)


def _columns(graph: Any, kept: Any, numbers: Any) -> Any:
    """An initializer of the numbers as [in, out], which takes the name of ``kept``; one for all calls that read it."""
    known = kept.meta.get(KNOWN)
    if known is None or not np.array_equal(known[0], numbers):
        name, kept.name = kept.name, f"{kept.name}_rows"
        known = kept.meta[KNOWN] = numbers, constant(graph, name, np.ascontiguousarray(numbers))
    return known[1]


def _rounded(node: Any) -> Any:
    """The DynamicQuantizeLinear by whose grid the first input of ``node`` is rounded."""
    back = node.inputs[0].producer()
    if back is None or back.op_type != "DequantizeLinear" or len(back.inputs) < 3:
        return None
    chosen = back.inputs[1].producer()
    return chosen if chosen is not None and chosen.op_type == "DynamicQuantizeLinear" else None


__all__ = ["TRANSLATIONS", "multiply_whole_numbers"]
