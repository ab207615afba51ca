"""Stored weights in the forms that a runtime multiplies fast, in as few bits as hold them (``onnx_types``).

By the call that reads the weight (seen on ONNX Runtime 1.32, one thread, an x86 CPU with VNNI):

- A convolution or linear call between rounded activations: numbers as INT8 behind a Cast, then DequantizeLinear.
  Straight from INT4 to DequantizeLinear there is no integer kernel (0.90 instead of 0.21 ms for 64 to 64 channels).
- A linear call on floats: DequantizeLinear on the weight as [in, out], with a scale per column or per block of each
  column (``block_size``), in INT4 or INT8: ONNX Runtime makes a MatMulNBits of it, which rounds what it reads to 8 bits
  (4096 to 4096, one row, 4 bits: 0.37 ms; in float: 3.3 ms). It has a slow kernel for INT2, which is cast to INT4.
- All others (convolutions on floats, transposed ones, recurrent calls): a product of numbers and scales, computed at
  load. The call then is as fast as in float; DequantizeLinear would run in every call (0.83 instead of 0.67 ms).
  Between rounded activations ONNX Runtime would round such a product to 8 bits again; a Clip that cuts nothing off
  keeps it from seeing that they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from featherweight.deploy.onnx.edit import constant, constant_value, replace, sweep, through
from featherweight.deploy.onnx.own import OWN
from featherweight.deploy.onnx.recurrent.integers import on_integers
from featherweight.deploy.onnx.types import kind_of, narrow, narrowest_of_runtime, raise_opset

#: lengths of blocks that MatMulNBits takes
BLOCKS = (16, 32, 64, 128, 256)
#: opset in which DequantizeLinear takes blocks
BLOCKS_OPSET = 21
#: activations that a rounding after a convolution stands for
CUT_OFF = ("Relu", "Clip", "LeakyRelu")
#: where an initializer remembers what ``blocks`` made of it
KNOWN = "featherweight_columns"

Form = Callable[[Any, Any], bool]


def blocks(graph: Any, node: Any) -> bool:
    """MatMul, or Gemm, of floats with a dequantized weight: the weight as [in, out], read by columns or in blocks."""
    import onnx_ir as ir

    found = columns(node)
    if found is None:
        return False
    old, numbers, scales, size = found
    known = old.meta.get(KNOWN)
    if known is None or not all(map(np.array_equal, known[:2], (numbers, scales))):
        known = old.meta[KNOWN] = numbers, scales, _read(graph, node, *found)
    value = known[2]
    if node.op_type == "MatMul":
        node.replace_input_with(1, value)
    else:
        replace(graph, node, [ir.node("Gemm", [node.inputs[0], value, *node.inputs[2:]], name=node.name)])
    return size != len(numbers)


def _read(graph: Any, node: Any, old: Any, numbers: Any, scales: Any, size: int) -> Any:
    """The weight of ``node`` as it dequantizes a new initializer, which takes the name of the old one."""
    import onnx_ir as ir

    name = old.name
    kept = None if kind_of(numbers, 4) is not None else turned_at_load(graph, node, old, numbers)
    if kept is None:
        old.name = f"{name}_rows"
        kept = constant(graph, name, np.ascontiguousarray(numbers))
    whole_column = size == len(numbers)
    how = {"axis": 1} if whole_column else {"axis": 0, "block_size": size}
    grid = np.ascontiguousarray(scales[0] if whole_column else scales[::size])
    steps = constant(graph, f"{name}_{node.name}_scale", grid)
    zero = []
    if whole_column or kind_of(numbers, 4) is None:  # ONNX Runtime, at exact sums, gives blocks of bytes a wrong one
        zero = [constant(graph, f"{name}_{node.name}_zero", np.zeros(grid.shape, np.int8))]
    read = ir.node("DequantizeLinear", [kept, steps, *zero], how, name=f"{node.name}_read")
    read.outputs[0].shape = ir.Shape(numbers.shape)
    graph.insert_before(node, [read])
    return read.outputs[0]


def turned_at_load(graph: Any, node: Any, kept: Any, numbers: Any) -> Any:
    """``numbers`` [in, out] of an initializer [out, in] that embeddings look up too, turned around when the runtime
    loads it, so that a file holds it once; None for any other."""
    import onnx_ir as ir

    if not any(user.op_type == "Gather" for user, _ in kept.uses()):
        return None
    if not np.array_equal(kept.const_value.numpy().T, numbers):
        return None
    turn = ir.node("Transpose", [kept], {"perm": [1, 0]}, name=f"{node.name}_turned")
    turn.outputs[0].shape, turn.outputs[0].type = ir.Shape(numbers.shape), kept.type
    graph.insert_before(node, [turn])
    return turn.outputs[0]


def groups(graph: Any, node: Any) -> bool:
    """The same where a column has several scales; the others stay as they are."""
    found = columns(node)
    return found is not None and found[-1] != len(found[1]) and blocks(graph, node)


def columns(node: Any) -> tuple[Any, Any, Any, int] | None:
    """(initializer, numbers [in, out], scales [in, out], how many numbers of a column share one) of the weight of a
    matrix product on floats."""
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2 or whole(node):
        return None
    found = matrix(node)
    if found is None:
        return None
    kept, numbers, scales = found
    size = _block_size(scales)
    rounded = node.inputs[0].producer() is not None and node.inputs[0].producer().op_type == "DequantizeLinear"
    if rounded and kind_of(kept.const_value.numpy(), 4) is None:
        return None  # ONNX Runtime 1.32 takes it for a weight with a scale per column, and fails
    return None if size is None else (kept, numbers, scales, size)


def matrix(node: Any) -> tuple[Any, Any, Any] | None:
    """(initializer, numbers [in, out], scales [in, out]) of the dequantized weight of a MatMul, or Gemm."""
    found = _matrix(node.inputs[1])
    if found is None or (node.op_type == "Gemm" and not _plain_gemm(node)):
        return None
    kept, numbers, scales = found
    if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
        numbers, scales = numbers.T, scales.T
    return kept, numbers, scales


def products(graph: Any, node: Any) -> bool:
    """A dequantized weight that no integer kernel reads: numbers times scales, computed at load."""
    import onnx_ir as ir

    given = node.inputs[0]
    numbers, scale = constant_value(through(given)), constant_value(node.inputs[1])
    if numbers is None or scale is None or numbers.dtype != np.int8 or "block_size" in node.attributes:
        return False
    zero = constant_value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    if zero is None or np.any(zero) or not _readers_on_floats(node):
        return False
    if scale.ndim:
        rank = len(given.shape) if given.shape is not None else numbers.ndim
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        scale = scale.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    for user in _ends(node):
        _shield(graph, user)
    cast = ir.node("Cast", [given], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}_float")
    steps = constant(graph, f"{node.outputs[0].name}_scale", scale)
    replace(graph, node, [cast, ir.node("Mul", [cast.outputs[0], steps], name=node.name)])
    return False


def _readers_on_floats(node: Any) -> bool:
    """Whether every call that reads the weight computes in float."""
    ends = _ends(node)
    return bool(ends) and not any(e.op_type == "QuantizeLinear" or whole(e) or columns(e) is not None for e in ends)


def _ends(node: Any) -> list[Any]:
    """The calls that read a weight, also turned around or in another shape."""
    users = [user for user, _ in node.outputs[0].uses()]
    return [e for user in users for e in (_ends(user) if user.op_type in ("Transpose", "Reshape") else [user])]


def _shield(graph: Any, node: Any) -> None:
    """A Clip to the grid's whole range before a call that reads a rounded activation and gives one."""
    import onnx_ir as ir

    given = node.inputs[0]
    back = given.producer() if given is not None else None
    if node.op_type not in ("Conv", "ConvTranspose") or back is None or back.op_type != "DequantizeLinear":
        return
    scale, zero = (constant_value(v) for v in back.inputs[1:3])
    if scale is None or zero is None or scale.ndim or not quantizers(node):
        return
    info = np.iinfo(zero.dtype)
    ends = [constant(graph, f"{node.name}_{name}", np.float32((end - int(zero)) * float(scale)))
            for name, end in (("lowest", info.min), ("highest", info.max))]
    clip = ir.node("Clip", [given, *ends], name=f"{node.name}_given")
    clip.outputs[0].shape, clip.outputs[0].type = given.shape, given.type
    graph.insert_before(node, [clip])
    node.replace_input_with(0, clip.outputs[0])


def whole(node: Any) -> bool:
    """Whether a call has an integer kernel: a convolution between rounded activations, a matrix product of rounded
    ones; the weight with one scale, or one a channel."""
    if node.op_type not in ("Conv", "MatMul", "Gemm") or len(node.inputs) < 2:
        return False
    back, weight = (node.inputs[i].producer() for i in (0, 1))
    if back is None or back.op_type != "DequantizeLinear" or weight is None:
        return False
    while weight.op_type == "Transpose" and weight.inputs[0].producer() is not None:
        weight = weight.inputs[0].producer()
    if weight.op_type != "DequantizeLinear" or "block_size" in weight.attributes:
        return False
    return node.op_type != "Conv" or _rounded(node)


def _rounded(node: Any) -> bool:
    """Whether nobody reads a call's activation but quantizers, through activation functions at most that a rounding
    stands for."""
    users = [user for user, _ in node.outputs[0].uses()]
    if not users or node.outputs[0].is_graph_output():
        return False
    return all(u.op_type == "QuantizeLinear" or (u.op_type in CUT_OFF and _rounded(u)) for u in users)


def quantizers(node: Any) -> list[Any]:
    """The quantizers that read a call's activation, also through activation functions that a rounding stands for."""
    users = [user for user, _ in node.outputs[0].uses()]
    direct = [user for user in users if user.op_type == "QuantizeLinear"]
    return direct + [q for user in users if user.op_type in CUT_OFF for q in quantizers(user)]


def _plain_gemm(node: Any) -> bool:
    ones = (node.attributes[k].as_float() for k in ("alpha", "beta") if k in node.attributes)
    return all(v == 1 for v in ones) and not ("transA" in node.attributes and node.attributes["transA"].as_int())


def _matrix(value: Any) -> tuple[Any, Any, Any] | None:
    """(initializer, numbers, scales), both of the matrix's shape, of a weight that is dequantized and turned around."""
    node, moves = value.producer(), []
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        moves.append(node)
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or "block_size" in node.attributes or value.shape is None:
        return None
    kept = through(node.inputs[0])
    numbers, scale = constant_value(kept), constant_value(node.inputs[1])
    zero = constant_value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    if numbers is None or scale is None or zero is None or np.any(zero) or numbers.dtype != np.int8:
        return None
    shape = node.inputs[0].shape
    numbers = numbers.reshape([int(s) for s in shape]) if shape is not None else numbers
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if scale.ndim:
        scale = scale.reshape([-1 if i == axis % numbers.ndim else 1 for i in range(numbers.ndim)])
    scale = np.broadcast_to(scale, numbers.shape)
    for move in reversed(moves):
        if move.op_type == "Transpose":
            order = [int(a) for a in move.attributes["perm"].as_ints()] if "perm" in move.attributes else None
            numbers, scale = numbers.transpose(order), scale.transpose(order)
        else:
            size = constant_value(move.inputs[1])
            if size is None:
                return None
            numbers, scale = numbers.reshape(size), scale.reshape(size)
    return (kept, numbers, scale) if numbers.ndim == 2 else None


def _block_size(scales: Any) -> int | None:
    """How many numbers of a column [in] share a scale: all of them, or the longest block that MatMulNBits takes."""
    rows = len(scales)
    for size in (rows, *reversed(BLOCKS)):
        if rows and rows % size == 0 and (scales.reshape(rows // size, size, -1) == scales[::size, None]).all():
            return size
    return None


def _multiplied_in_blocks(node: Any) -> bool:
    """Whether a DequantizeLinear reads a weight of ``blocks``."""
    users = [user for user, _ in node.outputs[0].uses()]
    return node.op_type == "DequantizeLinear" and bool(users) and all(
        u.op_type in ("MatMul", "Gemm") and not whole(u) for u in users)


def _stored(model: Any, forms: tuple[tuple[tuple[str, ...], Form], ...], narrowest: int) -> None:
    opset = 0
    for kinds, form in forms:
        for node in list(model.graph):
            if node.op_type in kinds and form(model.graph, node):
                opset = BLOCKS_OPSET
        sweep(model.graph)
    opset = max(opset, narrow(model, narrowest, _multiplied_in_blocks))
    sweep(model.graph)
    raise_opset(model, opset)


def for_onnx_runtime(model: Any) -> None:
    """Rewrites the stored weights of ``model`` (``onnx_ir``) in place."""
    forms = ((("LSTM",), on_integers), (("MatMul", "Gemm"), blocks), (("DequantizeLinear",), products), *OWN)
    _stored(model, forms, narrowest_of_runtime())


def for_openvino(model: Any) -> None:
    """Groups only: OpenVINO computes what depends on no input before it writes its file, and would undo the rest."""
    _stored(model, ((("MatMul", "Gemm"), groups),), 8)


__all__ = ["for_onnx_runtime", "for_openvino", "matrix", "quantizers", "turned_at_load", "whole"]
