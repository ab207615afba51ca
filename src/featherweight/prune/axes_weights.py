"""How labels pass weights, normalizations and attention: more rules for the table of ``axes_rules``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch.fx import Node

from featherweight.network.operators import schema_argument as argument
from featherweight.prune.axes_rules import broadcast, first, rule, unknown
from featherweight.prune.labels import Cost, Field, Ints, Labels, Trace, Value, path_of, simplify


@rule("linear")
def linear(trace: Trace, node: Node) -> Value:
    x, w = first(trace, node), trace.of(node.args[1])
    assert w is not None
    shape, last = trace.shape(node), len(x.shape) - 1
    trace.role(node.args[1], "weight", node, out=0)
    rows, columns = trace.axis(w, 0, node), trace.axis(w, 1, node)
    trace.tie(trace.axis(x, last, node), columns, node, "it reads an axis that is never cut")
    _bias(trace, node, argument(node, "bias"), rows)
    trace.costs.append(_cost(trace, node, math.prod(shape[:-1]), w, (rows, columns)))
    fields = trace.rest(x, [last])
    if rows is not None and len(w.shape) == 2:
        fields = (*fields, Field((last,), rows))
    return Labels(shape, fields, x.stored and w.stored)


def _bias(trace: Trace, node: Node, bias: Any, rows: Ints | None) -> None:
    b = trace.of(bias)
    if b is not None:
        trace.role(bias, "bias", node)
        trace.tie(trace.axis(b, 0, node), rows, node, "its bias is not cut")


def _cost(trace: Trace, node: Node, places: int, w: Labels, axes: tuple[Ints | None, ...]) -> Cost:
    """``places`` (over the whole batch) times the weight's elements, of which the labelled axes count what is kept."""
    labelled = [a for a in axes if a is not None]
    fixed = math.prod(w.shape) / math.prod(a.size for a in labelled)
    return Cost(node.name, fixed * places / trace.batch, tuple(labelled))


@rule(*(f"conv{n}d.{o}" for n in (1, 2, 3) for o in ("default", "padding")))
def convolution(trace: Trace, node: Node) -> Value:
    return _convolution(trace, node, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def transposed_convolution(trace: Trace, node: Node) -> Value:
    return _convolution(trace, node, transposed=True)


def _convolution(trace: Trace, node: Node, transposed: bool) -> Value:
    x, w = first(trace, node), trace.of(node.args[1])
    assert w is not None
    shape, groups = trace.shape(node), int(argument(node, "groups"))
    channel = len(w.shape) * -1 + len(x.shape) + 1  # axis 1, or 0 without a batch
    kernel = range(2, len(w.shape))
    for d in kernel:
        trace.freeze(w.field(d), node, "the kernel's window")
    out = int(transposed and groups == 1)
    trace.role(node.args[1], "weight", node, out=out)
    a, b = trace.axis(w, 0, node), trace.axis(w, 1, node)
    read = trace.axis(x, channel, node)
    trace.untouchable(x, [d for d in range(len(x.shape)) if d not in (0, channel)], node, "it is convolved over")
    places = math.prod(s for d, s in enumerate(x.shape if transposed else shape) if d != channel)
    if groups == 1:
        made, into = (b, a) if transposed else (a, b)
        trace.tie(read, into, node, "it reads an axis that is never cut")
        trace.costs.append(_cost(trace, node, places, w, (a, b)))
    else:
        made = _grouped(trace, node, read, (a, b), (x.shape[channel], shape[channel], groups), transposed)
        trace.costs.append(_cost(trace, node, places, w, (a,) if whole_groups(x.shape[channel], groups) else (a, b)))
    _bias(trace, node, argument(node, "bias"), made)
    fields = tuple(f for f in x.fields if f.dims == (0,) and channel != 0)
    if made is not None:
        fields = (*fields, Field((channel,), made))
    return Labels(shape, fields, x.stored and w.stored)


def whole_groups(channels: int, groups: int) -> bool:
    """Whether a grouped convolution loses whole groups; else every group loses the same positions."""
    return groups >= channels // groups


def _grouped(trace: Trace, node: Node, read: Ints | None, weight: tuple[Ints | None, Ints | None],
             sizes: tuple[int, int, int], transposed: bool) -> Ints | None:
    """The channels that a grouped convolution makes, tied to those it reads."""
    channels, outputs, groups = sizes
    a, b = weight
    per, each = channels // groups, outputs // groups
    if read is None or a is None:
        for atoms in (read, a, b):
            trace.freeze(atoms, node, "it reads, by groups, an axis that is never cut")
        return None if transposed or a is None else a
    grid = read.reshape(groups, per)
    whole = whole_groups(channels, groups)
    reads = trace.unite_along(grid, 1 if whole else 0)  # one atom per group, or per position in the group
    note = f"whole groups of {per}" if whole else f"the same positions in each of {groups} groups"
    if per > 1 or each > 1:
        trace.blocks.append((grid.ravel(), f"{path_of(node)}: {note}"))
    if not transposed:
        rows = trace.unite_along(a.reshape(groups, each), 1 if whole else 0)
        if whole:
            trace.unite(rows, reads)
            trace.freeze(b, node, "positions inside a group")
        else:
            trace.tie(reads if per > 1 else None, b, node, "positions inside a group")
        return a
    trace.unite(a.reshape(groups, per), reads[:, None] if whole else reads[None, :])
    if whole:
        trace.freeze(b, node, "positions inside a group")
        return np.repeat(reads, each)
    return np.tile(b, groups) if b is not None else None


@rule("embedding")
def embedding(trace: Trace, node: Node) -> Value:
    w, shape = first(trace, node), trace.shape(node)
    trace.role(node.args[0], "weight", node, out=1)
    trace.freeze(w.field(0), node, "it is looked up by number")
    rows = trace.axis(w, 1, node)
    return Labels(shape, (Field((len(shape) - 1,), rows),) if rows is not None else ())


# ---- normalisation
@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(trace: Trace, node: Node) -> Value:
    """Every channel by itself."""
    x = first(trace, node)
    own = trace.axis(x, 1, node)
    for position, role in zip(node.args[1:5], ("norm", "bias", "statistic", "statistic"), strict=True):
        p = trace.of(position)
        if p is not None:
            trace.role(position, role, node)
            trace.tie(own, trace.axis(p, 0, node), node, "it normalises an axis that is never cut")
    fields = trace.untouchable(x, [d for d in range(len(x.shape)) if d != 1], node, "it is averaged over")
    return Labels(trace.shape(node), tuple(f for f in fields if f.dims == (1,)))


@rule("layer_norm", "rms_norm")
def layer_norm(trace: Trace, node: Node) -> Value:
    """Its statistics are taken over the channels: a cut would change the channels that stay."""
    x = first(trace, node)
    over = range(len(x.shape) - len(argument(node, "normalized_shape")), len(x.shape))
    fields = trace.untouchable(x, over, node, "it takes mean and variance over these channels")
    for name, role in (("weight", "norm"), ("bias", "bias")):
        if any(a.name == name for a in node.target._schema.arguments):  # type: ignore[union-attr]
            trace.role(argument(node, name), role, node)
            trace.freeze(trace.of(argument(node, name)), node, "it takes mean and variance over these channels")
    return Labels(x.shape, fields)


@rule("group_norm")
def group_norm(trace: Trace, node: Node) -> Value:
    """A group's statistics are its own: whole groups may go."""
    x, groups = first(trace, node), int(argument(node, "num_groups"))
    own = trace.axis(x, 1, node)
    for name, role in (("weight", "norm"), ("bias", "bias")):
        p = trace.of(argument(node, name))
        if p is not None:
            trace.role(argument(node, name), role, node)
            trace.tie(own, trace.axis(p, 0, node), node, "it normalises an axis that is never cut")
    if own is not None and groups == 1:
        trace.freeze(own, node, "it takes mean and variance over these channels")
    elif own is not None:
        trace.unite_along(own.reshape(groups, -1), 1)
        trace.blocks.append((own, f"{path_of(node)}: whole groups of {own.size // groups}"))
    trace.untouchable(x, [d for d in range(len(x.shape)) if d != 1], node, "it is averaged over")
    return Labels(trace.shape(node), tuple(f for f in x.fields if f.dims == (1,)))


@rule("prelu")
def prelu(trace: Trace, node: Node) -> Value:
    x, w = first(trace, node), trace.of(node.args[1])
    slopes = trace.axis(w, 0, node) if w is not None and w.shape != (1,) else None
    if slopes is not None:
        trace.tie(trace.axis(x, 1, node), slopes, node, "it meets an axis that is never cut")
    return Labels(x.shape, x.fields)


# ---- products of values
def collapse(trace: Trace, x: Labels, dim: int, node: Node) -> Labels:
    """All positions along one axis go together, so that it is never cut: an attention head goes as a whole."""
    fields = []
    for f in x.fields:
        if dim in f.dims:
            if len(f.dims) == 1:
                trace.freeze(f, node, "it is summed over in a product of two values")
                continue
            i = f.dims.index(dim)
            atoms = trace.unite_along(f.atoms, i)
            simple = simplify(trace, Field(tuple(d for d in f.dims if d != dim), atoms), node)
            if simple is None:
                continue
            f = simple
        fields.append(f)
    return Labels(x.shape, tuple(fields), x.stored)


def _whole_heads(trace: Trace, x: Labels, dim: int, node: Node) -> Labels:
    """Lets an axis of a product go that was split off together with others: those others are the heads."""
    f = x.field(dim)
    return collapse(trace, x, dim, node) if f is not None and len(f.dims) > 1 else x


def _heads(trace: Trace, node: Node, inputs: list[Labels], shape: tuple[int, ...]) -> tuple[Field, ...]:
    """The fields over the leading axes, which the inputs share, united."""
    lead = len(shape) - 2
    views = []
    for x in inputs:
        tail = len(x.shape) - 2
        views.append(Labels((*x.shape[:-2], 1, 1), tuple(f for f in x.fields if max(f.dims) < tail), x.stored))
        for f in x.fields:
            if min(f.dims) < tail <= max(f.dims):
                trace.freeze(f, node, "axes of a product that were split together")
    return tuple(broadcast(trace, views, (*shape[:lead], 1, 1), node))


@rule("matmul", "bmm", "mm")
def matmul(trace: Trace, node: Node) -> Value:
    a, b = trace.of(node.args[0]), trace.of(node.args[1])
    shape = trace.shape(node)
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
        return unknown(trace, node)
    ka, kb = len(a.shape) - 1, len(b.shape) - 2
    if a.stored != b.stored and all(f is None or len(f.dims) == 1 for f in (a.field(ka), b.field(kb))):
        trace.tie(trace.axis(a, ka, node), trace.axis(b, kb, node), node, "it reads an axis that is never cut")
        weight = node.args[0] if a.stored else node.args[1]
        trace.role(weight, "weight", node, out=len((a if a.stored else b).shape) - (2 if a.stored else 1))
    else:
        a, b = collapse(trace, a, ka, node), collapse(trace, b, kb, node)
    a, b = _whole_heads(trace, a, ka - 1, node), _whole_heads(trace, b, kb + 1, node)
    fields = list(_heads(trace, node, [a, b], shape))
    for x, own, there in ((a, len(a.shape) - 2, len(shape) - 2), (b, len(b.shape) - 1, len(shape) - 1)):
        f = x.field(own)
        if f is not None and len(f.dims) == 1:
            fields.append(Field((there,), f.atoms))
    inner = trace.axis(a, ka, node)
    axes = [f.atoms for f in fields] + ([inner] if inner is not None and a.stored != b.stored else [])
    total = math.prod(shape) * a.shape[ka] / math.prod(x.size for x in axes)
    trace.costs.append(Cost(node.name, total / trace.batch, tuple(axes)))
    return Labels(shape, tuple(fields), a.stored and b.stored)


@rule("scaled_dot_product_attention")
def attention(trace: Trace, node: Node) -> Value:
    """Heads go as whole blocks, so that the scale, one over the root of a head's width, stays."""
    inputs, shape = [trace.of(n) for n in node.args[:3]], trace.shape(node)
    if any(x is None for x in inputs) or argument(node, "enable_gqa"):
        return unknown(trace, node)
    q, k, v = (x for x in inputs if x is not None)
    q, k = (collapse(trace, x, len(x.shape) - 1, node) for x in (q, k))
    v = _whole_heads(trace, v, len(v.shape) - 1, node)
    for x in (q, k, v):
        trace.untouchable(x, [len(x.shape) - 2], node, "positions in the sequence")
    parts = [q, k, v]
    mask = trace.of(argument(node, "attn_mask"))
    if mask is not None and mask.fields:
        tail = [f for f in mask.fields if max(f.dims) >= len(mask.shape) - 2]
        trace.untouchable(mask, [d for f in tail for d in f.dims], node, "positions in the sequence")
        parts.append(Labels(mask.shape, tuple(f for f in mask.fields if f not in tail)))
    elif mask is not None:
        parts.append(mask)
    fields = _heads(trace, node, parts, shape)
    places = q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1]) * math.prod(shape[:-2])
    axes = tuple(f.atoms for f in fields)
    trace.costs.append(Cost(node.name, places / math.prod(x.size for x in axes) / trace.batch, axes))
    out = v.field(len(v.shape) - 1)
    if out is not None and len(out.dims) == 1:
        fields = (*fields, Field((len(shape) - 1,), out.atoms))
    return Labels(shape, fields)


@rule("sym_size.int")
def size(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    trace.freeze(x.field(int(node.args[1]) % max(len(x.shape), 1)), node, "its length is computed with")  # type: ignore[arg-type]
    return None

