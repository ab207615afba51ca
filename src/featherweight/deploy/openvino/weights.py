"""How stored weights lie in an OpenVINO file: integers of 4 or 2 bits take as many, floats that are halves 16.

The kernels stay what they are for integers of 8 bits: OpenVINO computes the conversion when it compiles a model.
Only linear calls on floats read 4 bits themselves, straight from the constant (seen on OpenVINO 2026.4: a convolution
between rounded activations that reads 4 bits straight runs in float, 1.07 instead of 0.50 ms).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featherweight.deploy.onnx.types import SMALLEST, half_of
from featherweight.numerics import packing

#: operators between a constant and the call that multiplies with it
BETWEEN = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")


def narrow(model: Any) -> None:
    """Rewrites the constants of an OpenVINO model in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and np.prod(node.get_output_shape(0)) >= SMALLEST:
            array = node.get_data()
            if array.dtype == np.int8:
                _as_few(node, array)
            elif array.dtype == np.float32:
                _as_halves(node, array)


def _as_few(node: Any, array: Any) -> None:
    """Numbers of -8..7 in 4 bits; of four neighbours, but for what linear calls on floats read, in 2."""
    from openvino import opset13 as ops

    low, high = int(array.min()), int(array.max())
    if not -8 <= low <= high <= 7:
        return
    for reader in list(node.output(0).get_target_inputs()):
        if reader.get_node().get_type_name() == "Convert" and _multiplies_floats(reader.get_node()):
            given = constant("i4", array & 15, 4)
        elif high - low < 4:
            given = ops.convert(constant("u2", array - low, 2), "i8")
            given = ops.subtract(given, ops.constant(np.int8(-low))) if low else given
        else:
            given = ops.convert(constant("i4", array & 15, 4), "i8")
        _named(node, given)
        reader.replace_source_output(given.output(0))


def _as_halves(node: Any, array: Any) -> None:
    from openvino import opset13 as ops

    kind = half_of(array)
    if kind is None:
        return
    numbers = array.astype(np.float16).view(np.uint16) if kind == "FLOAT16" else (
        array.view(np.uint32) >> 16).astype(np.uint16)
    given = ops.convert(constant("f16" if kind == "FLOAT16" else "bf16", numbers), "f32")
    _named(node, given)
    for reader in list(node.output(0).get_target_inputs()):
        reader.replace_source_output(given.output(0))


def _named(node: Any, made: Any) -> None:
    """Puts the constant's name at the head of what stands for it, so that names say which tensor lies there."""
    while made.get_type_name() != "Constant":
        made = made.input_value(0).get_node()
    made.set_friendly_name(node.get_friendly_name())


def constant(kind: str, numbers: Any, bits: int = 0) -> Any:
    """A constant of the type ``kind`` from its bit patterns; of ``bits`` < 8, the first number lies low in its byte."""
    import openvino
    from openvino import opset13 as ops

    tensor = openvino.Tensor(getattr(openvino.Type, kind), openvino.Shape(list(numbers.shape)))
    flat = packing.pack(numbers.astype(np.uint8), bits) if bits else numbers
    tensor.data.reshape(-1).view(flat.dtype)[:] = flat.ravel()
    return ops.constant(tensor)


def _multiplies_floats(node: Any) -> bool:
    """Whether only matrix products on floats read what a constant is converted to."""
    readers = [port.get_node() for port in node.output(0).get_target_inputs()]
    for reader in readers:
        kind = reader.get_type_name()
        if kind in BETWEEN:
            if not _multiplies_floats(reader):
                return False
        elif kind != "MatMul" or reader.input_value(0).get_node().get_type_name() == "FakeQuantize":
            return False
    return bool(readers)


__all__ = ["constant", "narrow"]
