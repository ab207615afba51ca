"""Rewrites of an exported model for OpenVINO, exact. It adds float biases within its integer kernels and takes any
number of channels; these forms it computes wrongly, does not join, or does not have (seen on 2026.4):

- An average that counts zeros around its input counts integers of 0 instead, which are not zero where the grid has a
  zero point.
- The stride of a convolution with a window of one moves to the call before, as if it had no padding.
- The axis of a Fourier transform is taken for 1, whatever it is.
- The largest or least of floats along an axis, rounded behind it: the kernel that does both gives other numbers.
- A pad that goes around: what stands at the other end is put before and behind.
- Values of fewer than 8 bits are cut off before the rounding instead of after it (``onnx.ready.cut_off``): OpenVINO
  joins a rounding with what reads it only where nothing is between.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featherweight.deploy.onnx.edit import constant, constant_value, replace
from featherweight.deploy.onnx.pads import (
    clamp_by_relu,
    pad_before_pool,
    pad_in_convolutions,
    pad_whole_numbers,
    whole_windows,
)
from featherweight.deploy.onnx.passes import Passes


def _zeros_counted(graph: Any, node: Any) -> None:
    """An average that counts zeros around integers with a zero point is taken of an input that is padded before."""
    back = node.inputs[0].producer()
    if back is not None and back.op_type == "DequantizeLinear" and np.any(constant_value(back.inputs[2])):
        pad_before_pool(graph, node)


def _window_of_two(graph: Any, node: Any) -> None:
    """A strided convolution with a window of one and padding gets a window of two, zeros behind, and as much more
    padding."""
    import onnx_ir as ir

    numbers, scaled = constant_value(node.inputs[1]), node.inputs[1].producer()
    numbers = numbers if scaled is None else constant_value(scaled.inputs[0])
    pads, strides = (np.array(node.attributes[k].as_ints()) if k in node.attributes else np.zeros(1)
                     for k in ("pads", "strides"))
    if numbers is None or numbers.ndim < 3 or set(numbers.shape[2:]) != {1} or not pads.any() or strides.max() < 2:
        return
    value = node.inputs[1] if scaled is None else scaled.inputs[0]
    wide = np.pad(numbers, [(0, int(axis > 1)) for axis in range(numbers.ndim)])
    made = constant(graph, f"{value.name}_{node.name}_wide", wide)
    if scaled is not None:
        read = ir.node("DequantizeLinear", [made, *scaled.inputs[1:]], dict(scaled.attributes),
                       name=f"{node.name}_wide")
        graph.insert_before(node, [read])
        made = read.outputs[0]
    pads[len(pads) // 2:] += 1
    node.attributes["pads"] = ir.AttrInt64s("pads", [int(p) for p in pads])
    node.attributes.pop("kernel_shape", None)
    node.replace_input_with(1, made)


def _clamp_floats(graph: Any, node: Any) -> None:
    """Cut off before the rounding instead of after it."""
    import onnx_ir as ir

    before = node.inputs[0].producer()
    if before is None or before.op_type != "QuantizeLinear" or len(before.inputs) < 3 or len(node.inputs) < 3:
        return
    scale, zero, low, high = (constant_value(v) for v in (*before.inputs[1:3], *node.inputs[1:3]))
    if any(v is None or v.ndim for v in (scale, zero, low, high)):
        return
    name = node.outputs[0].name
    ends = [constant(graph, f"{name}_{which}", np.float32((float(end) - float(zero)) * float(scale)))
            for which, end in (("min", low), ("max", high))]
    clip = ir.node("Clip", [before.inputs[0], *ends], name=f"{node.name}_floats")
    clip.outputs[0].shape, clip.outputs[0].type = before.inputs[0].shape, before.inputs[0].type
    again = ir.node("QuantizeLinear", [clip.outputs[0], *before.inputs[1:]], name=before.name)
    replace(graph, node, [clip, again])


def _along_first(graph: Any, node: Any) -> None:
    """A Fourier transform along the axis behind the samples, its input turned around before and after."""
    import onnx_ir as ir

    given, axis = node.inputs[0], constant_value(node.inputs[2]) if len(node.inputs) > 2 else np.array(-2)
    shape = given.shape if given.shape is not None else node.outputs[0].shape
    if axis is None or shape is None:
        return
    along = int(axis) % len(shape)
    if along == 1:
        return
    order = list(range(len(shape)))
    order[1], order[along] = along, 1
    there = ir.node("Transpose", [given], {"perm": order}, name=f"{node.name}_there")
    first = constant(graph, f"{node.name}_axis", np.int64(1))
    found = ir.node("DFT", [there.outputs[0], node.inputs[1], first], dict(node.attributes), name=node.name)
    replace(graph, node, [there, found, ir.node("Transpose", [found.outputs[0]], {"perm": order},
                                                name=f"{node.name}_back")])


def _largest_of_rounded(graph: Any, node: Any) -> None:
    """The largest, or least, of rounded values instead of the rounded largest value, which is the same."""
    import onnx_ir as ir

    uses = list(node.outputs[0].uses())
    rounding = uses[0].node if len(uses) == 1 else None
    if rounding is None or rounding.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output() \
            or any(v is None or v.ndim for v in map(constant_value, rounding.inputs[1:])):
        return
    back = [use.node for use in rounding.outputs[0].uses()]
    if any(reader.op_type != "DequantizeLinear" for reader in back):
        return
    down = ir.node("QuantizeLinear", [node.inputs[0], *rounding.inputs[1:]], dict(rounding.attributes),
                   name=f"{rounding.name}_before")
    up = ir.node("DequantizeLinear", [down.outputs[0], *rounding.inputs[1:]], name=f"{rounding.name}_back")
    graph.insert_before(node, [down, up])
    node.replace_input_with(0, up.outputs[0])
    for reader in back:
        reader.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove(reader, safe=True)
    graph.remove(rounding, safe=True)


def _around(graph: Any, node: Any) -> None:
    """A pad that goes around, axis by axis: the end, the whole and the beginning, one behind the other."""
    import onnx_ir as ir

    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    pads = constant_value(node.inputs[1])
    if mode != "wrap" or pads is None or len(node.inputs) > 3:
        return
    made: list[Any] = []
    value, rank = node.inputs[0], len(pads) // 2

    def part(axis: int, start: int, end: int) -> Any:
        name = f"{node.name}_{axis}_{start}"
        ends = [constant(graph, f"{name}_{what}", np.array([number], np.int64))
                for what, number in (("start", start), ("end", end), ("axis", axis))]
        made.append(ir.node("Slice", [value, *ends], name=name))
        return made[-1].outputs[0]

    for axis in np.flatnonzero(pads[:rank] + pads[rank:]).tolist():
        before, behind = int(pads[axis]), int(pads[rank + axis])
        parts = [part(axis, -before, np.iinfo(np.int64).max)] * (before > 0) + [value]
        parts += [part(axis, 0, behind)] * (behind > 0)
        made.append(ir.node("Concat", parts, {"axis": axis}, name=f"{node.name}_{axis}"))
        value = made[-1].outputs[0]
    if made:
        replace(graph, node, made)


OPENVINO: Passes = {
    "Max": (clamp_by_relu,), "Clip": (_clamp_floats,), "Pad": (pad_in_convolutions, pad_whole_numbers, _around),
    "AveragePool": (whole_windows, _zeros_counted), "Conv": (_window_of_two,), "DFT": (_along_first,),
    "ReduceMax": (_largest_of_rounded,), "ReduceMin": (_largest_of_rounded,)}
