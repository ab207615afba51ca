"""What runtimes do not find by themselves: small rewrites of an exported model, exact but for biases.

A target has a table of passes: operator -> functions that rewrite a node of it, where they find the form they know.

- A mean over all spatial axes becomes GlobalAveragePool, which has an integer kernel (ReduceMean has none).
- An integer convolution of a channel count that is no multiple of four (above all of 3 colours) reads channels of
  zero points up to the next one, against weights of zero: only then has ONNX Runtime on x86 a kernel that needs no
  unfolded copy of its input. Seen with VNNI: 7 to 20 % of such a layer's time, 3 to 6 % of a ResNet-18's or a
  MobileNetV2's.
- The float bias of an integer convolution or Gemm becomes a 32-bit one on the grid of its sums (input scale times
  weight scale). ONNX Runtime runs the call on integers only then: 1.32 still rounds most float biases itself (not
  that of a Gemm that gives a float), 1.22 some, 1.20 none. Weights of few bits are multiplied by a power of two first,
  which makes the grid of the sums finer: a bias rounded to steps of 2-bit sums would give other values than PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from featherweight.deploy.onnx.dynamic import multiply_whole_numbers
from featherweight.deploy.onnx.edit import constant, constant_value, replace, same_grid, sweep
from featherweight.deploy.onnx.pads import clamp_by_relu, pad_in_convolutions, pad_whole_numbers, whole_windows
from featherweight.deploy.onnx.weights import quantizers, whole

#: operator -> functions (graph, node) that rewrite it
Passes = Mapping[str, tuple[Callable[[Any, Any], None], ...]]


def suit(model: Any, passes: Passes) -> None:
    """Rewrites ``model`` (``onnx_ir``) in place."""
    graph = model.graph
    for node in list(graph):
        for rewrite in passes.get(node.op_type, ()):
            rewrite(graph, node)
    sweep(graph)


def _pool_globally(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    given = node.inputs[0]
    axes = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or given.shape is None or len(given.shape) not in (3, 4, 5):
        return
    rank = len(given.shape)
    if sorted(int(a) % rank for a in axes.flatten()) != list(range(2, rank)):
        return
    keep = node.attributes.get("keepdims")
    pool = ir.node("GlobalAveragePool", [given], name=f"{node.name}_pool")
    made = [pool]
    if keep is not None and not keep.as_int():
        readers = [user for user, _ in node.outputs[0].uses()]
        if readers and all(r.op_type == "QuantizeLinear" and same_grid(r, readers[0]) for r in readers):
            grid = readers[0].inputs[1:]  # the pool's own output is rounded, or it runs in float
            made.append(ir.node("QuantizeLinear", [pool.outputs[0], *grid], name=f"{node.name}_round"))
            made.append(ir.node("DequantizeLinear", [made[-1].outputs[0], *grid], name=f"{node.name}_read"))
        made.append(ir.node("Flatten", [made[-1].outputs[0]], {"axis": 1}, name=f"{node.name}_flatten"))
    replace(graph, node, made)


def _read_as_stored(graph: Any, node: Any) -> None:
    """A Gemm turns its weight around itself: only then is the weight seen to be dequantized."""
    import onnx_ir as ir

    turn = node.inputs[1].producer()
    if turn is not None and turn.op_type == "Transpose":
        turns = "transB" in node.attributes and node.attributes["transB"].as_int()
        node.attributes["transB"] = ir.AttrInt64("transB", 0 if turns else 1)
        node.replace_input_with(1, turn.inputs[0])


#: a bias may have so many steps: sums with it must stay within 32 bits
LARGEST_BIAS = 2**30
#: parts of a step of the output's grid that a bias is rounded to, if the weight's numbers leave room
FINE = 4096
#: weights up to here never saturate sums of two products in 16 bits (``numerics/saturation``)
FITS = 64
#: multiples that the kernel wants of a convolution's input and output channels
CHANNELS_IN = 4
CHANNELS_OUT = 16


def _align_channels(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    back, weight = (node.inputs[i].producer() for i in (0, 1))
    if not whole(node) or any(n.op_type != "DequantizeLinear" or len(n.inputs) < 3 for n in (back, weight)):
        return
    numbers, group = constant_value(weight.inputs[0]), node.attributes.get("group")
    known = numbers is not None and numbers.dtype == np.int8 and constant_value(back.inputs[2]) is not None
    if not known or (group is not None and group.as_int() != 1) or len(node.inputs[1].uses()) != 1:
        return
    channels, window = numbers.shape[1], int(np.prod(numbers.shape[2:]))
    more = -channels % CHANNELS_IN
    if not more or numbers.shape[0] % CHANNELS_OUT or (window == 1 and channels > CHANNELS_IN):
        return
    rank = numbers.ndim
    name = weight.inputs[0].name
    wide = np.pad(numbers, [(0, more if axis == 1 else 0) for axis in range(rank)])
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + 1] = more
    weight.inputs[0].const_value = ir.tensor(wide, name=name)
    weight.inputs[0].shape = ir.Shape(wide.shape)
    amount = constant(graph, f"{name}_pads", pads)
    pad = ir.node("Pad", [back.inputs[0], amount, back.inputs[2]], {"mode": "constant"}, name=f"{node.name}_channels")
    again = ir.node("DequantizeLinear", [pad.outputs[0], *back.inputs[1:]], name=f"{node.name}_read")
    graph.insert_before(node, [pad, again])
    node.replace_input_with(0, again.outputs[0])


def _round_bias(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    if len(node.inputs) < 3 or any(i is None for i in node.inputs):
        return
    back, weight = (node.inputs[i].producer() for i in (0, 1))
    if not whole(node) or any(n.op_type != "DequantizeLinear" or len(n.inputs) < 3 for n in (back, weight)):
        return
    bias, given, scales = (constant_value(v) for v in (node.inputs[2], back.inputs[1], weight.inputs[1]))
    if bias is None or given is None or scales is None or bias.ndim != 1 or given.ndim:
        return
    if scales.shape not in ((), bias.shape):
        return
    if np.abs(bias.astype(np.float64)).max(initial=0) / (float(given) * scales.min(initial=np.inf)) >= LARGEST_BIAS:
        weight, scales = _coarser(graph, node, weight, np.abs(bias.astype(np.float64)) / float(given))
    factor = _finer(graph, node, weight, given * scales)
    steps = np.broadcast_to(given * scales / np.float32(factor), bias.shape).astype(np.float32)
    numbers = np.round(bias.astype(np.float64) / steps)
    name = f"{node.inputs[2].name}_{node.name}" if len(node.inputs[2].uses()) > 1 else node.inputs[2].name
    made = [constant(graph, f"{name}_whole", numbers.astype(np.int32)), constant(graph, f"{name}_scale", steps)]
    read = ir.node("DequantizeLinear", made, {"axis": 0}, name=f"{node.name}_bias")
    graph.insert_before(node, [read])
    node.replace_input_with(2, read.outputs[0])


def _coarser(graph: Any, node: Any, weight: Any, biases: Any) -> tuple[Any, Any]:
    """Writes the weight with larger scales where its channel's bias, in steps of the input, would not fit: the weights
    of such a channel are so small beside its bias that their rounding is lost in it. Gives the node that reads the
    weight, and the scales [channels]."""
    import onnx_ir as ir

    numbers, scales = constant_value(weight.inputs[0]), constant_value(weight.inputs[1])
    transposed = node.op_type == "Gemm" and not (node.attributes.get("transB") and node.attributes["transB"].as_int())
    axis, name = int(transposed), weight.outputs[0].name
    old = np.broadcast_to(scales, biases.shape).astype(np.float64)
    new = np.maximum(old, 2 * biases / LARGEST_BIAS).astype(np.float32)
    shape = [-1 if d == axis else 1 for d in range(numbers.ndim)]
    rounded = np.round(numbers.astype(np.float64) * (old / new).reshape(shape)).astype(numbers.dtype)
    made = [constant(graph, f"{name}_{node.name}_{what}", value) for what, value in (
        ("whole", rounded), ("scale", new), ("zero_point", np.zeros(new.shape, numbers.dtype)))]
    read = ir.node("DequantizeLinear", made, {"axis": axis}, name=f"{node.name}_weight")
    graph.insert_before(node, [read])
    node.replace_input_with(1, read.outputs[0])
    return read, new


def _finer(graph: Any, node: Any, weight: Any, steps: Any) -> int:
    """Writes the weight as a power of two times its numbers, where sums of few bits step too coarsely for the bias."""
    numbers, scales = constant_value(weight.inputs[0]), constant_value(weight.inputs[1])
    zero = constant_value(weight.inputs[2])
    if numbers is None or numbers.dtype != np.int8 or np.any(zero) or len(weight.outputs[0].uses()) != 1:
        return 1
    largest, factor = int(np.abs(numbers.astype(np.int16)).max(initial=1)), 1
    grids = [constant_value(user.inputs[1]) for user in quantizers(node)]
    wanted = min((float(g) for g in grids if g is not None and not g.ndim), default=0.0) / FINE
    while 2 * factor * largest <= FITS and float(np.max(steps)) / factor > wanted:
        factor *= 2
    if factor > 1:
        for index, new in enumerate((numbers * np.int8(factor), scales / np.float32(factor))):
            old = weight.inputs[index]
            name, old.name = old.name, f"{old.name}_{node.name}_plain"
            weight.replace_input_with(index, constant(graph, name, new))
    return factor


ONNX_RUNTIME: Passes = {"ReduceMean": (_pool_globally,), "Max": (clamp_by_relu,),
                        "AveragePool": (whole_windows,),
                        "Pad": (pad_in_convolutions, pad_whole_numbers), "Conv": (_align_channels, _round_bias),
                        "MatMul": (multiply_whole_numbers,),
                        "Gemm": (_read_as_stored, multiply_whole_numbers, _round_bias)}
