"""What runtimes do not find by themselves: small rewrites of an exported model, exact but for biases.

A target has a table of passes: operator -> functions that rewrite a node of it, where they find the form they know.

- A mean over all spatial axes becomes GlobalAveragePool, which has a whole-number kernel (ReduceMean has none).
- The larger of a value and zero becomes Relu, which a rounding after it can stand for.
- Padding with zeros between a dequantize and a quantize on the same grid becomes padding whole numbers with the zero
  point: ONNX Runtime (seen on 1.32) carries whole numbers through slices, reshapes and the like, but not through Pad.
- A whole-number convolution of a channel count that is no multiple of four (above all of 3 colours) reads channels of
  zero points up to the next one, against weights of zero: only then has ONNX Runtime on x86 a kernel that needs no
  unfolded copy of its input. Seen: 7 to 20 % of such a layer's time, 3 to 6 % of a ResNet-18's or a MobileNetV2's.
- The float bias of a whole-number convolution or Gemm becomes a 32-bit one on the grid of its sums (input scale times
  weight scale). ONNX Runtime runs the call on whole numbers only then: 1.32 still rounds most float biases itself (not
  that of a Gemm that gives a float), 1.22 some, 1.20 none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: operator -> functions (graph, node) that rewrite it
Passes = Mapping[str, tuple[Callable[[Any, Any], None], ...]]


def suit(model: Any, passes: Passes) -> None:
    """Rewrites ``model`` (``onnx_ir``) in place."""
    graph = model.graph
    for node in list(graph):
        for rewrite in passes.get(node.op_type, ()):
            rewrite(graph, node)
    for node in reversed(list(graph)):
        kept = any(v.is_graph_output() for v in node.outputs)
        if not kept and not any(v.uses() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _pool_globally(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    given = node.inputs[0]
    axes = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
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
        if readers and all(r.op_type == "QuantizeLinear" and _same_grid(r, readers[0]) for r in readers):
            grid = readers[0].inputs[1:]  # the pool's own output is rounded, or it runs in float
            made.append(ir.node("QuantizeLinear", [pool.outputs[0], *grid], name=f"{node.name}_round"))
            made.append(ir.node("DequantizeLinear", [made[-1].outputs[0], *grid], name=f"{node.name}_read"))
        made.append(ir.node("Flatten", [made[-1].outputs[0]], {"axis": 1}, name=f"{node.name}_flatten"))
    _replace(graph, node, made)


def _clamp_by_relu(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    if len(node.inputs) == 2:
        floor = _constant(node.inputs[1])
        if floor is not None and floor.size == 1 and floor.dtype.kind == "f" and not floor.any():
            _replace(graph, node, [ir.node("Relu", [node.inputs[0]], name=node.name)])


def _pad_whole_numbers(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    back = node.inputs[0].producer()
    mode = node.attributes.get("mode")
    value = _constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    quantizers = [user for user, _ in node.outputs[0].uses()]
    if back is None or back.op_type != "DequantizeLinear" or value is None or np.any(value) or not quantizers:
        return
    if (mode is not None and mode.as_string() != "constant") or node.outputs[0].is_graph_output():
        return
    if not all(q.op_type == "QuantizeLinear" and _same_grid(q, back) for q in quantizers):
        return
    zero = back.inputs[2]
    rest = node.inputs[3:]
    pad = ir.node("Pad", [back.inputs[0], node.inputs[1], zero, *rest], {"mode": "constant"}, name=node.name)
    graph.insert_before(node, [pad])
    pad.outputs[0].name = f"{node.outputs[0].name}_whole"
    for quantizer in quantizers:
        quantizer.outputs[0].replace_all_uses_with(pad.outputs[0])


#: a bias of more steps stays float: sums with it could leave 32 bits
LARGEST_BIAS = 2**30
#: multiples that the kernel wants of a convolution's input and output channels
CHANNELS_IN = 4
CHANNELS_OUT = 16


def _align_channels(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    back, weight = (node.inputs[i].producer() for i in (0, 1))
    if any(n is None or n.op_type != "DequantizeLinear" or len(n.inputs) < 3 for n in (back, weight)):
        return
    numbers, group = _constant(weight.inputs[0]), node.attributes.get("group")
    known = numbers is not None and numbers.dtype == np.int8 and _constant(back.inputs[2]) is not None
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
    amount = ir.Value(name=f"{name}_pads", const_value=ir.tensor(pads, name=f"{name}_pads"),
                      shape=ir.Shape(pads.shape), type=ir.TensorType(ir.DataType.INT64))
    graph.register_initializer(amount)
    pad = ir.node("Pad", [back.inputs[0], amount, back.inputs[2]], {"mode": "constant"}, name=f"{node.name}_channels")
    again = ir.node("DequantizeLinear", [pad.outputs[0], *back.inputs[1:]], name=f"{node.name}_read")
    graph.insert_before(node, [pad, again])
    node.replace_input_with(0, again.outputs[0])


def _round_bias(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    if len(node.inputs) < 3 or any(i is None for i in node.inputs):
        return
    back, weight = (node.inputs[i].producer() for i in (0, 1))
    if any(n is None or n.op_type != "DequantizeLinear" or len(n.inputs) < 3 for n in (back, weight)):
        return
    bias, given, scales = _constant(node.inputs[2]), _constant(back.inputs[1]), _constant(weight.inputs[1])
    if bias is None or given is None or scales is None or bias.ndim != 1 or given.ndim or scales.shape != bias.shape:
        return
    steps = (given * scales).astype(np.float32)
    numbers = np.round(bias.astype(np.float64) / steps)
    if np.abs(numbers).max(initial=0) >= LARGEST_BIAS:
        return
    name = f"{node.inputs[2].name}_{node.name}" if len(node.inputs[2].uses()) > 1 else node.inputs[2].name
    made = []
    for known, value in ((f"{name}_whole", numbers.astype(np.int32)), (f"{name}_scale", steps)):
        tensor = ir.tensor(value, name=known)
        made.append(ir.Value(name=known, const_value=tensor, shape=ir.Shape(value.shape),
                             type=ir.TensorType(tensor.dtype)))
        graph.register_initializer(made[-1])
    read = ir.node("DequantizeLinear", made, {"axis": 0}, name=f"{node.name}_bias")
    graph.insert_before(node, [read])
    node.replace_input_with(2, read.outputs[0])


def _same_grid(one: Any, other: Any) -> bool:
    if len(one.inputs) < 3 or len(other.inputs) < 3:
        return False
    pairs = [(_constant(a), _constant(b)) for a, b in zip(one.inputs[1:3], other.inputs[1:3], strict=True)]
    return all(a is not None and b is not None and a.dtype == b.dtype and a.shape == () and np.array_equal(a, b)
               for a, b in pairs)


def _constant(value: Any) -> Any:
    """The numbers behind a value that never changes, else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def _replace(graph: Any, node: Any, made: list[Any]) -> None:
    """Puts the chain ``made`` in the place of ``node``."""
    old, new = node.outputs[0], made[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    graph.insert_before(node, made)
    name = old.name
    old.name = f"{name}_gone"
    new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


ONNX_RUNTIME: Passes = {"ReduceMean": (_pool_globally,), "Max": (_clamp_by_relu,), "Pad": (_pad_whole_numbers,),
                        "Conv": (_align_channels, _round_bias), "Gemm": (_round_bias,)}
#: OpenVINO adds float biases within its whole-number kernels and takes any number of channels
OPENVINO: Passes = {"Max": (_clamp_by_relu,), "Pad": (_pad_whole_numbers,)}
