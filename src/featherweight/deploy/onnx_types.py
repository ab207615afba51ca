"""Numbers of an ONNX file in the narrowest type that holds them.

What a weight is, is seen from its numbers, so nothing is lost: whole numbers of -8..7 become INT4 (opset 21), of -2..1
INT2 (opset 25, where the installed ONNX Runtime takes it); others that are evenly spaced, such as -3, -1, 1, 3,
unsigned ones that are multiplied and moved; floats that all are halves FLOAT16 or BFLOAT16. A Cast reads them back. ONNX
Runtime computes what depends on no input when it loads a file, so the Cast costs nothing in a call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from featherweight.deploy.onnx_edit import constant

#: numbers; for fewer, saying how they are stored takes what is saved
SMALLEST = 256
#: opset in which a type came
OPSETS = {"INT4": 21, "UINT4": 21, "INT2": 25, "UINT2": 25}
#: opset -> version of the file format that it came with
IR_VERSIONS = {21: 10, 25: 13}
#: operators whose meaning changed between the exporter's opset and those; with one of these the opset stays
CHANGED = ("GroupNormalization",)


def narrow(model: Any, narrowest: int, straight: Callable[[Any], bool]) -> int:
    """Stores whole numbers in ``narrowest`` bits or 4 where they fit, floats that are halves as halves. Gives the opset
    needed. straight: whether a node reads whole numbers of 4 bits as they are."""
    graph, opset = model.graph, 0
    changed = any(node.op_type in CHANGED for node in graph)
    for value in list(graph.initializers.values()):
        array = value.const_value.numpy() if value.const_value.size >= SMALLEST else None
        if array is None or value.is_graph_output():
            continue
        if array.dtype == np.int8 and not changed:
            found = kind_of(array, narrowest)
            if found is not None:
                opset = max(opset, _as_few(graph, value, array, found, straight))
        elif array.dtype == np.float32:
            _as_halves(graph, value, array)
    return opset


def kind_of(array: Any, narrowest: int) -> tuple[str, int, int] | None:
    """(type, step, lowest): the narrowest type that holds whole numbers. A signed one holds them as they are (1, 0); an
    unsigned one holds (number - lowest) / step."""
    low, high = int(array.min()), int(array.max())
    step = max(1, int(np.gcd.reduce(np.unique(array).astype(np.int16) - low)))
    for bits in (b for b in (2, 4) if b >= narrowest):
        half = 1 << (bits - 1)
        if -half <= low and high < half:
            return f"INT{bits}", 1, 0
        if step > 1 and (high - low) // step < 2 * half:
            return f"UINT{bits}", step, low
    return None


def _as_few(graph: Any, value: Any, array: Any, how: tuple[str, int, int], straight: Callable[[Any], bool]) -> int:
    """The initializer in few bits; its readers read it as INT8, or as INT4 where they all want it so. Gives the opset
    needed."""
    (kind, step, low), name = how, value.name
    readers = [user for user, _ in value.uses()]
    four = array.min() >= -8 and array.max() <= 7 and bool(readers) and all(map(straight, readers))
    wanted = "INT4" if four else "INT8"
    value.name = f"{name}_int8"
    kept = constant(graph, name, (array.astype(np.int16) - low) // step, kind)
    moves = [("Cast", "INT32"), ("Mul", step), ("Add", low)] if step > 1 else []
    given = _chain(graph, kept, [*moves, *([("Cast", wanted)] if kind != wanted else [])], name)
    given.shape = value.shape
    value.replace_all_uses_with(given)
    if four:  # the zero points are of the numbers' type
        for reader in readers:
            for index in range(2, len(reader.inputs)):
                zeros = np.zeros(reader.inputs[index].shape.numpy(), np.int8)
                reader.replace_input_with(index, constant(graph, f"{reader.name}_zero", zeros, "INT4"))
    return max(OPSETS[kind], OPSETS["INT4"] if four else 0)


def _chain(graph: Any, value: Any, steps: list[tuple[str, Any]], name: str) -> Any:
    """``value`` cast to types and moved by whole numbers, at the head of the graph."""
    import onnx_ir as ir

    first = graph[0]
    for index, (kind, what) in enumerate(steps):
        if kind == "Cast":
            node = ir.node(kind, [value], {"to": int(ir.DataType[what])}, name=f"{name}_step_{index}")
        else:
            by = constant(graph, f"{name}_by_{index}", np.array(what, np.int32))
            node = ir.node(kind, [value, by], name=f"{name}_step_{index}")
        graph.insert_before(first, [node])
        value = node.outputs[0]
    return value


def _as_halves(graph: Any, value: Any, array: Any) -> None:
    kind = half_of(array)
    if kind is not None:
        name = value.name
        value.name = f"{name}_float"
        given = _chain(graph, constant(graph, name, array, kind), [("Cast", "FLOAT")], name)
        given.shape = value.shape
        value.replace_all_uses_with(given)


def half_of(array: Any) -> str | None:
    """The type of two bytes that holds float32 numbers to the last bit, or None."""
    with np.errstate(over="ignore"):
        if (array.astype(np.float16).astype(np.float32).view(np.uint32) == array.view(np.uint32)).all():
            return "FLOAT16"
    return None if (array.view(np.uint32) & 0xFFFF).any() else "BFLOAT16"


@cache
def narrowest_of_runtime() -> int:
    """Bits of the narrowest whole numbers that the installed ONNX Runtime reads: 2, 4, or 8."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    for kind in ("INT2", "INT4"):
        if not hasattr(TensorProto, kind) or onnx.defs.onnx_opset_version() < OPSETS[kind]:
            continue
        numbers = helper.make_tensor("w", getattr(TensorProto, kind), [4], [-1, 0, 1, -2])
        cast = helper.make_node("Cast", ["w"], ["y"], to=TensorProto.INT8)
        graph = helper.make_graph([cast], "g", [], [helper.make_tensor_value_info("y", TensorProto.INT8, [4])],
                                  [numbers])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSETS[kind])],
                                  ir_version=IR_VERSIONS[OPSETS[kind]])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                                   providers=["CPUExecutionProvider"])
            if session.run(None, {})[0].tolist() == [-1, 0, 1, -2]:
                return int(kind[-1])
        except Exception:  # each version says no in its own way
            continue
    return 8


def raise_opset(model: Any, opset: int) -> None:
    """Declares that the model is of ``opset`` at least."""
    if opset > model.opset_imports.get("", 0):
        model.opset_imports[""] = opset
        model.ir_version = max(model.ir_version, IR_VERSIONS[opset])


__all__ = ["half_of", "kind_of", "narrow", "narrowest_of_runtime", "raise_opset"]
