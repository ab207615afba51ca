"""Long short-term memories whose matrices are stored in 8 bits by row: computed on integers (DynamicQuantizeLSTM).

ONNX Runtime rounds what the gates read, inputs and states, to 8 bits when it runs, as it does for linear calls. The
matrices reach it as unsigned numbers about 128, whose products with unsigned activations saturate on no processor.
Seen on ONNX Runtime 1.32, one thread, an x86 CPU with VNNI, of the time that matrices take which are read back to float
at load, one sample, 20 steps: 512 wide 0.36, 256 wide 0.50, 128 wide 0.69, 64 wide 0.95, 32 wide 1.11
(benchmarks/recurrent_layers.py). Signed numbers, which saturate without VNNI, would take a tenth to a fifth less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from featherweight.deploy.onnx.edit import constant, constant_value

#: what lays parts of stored matrices side by side on their way to the call, computed when the runtime loads
MOVES = ("Slice", "Concat", "Unsqueeze")
DOMAIN = "com.microsoft"
NARROWEST = 64  #: states of fewer numbers are faster on floats


def on_integers(graph: Any, node: Any) -> bool:
    """An LSTM of two dequantized matrices becomes a DynamicQuantizeLSTM, if it is not a narrow one."""
    import onnx_ir as ir

    if not _is_plain(node) or not all(_by_row(node.inputs[i]) for i in (1, 2)):
        return False
    made: list[Any] = []
    matrices, grids = [], []
    for value, what in ((node.inputs[1], "input"), (node.inputs[2], "state")):
        name = f"{node.name}_{what}"
        numbers = _moved(value, lambda back: back.inputs[0], made)
        above = [ir.node("Cast", [numbers], {"to": int(ir.DataType.INT32)})]
        above.append(ir.node("Add", [above[-1].outputs[0], constant(graph, f"{name}_middle", np.int32(128))]))
        above.append(ir.node("Cast", [above[-1].outputs[0]], {"to": int(ir.DataType.UINT8)}))
        above.append(ir.node("Transpose", [above[-1].outputs[0]], {"perm": [0, 2, 1]}))
        made += above
        scale = _moved(value, lambda back: back.inputs[1], made)
        zero = constant(graph, f"{name}_zero", np.full(_rows(value), 128, np.uint8))
        matrices.append(above[-1].outputs[0])
        grids += [scale, zero]
    rest = [*node.inputs[3:7], *[None] * (7 - len(node.inputs))]
    outputs = list(node.outputs)
    call = ir.node("DynamicQuantizeLSTM", [node.inputs[0], *matrices, *rest, None, *grids],
                   {k: v for k, v in node.attributes.items() if k != "layout"}, domain=DOMAIN,
                   num_outputs=len(outputs), name=node.name)
    graph.insert_before(node, [*made, call])
    for old, new in zip(outputs, call.outputs, strict=True):
        new.shape, new.type, name = old.shape, old.type, old.name
        old.name = f"{name}_gone"
        new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    graph.opset_imports[DOMAIN] = 1
    return False


def _is_plain(node: Any) -> bool:
    """Whether an LSTM is wide enough, takes time steps first, and has no weights from cells to gates."""
    layout, width = node.attributes.get("layout"), node.attributes["hidden_size"].as_int()
    peepholes = len(node.inputs) > 7 and node.inputs[7] is not None
    return width >= NARROWEST and not peepholes and (layout is None or not layout.as_int())


def _by_row(value: Any) -> bool:
    """Whether a value is made of int8 matrices alone, each dequantized with a scale per row and no zero point."""
    node = value.producer() if value is not None else None
    if node is None:
        return False
    if node.op_type in MOVES:
        return all(_by_row(given) for given in (node.inputs if node.op_type == "Concat" else node.inputs[:1]))
    if node.op_type != "DequantizeLinear" or "block_size" in node.attributes:
        return False
    numbers, scale = constant_value(node.inputs[0]), constant_value(node.inputs[1])
    zero = constant_value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    return numbers is not None and numbers.dtype == np.int8 and scale is not None and scale.ndim == 1 \
        and axis == 0 and zero is not None and not np.any(zero)


def _moved(value: Any, of: Callable[[Any], Any], made: list[Any]) -> Any:
    """What ``of`` gives of each dequantizer that ``value`` is laid together from, laid together likewise. Rows lie
    along the first axis, where scales have their only one."""
    import onnx_ir as ir

    node = value.producer()
    if node.op_type == "DequantizeLinear":
        return of(node)
    given = [_moved(v, of, made) for v in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    rest = [] if node.op_type == "Concat" else node.inputs[1:]
    made.append(ir.node(node.op_type, [*given, *rest], dict(node.attributes)))
    return made[-1].outputs[0]


def _rows(value: Any) -> tuple[int, int]:
    """(directions, rows) of a matrix [directions, rows, columns]."""
    return int(value.shape[0]), int(value.shape[1])


__all__ = ["on_integers"]
