"""Numbers of an ONNX file in the narrowest type that holds them.

What a weight is, is seen from its numbers, so nothing is lost: integers of -8..7 become INT4 (opset 21), of -2..1
INT2 (opset 25, where the installed ONNX Runtime takes it); up to 16 others, such as -3, -1, 1, 3, places in a list of
them; floats that all are halves FLOAT16 or BFLOAT16. A Cast reads them back, or a Gather. ONNX Runtime computes what
depends on no input when it loads a file, so they cost nothing in a call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from featherweight.deploy.onnx.edit import constant

#: numbers; for fewer, saying how they are stored takes what is saved
SMALLEST = 256
#: opset in which a type came
OPSETS = {"INT4": 21, "UINT4": 21, "INT2": 25, "UINT2": 25}
#: opset -> version of the file format that it came with
IR_VERSIONS = {21: 10, 25: 13}
#: operators whose meaning changed between the exporter's opset and those; with one of these the opset stays
CHANGED = ("GroupNormalization",)
#: marks nodes that were put first
EARLY = "featherweight_early"


def narrow(model: Any, narrowest: int, straight: Callable[[Any], bool]) -> int:
    """Stores integers in ``narrowest`` bits or 4 where they fit, floats that are halves as halves. Gives the opset
    needed. straight: whether a node reads integers of 4 bits as they are."""
    graph, opset = model.graph, 0
    changed = any(node.op_type in CHANGED for node in graph)
    for value in list(graph.initializers.values()):
        array = value.const_value.numpy() if value.const_value.size >= SMALLEST else None
        if array is None or value.is_graph_output() or _is_zero_point(value):
            continue
        if array.dtype == np.int8 and not changed:
            found = kind_of(array, narrowest)
            if found is not None:
                opset = max(opset, _as_few(graph, value, array, found, straight))
        elif array.dtype == np.float32:
            _as_halves(graph, value, array)
    return opset


def _is_zero_point(value: Any) -> bool:
    """Whether a call reads this as zero points, which must be of the type of the numbers beside them."""
    return any(user.op_type == "DequantizeLinear" and index == 2 for user, index in value.uses())


def kind_of(array: Any, narrowest: int) -> tuple[str, Any] | None:
    """(type, list): the narrowest type that holds integers. A signed one holds them as they are and needs no list,
    an unsigned one holds their places in it."""
    listed = np.unique(array)
    for bits in (b for b in (2, 4) if b >= narrowest):
        half = 1 << (bits - 1)
        if -half <= listed[0] and listed[-1] < half:
            return f"INT{bits}", None
        if len(listed) <= 2 * half:
            return f"UINT{bits}", listed
    return None


def _as_few(graph: Any, value: Any, array: Any, how: tuple[str, Any], straight: Callable[[Any], bool]) -> int:
    """The initializer in few bits; its readers read it as INT8, or as INT4 where they all want it so. Gives the opset
    needed."""
    (kind, listed), name = how, value.name
    readers = [user for user, _ in value.uses()]
    four = array.min() >= -8 and array.max() <= 7 and bool(readers) and all(map(straight, readers))
    wanted = "INT4" if four else "INT8"
    value.name = f"{name}_int8"
    if listed is None:
        given = _cast(graph, constant(graph, name, array, kind), *([wanted] if kind != wanted else []))
    else:
        given = _cast(graph, constant(graph, name, np.searchsorted(listed, array), kind), "INT32")
        given = _insert(graph, "Gather", [constant(graph, f"{name}_list", listed), given], {}, name)
        given = _cast(graph, given, *(["INT4"] if four else []))
    given.shape = value.shape
    value.replace_all_uses_with(given)
    if four:  # the zero points are of the numbers' type
        for reader in readers:
            for index in range(2, len(reader.inputs)):
                zeros = np.zeros(reader.inputs[index].shape.numpy(), np.int8)
                reader.replace_input_with(index, constant(graph, f"{reader.name}_zero", zeros, "INT4"))
    return max(OPSETS[kind], OPSETS["INT4"] if four else 0)


def _cast(graph: Any, value: Any, *kinds: str) -> Any:
    """``value`` cast to one type after the other."""
    import onnx_ir as ir

    for kind in kinds:
        value = _insert(graph, "Cast", [value], {"to": int(ir.DataType[kind])}, value.name)
    return value


def _insert(graph: Any, kind: str, inputs: list[Any], attributes: dict[str, Any], name: str) -> Any:
    """The value of a new node on constants, which comes before all nodes that compute."""
    import onnx_ir as ir

    node = ir.node(kind, inputs, attributes, name=f"{name}_{kind.lower()}")
    place = next(n for n in graph if n.metadata_props.get(EARLY) is None)
    node.metadata_props[EARLY] = "1"
    graph.insert_before(place, [node])
    return node.outputs[0]


def _as_halves(graph: Any, value: Any, array: Any) -> None:
    kind = half_of(array)
    if kind is not None:
        name = value.name
        value.name = f"{name}_float"
        given = _cast(graph, constant(graph, name, array, kind), "FLOAT")
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
    """Bits of the narrowest integers that the installed ONNX Runtime reads: 2, 4, or 8."""
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
