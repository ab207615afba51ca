"""How labels pass weights, products and attention: more rules for the table in ``basics``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch.fx import Node

from featherweight.axes.labels import Cost, Field, Ints, Labels, Value
from featherweight.axes.rules.basics import broadcast, first, rule, unknown
from featherweight.axes.trace import Trace, path_of
from featherweight.network.operators import schema_argument as argument


@rule("linear")
def linear(trace: Trace, node: Node) -> Value:
    x, w = first(trace, node), trace.of(node.args[1])
    assert w is not None
    shape, last = trace.shape(node), len(x.shape) - 1
    trace.role(node.args[1], "weight", node, out=0)
    if (f := x.field(last)) is not None and len(f.dims) > 1:  # it reads a head's width, which stays
        x = trace.part(x, last, node)
    rows, columns = trace.axis(w, 0, node), trace.axis(w, 1, node)
    trace.tie(trace.axis(x, last, node), columns, node, "it reads an axis that is never cut")
    tie_bias(trace, node, argument(node, "bias"), rows)
    fields = trace.rest(x, [last])
    trace.costs.append(weight_cost(trace, node, math.prod(shape[:-1]), w, (rows, columns), fields))
    if rows is not None and len(w.shape) == 2:
        fields = (*fields, Field((last,), rows))
    return Labels(shape, fields, x.stored and w.stored)


def tie_bias(trace: Trace, node: Node, bias: Any, rows: Ints | None) -> None:
    """A bias goes with the rows of its weight."""
    b = trace.of(bias)
    if b is not None:
        trace.role(bias, "bias", node)
        trace.tie(trace.axis(b, 0, node), rows, node, "its bias is not cut")


def weight_cost(trace: Trace, node: Node, places: int, w: Labels, axes: tuple[Ints | None, ...],
          beside: tuple[Field, ...]) -> Cost:
    """``places`` (over the whole batch) times the weight's elements, of which the labelled axes count what is kept.

    beside: fields over the places themselves, where channels lie along tokens, space or samples.
    """
    labelled = [a for a in (*axes, *(f.atoms for f in beside)) if a is not None]
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
    shape, given = trace.shape(node), argument(node, "groups")
    groups = int(trace.shapes[given.name]) if isinstance(given, Node) else int(given)
    channel = len(w.shape) * -1 + len(x.shape) + 1  # axis 1, or 0 without a batch
    if (f := x.field(channel)) is not None and len(f.dims) > 1:  # heads that were made a batch: their width stays
        x = trace.part(x, channel, node)
    kernel = range(2, len(w.shape))
    for d in kernel:
        trace.freeze(w.field(d), node, "the kernel's window")
    out = int(transposed and groups == 1)
    trace.role(node.args[1], "weight", node, out=out, computed=isinstance(given, Node))
    a, b = trace.axis(w, 0, node), trace.axis(w, 1, node)
    new = isinstance(given, int) and picks(x, channel, groups)
    read = trace.fresh(x.shape[channel]) if new else trace.axis(x, channel, node)
    window = [d for d in range(len(x.shape)) if d not in (0, channel)]
    slides = [d for d in window if not (over_channels(node, x, w) or _one_wide(node, d - len(x.shape), x, w, shape))]
    trace.untouchable(x, slides, node, "it is convolved over")
    beside = tuple(f for f in x.fields if len(f.dims) == 1 and f.dims[0] in window and f.dims[0] not in slides)
    samples = tuple(f for f in x.fields if f.dims == (0,) and channel != 0)
    fewer = (*samples, *(() if over_channels(node, x, w) else beside))
    places = math.prod(s for d, s in enumerate(x.shape if transposed else shape) if d != channel)
    if groups == 1:
        made, into = (b, a) if transposed else (a, b)
        trace.tie(read, into, node, "it reads an axis that is never cut")
        trace.costs.append(weight_cost(trace, node, places, w, (a, b), fewer))
    else:
        whole = isinstance(given, int) and whole_groups(x.shape[channel], groups)
        made = _grouped(trace, node, read, (a, b), (x.shape[channel], shape[channel], groups), transposed, whole)
        own = (a,) if whole else (a, b)
        trace.costs.append(weight_cost(trace, node, places, w, own, fewer))
    tie_bias(trace, node, argument(node, "bias"), made)
    fields = (*beside, *samples)
    if made is not None:
        fields = (*fields, Field((channel,), made))
    return Labels(shape, fields, x.stored and w.stored)


def _one_wide(node: Node, dim: int, x: Labels, w: Labels, shape: tuple[int, ...]) -> bool:
    """Whether a window is one position wide along an axis (counted from the end) and goes over each once."""
    paddings = argument(node, "padding")
    padding = paddings if isinstance(paddings, str) else paddings[dim % len(paddings)]
    return w.shape[dim] == 1 and x.shape[dim] == shape[dim] and padding in (0, "valid", "same")


def over_channels(node: Node, x: Labels, w: Labels) -> bool:
    """Whether a convolution slides over channels that were laid along its one spatial axis (efficient channel
    attention, Wang et al. 2020): it reads zeros where channels were cut (``axes.literals_more.convolution``)."""
    same = len(x.shape) == len(w.shape) == 3 and w.shape[:2] == (1, 1) and w.shape[2] % 2 == 1
    still = all(argument(node, n) in ([1], 1) for n in ("stride", "dilation"))
    return same and still and x.field(2) is not None and argument(node, "padding") in ([w.shape[2] // 2], "same")


def whole_groups(channels: int, groups: int) -> bool:
    """Whether a grouped convolution loses whole groups; else every group loses the same positions."""
    return groups >= channels // groups


def picks(x: Labels, channel: int, groups: int) -> bool:
    """Whether a grouped convolution reads a value without any channels (the network's input): whole groups go all the
    same, and it picks those that it still reads (``axes.literals.convolution``)."""
    return not x.fields and groups > 1 and whole_groups(x.shape[channel], groups)


def _grouped(trace: Trace, node: Node, read: Ints | None, weight: tuple[Ints | None, Ints | None],
             sizes: tuple[int, int, int], transposed: bool, whole: bool) -> Ints | None:
    """The channels that a grouped convolution makes, tied to those it reads; ``whole`` groups go, or positions in all.
    Where there are as many groups as samples, their number is computed: every sample has a weight of its own."""
    channels, outputs, groups = sizes
    a, b = weight
    per, each = channels // groups, outputs // groups
    if read is None or a is None:
        for atoms in (read, a, b):
            trace.freeze(atoms, node, "it reads, by groups, an axis that is never cut")
        return None
    grid = read.reshape(groups, per)
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
    w, plain = first(trace, node), trace.plain(node)
    shape = plain[0].shape if isinstance(plain, list) else trace.shape(node)
    trace.role(node.args[0], "weight", node, out=1)
    trace.freeze(w.field(0), node, "it is looked up by number")
    rows = trace.axis(w, 1, node)
    return Labels(shape, (Field((len(shape) - 1,), rows),) if rows is not None else ())


@rule("embedding_bag")
def embedding_bag(trace: Trace, node: Node) -> Value:
    """Sums, means or largest ones of rows; what is given beside them tells of rows alone."""
    made, plain = embedding(trace, node), trace.plain(node)
    return [made, *plain[1:]] if isinstance(plain, list) and isinstance(made, Labels) else made


# ---- products of values
def contract(trace: Trace, a: Labels, ka: int, b: Labels, kb: int, node: Node) -> tuple[Labels, Labels]:
    """Two values multiplied and summed over axis ``ka`` of one and ``kb`` of the other, cut in both alike."""
    a, b = trace.part(a, ka, node), trace.part(b, kb, node)
    f, g = a.field(ka), b.field(kb)
    if f is not None and g is not None:
        trace.unite(f.atoms, g.atoms)
        return a, b
    for own in (f, g):
        trace.freeze(own, node, "it is multiplied with an axis that is never cut")
    return trace.summed(a, ka, node), trace.summed(b, kb, node)


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


def _for_queries(x: Labels, heads: int) -> Labels:
    """Keys or values of grouped-query attention, each repeated for the queries' heads that share it."""
    dim, times = len(x.shape) - 3, heads // x.shape[-3]
    fields = tuple(Field(f.dims, f.atoms.repeat(times, f.dims.index(dim)) if dim in f.dims else f.atoms)
                   for f in x.fields)
    return Labels((*x.shape[:dim], heads, *x.shape[dim + 1:]), fields, x.stored)


@rule("scaled_dot_product_attention")
def attention(trace: Trace, node: Node) -> Value:
    """Heads go whole, or all lose in width; the scale stays what it was (``axes.literals.attention``)."""
    inputs, shape = [trace.of(n) for n in node.args[:3]], trace.shape(node)
    if any(x is None for x in inputs):
        return unknown(trace, node)
    q, k, v = (x for x in inputs if x is not None)
    if argument(node, "enable_gqa"):
        k, v = (_for_queries(x, q.shape[-3]) for x in (k, v))
    q, k = contract(trace, q, len(q.shape) - 1, k, len(k.shape) - 1, node)
    v = trace.part(v, len(v.shape) - 1, node)
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
    places = q.shape[-2] * k.shape[-2] * math.prod(shape[:-2])
    for x in (q, v):
        axes = tuple(f.atoms for f in (*fields, x.field(len(x.shape) - 1)) if f is not None)
        total = places * x.shape[-1] / math.prod(x.size for x in axes)
        trace.costs.append(Cost(node.name, total / trace.batch, axes))
    out = v.field(len(v.shape) - 1)
    if out is not None:
        fields = (*fields, Field((len(shape) - 1,), out.atoms))
    return Labels(shape, fields)


@rule("sym_size.int")
def size(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    trace.freeze(x.field(int(node.args[1]) % max(len(x.shape), 1)), node, "its length is computed with")  # type: ignore[arg-type]
    return None

