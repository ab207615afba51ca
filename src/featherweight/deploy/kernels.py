"""Tables of what operators do with a grid, and what differs between runtimes; add a row to teach a new operator.

- KERNELS: convolutions and linear calls, which multiply integers wherever their weight is stored.
- JOINERS: add, mul, cat, pools, which have an integer kernel but little work: they run on integers only where
  they save a way to float and back, i.e. where a rounded activation comes in and a rounded one is wanted.
- CARRIERS: operators that move values or take the largest of them, on whatever grid the values are.
- CLAMPS: activations that saturation does for free when the value before them is not rounded but the one after is.
- UNARY: functions of one value that some runtimes compute within the kernel before they round its value.
- COMPARES: products of queries and keys, which some runtimes multiply as integers where both are rounded.
- RULES: deployment target -> what its kernels want.

All other products of two computed values are in no table and stay float. In ONNX Runtime those of queries and keys do
too: with both sides rounded, 1.32 takes 0.39 instead of 0.44 ms (8 heads, 197 x 64 x 197, one thread), and the softmax
behind needs floats anyway.
Recurrent calls are in no table either: their weights are stored all the same (``layers.RECURRENT``), and ONNX Runtime
computes LSTMs of 64 and more numbers on integers, with grids that it chooses itself (``onnx/recurrent``); all others
compute in float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from featherweight.network.edit import TRANSPOSED, WEIGHTED
from featherweight.network.operators import schema_argument
from featherweight.numerics.formats import DYNAMIC

aten = torch.ops.aten

#: operators that multiply integers where their weight is stored as such
KERNELS: set[Any] = {target for target in WEIGHTED if target not in TRANSPOSED}

#: those of them that can round what they read when they run
AT_RUN_TIME: set[Any] = {aten.linear.default}


def _first(node: Node) -> list[Any]:
    return [node.args[0]]


def _two(node: Node) -> list[Any]:
    return list(node.args[:2]) if schema_argument_or(node, "alpha", 1) == 1 else []


def _listed(node: Node) -> list[Any]:
    return list(node.args[0])  # type: ignore[arg-type]


def _spatial(node: Node) -> list[Any]:
    """A pool to one value per channel; pools to other sizes are averages of unequal windows."""
    size = node.args[1]
    return [node.args[0]] if set(size if isinstance(size, (list, tuple)) else [size]) == {1} else []


def _mean(node: Node) -> list[Any]:
    axes = node.args[1] if len(node.args) > 1 else None
    return [node.args[0]] if isinstance(axes, (list, tuple)) and sorted(axes) in ([2, 3], [-2, -1]) else []


#: operator -> function giving the arguments that it joins ([]: in this form it has no integer kernel)
JOINERS: dict[Any, Callable[[Node], list[Any]]] = {
    aten.add.Tensor: _two,
    aten.mul.Tensor: _two,
    aten.cat.default: _listed,
    aten.concat.default: _listed,
    aten.avg_pool2d.default: _first,
    aten.adaptive_avg_pool2d.default: _spatial,
    aten.mean.dim: _mean,
    aten.leaky_relu.default: _first,
}
#: joiners whose inputs and output share one grid
SHARING: set[Any] = {aten.cat.default, aten.concat.default}

#: operators that carry activations along, on one grid with what goes in
CARRIERS: set[Any] = {
    aten.max_pool2d.default, aten.amax.default, aten.amin.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.t.default, aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.pad.default, aten.constant_pad_nd.default,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default,
    aten.upsample_nearest2d.vec, aten.dropout.default, aten.feature_dropout.default,
}
#: operators that give a list whose items (read by getitem) are carried
SPLITTERS: set[Any] = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
                       aten.split.sizes}


def _clamps_at_zero(node: Node) -> bool:
    return bool(schema_argument_or(node, "min", None) == 0)


#: operator -> whether in this form the activation only cuts off ends, the lower one at zero
CLAMPS: dict[Any, Callable[[Node], bool]] = {
    aten.relu.default: lambda node: True,
    aten.relu6.default: lambda node: True,
    aten.hardtanh.default: lambda node: schema_argument_or(node, "min_val", -1) == 0,
    aten.clamp.default: _clamps_at_zero,
    aten.clamp_min.default: _clamps_at_zero,
    aten.clip.default: _clamps_at_zero,
}


#: clamp -> function giving its upper end; those not listed have the argument "max" or "max_val", or none
UPPER_END: dict[Any, Callable[[Node], float]] = {aten.relu6.default: lambda node: 6.0}


def upper_end(node: Node) -> float:
    """Where a clamp cuts off above."""
    if node.target in UPPER_END:
        return UPPER_END[node.target](node)
    end = schema_argument_or(node, "max", schema_argument_or(node, "max_val", None))
    return float("inf") if end is None else float(end)


#: functions of one value, element by element
UNARY: set[Any] = {
    aten.leaky_relu.default, aten.elu.default, aten.gelu.default, aten.hardsigmoid.default, aten.hardswish.default,
    aten.mish.default, aten.sigmoid.default, aten.silu.default, aten.softplus.default, aten.tanh.default,
}


#: operators between a product of queries and keys and its softmax
_SCALED: set[Any] = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar,
                     aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.clamp.default}
_SOFTMAX: set[Any] = {aten.softmax.int, aten._softmax.default}


def _before_softmax(node: Node) -> list[Any]:
    """The two values of a product whose result a softmax alone reads, scaled and masked on the way."""
    after = node
    while after.target not in _SOFTMAX:
        if len(after.users) != 1 or not (after is node or after.target in _SCALED | CARRIERS):
            return []
        after = next(iter(after.users))
    return list(node.args[:2])


#: operator -> function giving the queries and keys that it multiplies ([]: its product is of something else)
COMPARES: dict[Any, Callable[[Node], list[Any]]] = {
    aten.scaled_dot_product_attention.default: lambda node: list(node.args[:2]),
    aten.matmul.default: _before_softmax,
    aten.bmm.default: _before_softmax,
}


@dataclass(frozen=True)
class Rules:
    """What a runtime does on integers, beyond the tables.

    conv_rounds: whether a convolution runs on them only if its value is rounded; otherwise, as linear calls always, it
    gives a float as cheaply. fuses: whether a kernel computes functions of its value (UNARY) before it rounds it.
    transposed: whether transposed convolutions (of one group) multiply integers too. adds: whether sums, products
    and concatenations run on integers. gates: whether a product with a sigmoid of the same value is computed on
    integers in two steps, and faster than in float. compares: whether queries and keys are multiplied as integers.
    """

    conv_rounds: bool
    fuses: bool
    transposed: bool
    adds: bool = True
    gates: bool = False
    compares: bool = False

    def multiplies(self, node: Node) -> bool:
        """Whether this call multiplies integers where its weight is stored as such."""
        whole = self.transposed and node.target in TRANSPOSED and schema_argument_or(node, "groups", 1) == 1
        return node.target in KERNELS or whole

    def takes(self, node: Node, activations: str | None) -> bool:
        """Whether this call multiplies integers where what it reads is of this kind."""
        if activations == DYNAMIC:
            return node.target in AT_RUN_TIME
        return activations is not None and self.multiplies(node)

    def compared(self, node: Node) -> list[Any]:
        """The queries and keys that this call multiplies as integers; none if it is no such product here."""
        return COMPARES[node.target](node) if self.compares and node.target in COMPARES else []

    def must_round(self, target: Any) -> bool:
        return self.conv_rounds and "conv" in str(target)

    def fused(self, target: Any) -> bool:
        return self.fuses and target in UNARY

    def joined(self, node: Node) -> list[Any]:
        """The arguments that this call joins; none if it is no joiner here."""
        return JOINERS[node.target](node) if self.joins(node.target) else []

    def joins(self, target: Any) -> bool:
        return self.adds and target in JOINERS and not self.fused(target)


ONNX_RUNTIME = Rules(conv_rounds=True, fuses=False, transposed=False, gates=True)
#: as seen in the graphs that OpenVINO 2026.4 runs. An add within a convolution leaves out the rounding of what the
#: convolution gives to it; but only where that is there does it run within the convolution. Encoders of BERT-base's
#: shape take 0.95 of the time where queries and keys are rounded too.
OPENVINO = Rules(conv_rounds=False, fuses=True, transposed=True, compares=True)
#: values of fewer than 8 bits, for which no runtime here has kernels: only what meets a weight is rounded, as the
#: literature has it (sums and residual streams stay float)
FEW_BITS = Rules(conv_rounds=False, fuses=True, transposed=True, adds=False)
#: name of a deployment target -> its rules; those not listed are taken to be like ONNX Runtime
RULES: dict[str, Rules] = {"onnxruntime": ONNX_RUNTIME, "openvino": OPENVINO, "openvino-bf16": OPENVINO}


def schema_argument_or(node: Node, name: str, default: Any) -> Any:
    """``schema_argument``, or ``default`` where the operator has no argument of this name."""
    try:
        return schema_argument(node, name)
    except KeyError:
        return default
