"""Multiply-accumulates of a network, counted per operator from the shapes that flow.

The convention: one MAC is one multiplication whose product is added into a sum over *weights or over two computed
tensors*: convolutions, linear maps, matrix products, attention, recurrent cells. Biases, normalizations, activations,
pooling, resampling, element-wise arithmetic, quantizing and moving data count zero. Padding is counted as if it were
data. What depends on no input (a weight that is dequantized, or multiplied out of factors) is computed once, not per
sample, and counts zero; the operator that reads it counts as usual. An operator in neither table is *uncounted* and
named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from featherweight.network import Network
from featherweight.network.edit import constant_nodes
from featherweight.network.operators import contracted, has_schema

#: (arguments by schema name, result) -> MACs
Counter = Callable[[Mapping[str, Any], Any], int]


@dataclass(frozen=True)
class Macs:
    """MACs of one sample (of one whole call where the network's batch is fixed).

    by_node: node name -> MACs, of the operators that do any. uncounted: "module path (operator)" of every operator that
    no table knows, so that ``total`` is a lower bound where this is not empty.

    Example:
        >>> counted = fw.measure.macs(network)
        >>> counted.by_node["conv2d_1"], counted.uncounted
        (73728, ())
    """

    total: int
    by_node: Mapping[str, int]
    uncounted: tuple[str, ...] = ()


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _convolution(a: Mapping[str, Any], out: Any) -> int:
    """Every output element sums i/g * h * w products; transposed, every input element is scattered to o/g * h * w."""
    weight = a["weight"]
    each = _size(weight) // weight.shape[0] if weight.shape[0] else 0
    return each * (_size(a["input"]) if a.get("transposed") else _size(out))


def _transposed(a: Mapping[str, Any], out: Any) -> int:
    return _convolution({**a, "transposed": True}, out)


def _linear(a: Mapping[str, Any], out: Any) -> int:
    return _size(out) * int(a["weight"].shape[-1])


def _product(first: str) -> Counter:
    """A matrix product: every output element sums over the last axis of the argument ``first``."""
    return lambda a, out: _size(out) * int(a[first].shape[-1])


def _batched_sum(a: Mapping[str, Any], out: Any) -> int:
    return _size(a["batch1"]) * int(a["batch2"].shape[-1])


def _bilinear(a: Mapping[str, Any], out: Any) -> int:
    """y_o = sum_ij x_i w_oij z_j, as (x w) z: o*i*j and then o*j per sample."""
    o, i, j = (int(s) for s in a["weight"].shape)
    return _size(out) // o * (o * i * j + o * j)


def _attention(a: Mapping[str, Any], out: Any) -> int:
    """q k^T over e, then probabilities times v over s; a causal mask saves nothing in this count."""
    q, k, v = a["query"], a["key"], a["value"]
    heads_and_rows = _size(q) // int(q.shape[-1])
    return heads_and_rows * int(k.shape[-2]) * (int(q.shape[-1]) + int(v.shape[-1]))


def _recurrent(a: Mapping[str, Any], out: Any) -> int:
    """Every weight matrix is multiplied once per time step and sample; packed sequences have only their real steps."""
    matrices = sum(_size(p) for p in a["params"] if p.dim() == 2)
    data = a["input"] if "input" in a else a["data"]
    return matrices * (_size(data) // int(data.shape[-1]))


def _cell(a: Mapping[str, Any], out: Any) -> int:
    return (_size(a["w_ih"]) + _size(a["w_hh"])) * (_size(a["input"]) // int(a["input"].shape[-1]))


def _tensordot(a: Mapping[str, Any], out: Any) -> int:
    return _size(out) * math.prod(int(a["self"].shape[d]) for d in a["dims_self"])


def _einsum(a: Mapping[str, Any], out: Any) -> int:
    """Contracted two by two from the left; a pair costs the product of all its axes, if it sums over a shared one."""
    tensors = list(a["tensors"])
    left, _, result = str(a["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    if not result and "->" not in str(a["equation"]):
        letters = [c for c in sorted(set(left)) if c.isalpha()]
        result = "..." * ("..." in left) + "".join(c for c in letters if left.count(c) == 1)
    sizes: dict[str, int] = {}
    axes = [_einsum_axes(term, tensor, sizes) for term, tensor in zip(terms, tensors, strict=True)]
    final = _einsum_axes(result, None, sizes)
    return sum(math.prod(sizes[c] for c in pair) for pair in contracted(axes, final))


def _einsum_axes(term: str, tensor: Tensor | None, sizes: dict[str, int]) -> set[str]:
    """The axes of one operand as letters; those under an ellipsis are named from the right: "#1", "#2"."""
    before, dots, after = term.partition("...")
    names = list(before)
    if dots:
        hidden = tensor.dim() - len(before) - len(after) if tensor is not None else sum(k[0] == "#" for k in sizes)
        names += [f"#{hidden - i}" for i in range(hidden)]
    names += list(after)
    if tensor is not None:
        for name, size in zip(names, tensor.shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), int(size))
    return set(names)


#: operator (without overload) -> its counter; extend it for operators of your own
COUNTERS: dict[str, Counter] = {
    **{f"aten.conv{d}d": _convolution for d in (1, 2, 3)},
    **{f"aten.conv_transpose{d}d": _transposed for d in (1, 2, 3)},
    "aten.convolution": _convolution, "aten._convolution": _convolution,
    "torchvision.deform_conv2d": _convolution,
    "aten.linear": _linear, "aten.bilinear": _bilinear,
    "aten.matmul": _product("self"), "aten.mm": _product("self"), "aten.bmm": _product("self"),
    "aten.mv": _product("self"), "aten.dot": _product("self"), "aten.vdot": _product("self"),
    "aten.inner": _product("self"), "aten.linalg_matmul": _product("self"), "aten.linalg_vecdot": _product("x"),
    "aten.addmm": _product("mat1"), "aten.addmv": _product("mat"), "aten.baddbmm": _product("batch1"),
    "aten.addbmm": _batched_sum, "aten.tensordot": _tensordot, "aten.einsum": _einsum,
    "aten.scaled_dot_product_attention": _attention,
    "aten.lstm": _recurrent, "aten.gru": _recurrent, "aten.rnn_tanh": _recurrent, "aten.rnn_relu": _recurrent,
    "aten.lstm_cell": _cell, "aten.gru_cell": _cell, "aten.rnn_tanh_cell": _cell, "aten.rnn_relu_cell": _cell,
}

_ZERO = """
    batch_norm instance_norm layer_norm group_norm rms_norm native_layer_norm native_group_norm local_response_norm
    _native_batch_norm_legit_no_training softmax log_softmax _softmax _log_softmax logsumexp cumsum cumprod linalg_norm
    relu prelu rrelu glu selu celu log_sigmoid softmin hardswish hardtanh hardsigmoid softplus softshrink hardshrink
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d lp_pool2d max_unpool2d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    _upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d upsample_trilinear3d
    grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator pixel_shuffle pixel_unshuffle channel_shuffle
    dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout bernoulli
    cat concat stack hstack vstack repeat repeat_interleave tile roll flip rot90 pad constant_pad_nd reflection_pad1d
    reflection_pad2d replication_pad2d index index_select index_put gather scatter scatter_add take take_along_dim where
    masked_fill masked_select embedding embedding_bag one_hot im2col col2im unfold clone contiguous copy to type_as
    zeros ones full empty arange linspace eye zeros_like ones_like full_like empty_like rand_like randn_like new_zeros
    new_ones new_full new_empty scalar_tensor tensor lift_fresh_copy triu tril tril_indices triu_indices meshgrid
    sort argsort topk kthvalue median nonzero unique2 bucketize searchsorted maximum minimum fill zero
    sym_size sym_numel sym_stride sym_storage_offset item _local_scalar_dense _shape_as_tensor
    _assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size
    linalg_vector_norm norm frobenius_norm cosine_similarity normalize _weight_norm _pack_padded_sequence
    _pad_packed_sequence diff cartesian_prod outer ger kron movedim block_diag expand_copy squeeze_copy
    cummax cummin logcumsumexp trapezoid histc bincount
    index_add index_copy index_fill index_reduce scatter_reduce argwhere nonzero_numpy
    select_scatter diagonal_scatter as_strided_scatter masked_scatter __and__ __or__ __xor__ __lshift__ __rshift__"""
#: operators that do no MACs by the convention above, beside views and what torch tags as pointwise or as a reduction
ZERO: set[str] = {f"aten.{name}" for name in _ZERO.split()} | {
    "torchvision.nms", "torchvision.roi_align", "torchvision.roi_pool"}
#: namespaces whose operators count zero: they quantize, dequantize or look up
ZERO_NAMESPACES: set[str] = {"quantized_decomposed"}


def macs(network: Network) -> Macs:
    """MACs per sample of every operator, from the shapes of ``network.values(1)``. Sizes left free other than the
    batch are taken as ``network.example_inputs`` takes them.

    Example:
        >>> fw.measure.macs(network).total
        78592
    """
    values = network.values(1)
    constant = constant_nodes(network)
    found: dict[str, int] = {}
    uncounted: list[str] = []
    for node in network.calls():
        if node in constant:
            continue
        counted = _count(node, values)
        if counted is None:
            uncounted.append(f"{node.meta.get('module') or node.name} ({node.target})")
        elif counted:
            found[node.name] = counted
    return Macs(sum(found.values()), found, tuple(uncounted))


def _count(node: Node, values: Mapping[str, Any]) -> int | None:
    """The MACs of one call; None where no table knows its operator."""
    if not has_schema(node.target):
        return 0  # Python arithmetic on sizes, getitem
    name = str(node.target).rpartition(".")[0]
    counter = COUNTERS.get(name) or COUNTERS.get(name.removesuffix("_"))
    if counter is not None:
        return int(counter(_arguments(node, values), _first(values[node.name])))
    return 0 if _is_zero(node, name) else None


def _is_zero(node: Node, name: str) -> bool:
    target: Any = node.target
    if name in ZERO or name.removesuffix("_") in ZERO or name.partition(".")[0] in ZERO_NAMESPACES:
        return True
    if torch.Tag.pointwise in target.tags or torch.Tag.reduction in target.tags:
        return True
    return not target._schema.is_mutable and any(r.alias_info is not None for r in target._schema.returns)


def _arguments(node: Node, values: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by schema name, nodes replaced by what flows there."""

    def look(argument: Any) -> Any:
        return map_arg(argument, lambda n: values[n.name])

    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: look(v) for a, v in zip(schema, node.args, strict=False)}
    return {a.name: a.default_value for a in schema} | given | {k: look(v) for k, v in node.kwargs.items()}
