"""Rewrites of an exported model that every runtime wants: clamps and paddings, exact.

- The larger of a value and zero becomes Relu, which a rounding after it can stand for.
- Padding with zeros before a convolution becomes the convolution's own, also where a rounding is between: zero is on
  every grid. No runtime does so by itself once the graph is quantized (a Pad and a rounding more for each convolution
  of a network that was ported from TensorFlow).
- Other padding with zeros between a dequantize and a quantize on the same grid becomes padding integers with the zero
  point: ONNX Runtime (seen on 1.32) carries integers through slices, reshapes and the like, but not through Pad.
- An average pool with ``ceil_mode`` gets its padding before it: ONNX Runtime 1.32 on integers and OpenVINO 2026.4 on
  floats divide by the size of whole windows where they are cut off.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featherweight.deploy.onnx.edit import constant, constant_value, replace, same_grid


def clamp_by_relu(graph: Any, node: Any) -> None:
    """The larger of a value and zero becomes Relu."""
    import onnx_ir as ir

    if len(node.inputs) == 2:
        floor = constant_value(node.inputs[1])
        if floor is not None and floor.size == 1 and floor.dtype.kind == "f" and not floor.any():
            replace(graph, node, [ir.node("Relu", [node.inputs[0]], name=node.name)])


def pad_in_convolutions(graph: Any, node: Any) -> None:
    """Convolutions that read a padding with zeros pad by themselves, also where it is rounded in between."""
    import onnx_ir as ir

    around, given = _zeros_around(node), node.inputs[0]
    if around is None:
        return
    for reader, _ in list(node.outputs[0].uses()):
        backs = [user for user, _ in reader.outputs[0].uses()] if reader.op_type == "QuantizeLinear" else []
        through = [(back, user) for back in backs for user, _ in back.outputs[0].uses()]
        if not all(_pads_input(user, back.outputs[0]) for back, user in through or [(node, reader)]):
            continue
        before = given.producer()
        if through and before is not None and before.op_type == "DequantizeLinear" and same_grid(before, reader):
            for back in backs:
                back.outputs[0].replace_all_uses_with(given)
        else:
            reader.replace_input_with(0, given)
        for call in {id(user): user for _, user in through or [(node, reader)]}.values():
            own = call.attributes["pads"].as_ints() if "pads" in call.attributes else np.zeros_like(around)
            call.attributes["pads"] = ir.AttrInt64s("pads", [int(p) for p in around + np.array(own)])


def _zeros_around(node: Any) -> Any:
    """The numbers of zeros that a Pad puts before and behind each spatial axis, as a convolution's ``pads``; None where
    it does anything else."""
    sizes, rest = constant_value(node.inputs[1]), [v for v in node.inputs[2:] if v is not None]
    value = constant_value(rest[0]) if rest else np.zeros(1)
    mode = node.attributes.get("mode")
    if sizes is None or value is None or np.any(value) or len(rest) > 1 or np.any(sizes < 0):
        return None
    ends = sizes.reshape(2, -1)
    return None if (mode is not None and mode.as_string() != "constant") or np.any(ends[:, :2]) else ends[:, 2:].ravel()


def _pads_input(node: Any, value: Any) -> bool:
    """Whether ``node`` is a convolution of ``value`` that can pad it."""
    auto = node.attributes.get("auto_pad")
    return (node.op_type == "Conv" and node.inputs[0] is value and node.inputs[1] is not value
            and (auto is None or auto.as_string() == "NOTSET"))


def pad_whole_numbers(graph: Any, node: Any) -> None:
    """Padding with zeros between two roundings on one grid becomes padding of integers with the zero point."""
    import onnx_ir as ir

    back = node.inputs[0].producer()
    mode = node.attributes.get("mode")
    value = constant_value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    quantizers = [user for user, _ in node.outputs[0].uses()]
    if back is None or back.op_type != "DequantizeLinear" or value is None or np.any(value) or not quantizers:
        return
    if (mode is not None and mode.as_string() != "constant") or node.outputs[0].is_graph_output():
        return
    if not all(q.op_type == "QuantizeLinear" and same_grid(q, back) for q in quantizers):
        return
    zero = back.inputs[2]
    rest = node.inputs[3:]
    pad = ir.node("Pad", [back.inputs[0], node.inputs[1], zero, *rest], {"mode": "constant"}, name=node.name)
    graph.insert_before(node, [pad])
    pad.outputs[0].name = f"{node.outputs[0].name}_whole"
    for quantizer in quantizers:
        quantizer.outputs[0].replace_all_uses_with(pad.outputs[0])


def whole_windows(graph: Any, node: Any) -> None:
    """An average pool whose last windows may hang over the padding's end (``ceil_mode``) counts what is there, not
    zeros around: its input is padded before."""
    if "ceil_mode" in node.attributes and node.attributes["ceil_mode"].as_int():
        pad_before_pool(graph, node)


def pad_before_pool(graph: Any, node: Any) -> None:
    """Pads the input of an average pool that counts the zeros around it, so that the pool has none to count."""
    import onnx_ir as ir

    counts, pads = (node.attributes.get(name) for name in ("count_include_pad", "pads"))
    if counts is None or not counts.as_int():
        return
    node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
    ends = np.array(pads.as_ints()).reshape(2, -1) if pads is not None else np.zeros(2)
    if not ends.any():
        return
    back = node.inputs[0].producer()
    whole = back is not None and back.op_type == "DequantizeLinear" and len(back.inputs) > 2
    amount = constant(graph, f"{node.name}_pads", np.pad(ends, ((0, 0), (2, 0))).ravel().astype(np.int64))
    given = [back.inputs[0], amount, back.inputs[2]] if whole else [node.inputs[0], amount]
    made = [ir.node("Pad", given, {"mode": "constant"}, name=f"{node.name}_pad")]
    if whole:
        made.append(ir.node("DequantizeLinear", [made[0].outputs[0], *back.inputs[1:]], name=f"{node.name}_read"))
    graph.insert_before(node, made)
    node.attributes["pads"] = ir.AttrInt64s("pads", [0] * ends.size)
    node.replace_input_with(0, made[-1].outputs[0])


__all__ = ["clamp_by_relu", "pad_before_pool", "pad_in_convolutions", "pad_whole_numbers", "whole_windows"]
