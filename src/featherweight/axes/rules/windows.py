"""How labels pass windows laid out in columns, positions taken by number, bilinear and deformable layers."""

from __future__ import annotations

import math

import numpy as np
from torch.fx import Node

from featherweight.axes.labels import Cost, Field, Labels, Value
from featherweight.axes.rules.basics import RULES, first, rule, unknown, wrap
from featherweight.axes.rules.weights import tie_bias, weight_cost
from featherweight.axes.trace import Trace
from featherweight.network.operators import schema_argument as argument


@rule("im2col")
def columns(trace: Trace, node: Node) -> Value:
    """[n, c, h, w] -> [n, c * k, places]: a channel becomes its window of k rows."""
    x, shape = first(trace, node), trace.shape(node)
    if len(x.shape) != 4:
        return unknown(trace, node)
    trace.untouchable(x, (2, 3), node, "it is unfolded over")
    x = trace.part(x, 1, node)
    atoms = trace.axis(x, 1, node)
    fields = tuple(f for f in x.fields if f.dims == (0,))
    made = () if atoms is None else (Field((1,), np.repeat(atoms, shape[1] // x.shape[1])),)
    return Labels(shape, (*fields, *made), x.stored)


@rule("col2im")
def folded(trace: Trace, node: Node) -> Value:
    """[n, c * k, places] -> [n, c, h, w]: the k rows of a channel go together."""
    x, shape = first(trace, node), trace.shape(node)
    if len(x.shape) != 3:
        return unknown(trace, node)
    trace.untouchable(x, (2,), node, "it is folded over")
    x = trace.part(x, 1, node)
    atoms = trace.axis(x, 1, node)
    fields = tuple(f for f in x.fields if f.dims == (0,))
    made = () if atoms is None else (Field((1,), trace.unite_along(atoms.reshape(shape[1], -1), 1)),)
    return Labels(shape, (*fields, *made), x.stored)


@rule("gather")
def gathered(trace: Trace, node: Node) -> Value:
    """Positions along one axis by number, other numbers for each channel, or the same for all (an expanded index)."""
    x, index, shape = first(trace, node), trace.of(argument(node, "index")), trace.shape(node)
    assert index is not None
    dim, fields = wrap(int(argument(node, "dim")), x), []
    x = trace.whole(x, dim, node, "channels are taken by a computed position")
    index = trace.whole(index, dim, node, "it says positions")
    for f in x.fields:
        if len(f.dims) == 1 and index.shape[f.dims[0]] == x.shape[f.dims[0]] and (
                f.dims[0] in expanded(trace, argument(node, "index")) or index.field(f.dims[0]) is not None):
            other = index.field(f.dims[0])
            if other is not None:
                trace.tie(f.atoms, trace.axis(index, f.dims[0], node), node, "its index is not cut")
            fields.append(f)
        else:
            trace.freeze(f, node, "its index is not cut")
    trace.untouchable(index, [d for d in range(len(shape)) if x.field(d) is None], node, "what it indexes is not cut")
    return Labels(shape, tuple(fields), x.stored)


def expanded(trace: Trace, index: Node) -> set[int]:
    """The axes along which an index is one position repeated (``expand``): a cut one is as good."""
    given = trace.of(index.args[0]) if index.args else None
    if given is None or not str(index.target).startswith("aten.expand."):
        return set()
    shape = trace.shape(index)
    shift = len(shape) - len(given.shape)
    return {d for d in range(len(shape)) if d < shift or given.shape[d - shift] == 1}


@rule("bilinear")
def bilinear(trace: Trace, node: Node) -> Value:
    """y_o = sum_ij x_i w_oij z_j: each of the weight's axes goes with its own."""
    x, z, w = (trace.of(a) for a in node.args[:3])
    if x is None or z is None or w is None:
        return unknown(trace, node)
    shape, last = trace.shape(node), len(x.shape) - 1
    trace.role(node.args[2], "weight", node, out=0)
    for given, axis in ((x, 1), (z, 2)):
        trace.tie(trace.axis(given, last, node), trace.axis(w, axis, node), node, "it reads an axis that is never cut")
        trace.untouchable(given, range(last), node, "it is no channel")
    rows = trace.axis(w, 0, node)
    tie_bias(trace, node, argument(node, "bias"), rows)
    places = math.prod(shape[:-1])
    every = [trace.axis(w, axis, node) for axis in range(3)]
    for axes in (every, [every[0], every[2]]):  # (x w), and that times z
        known = tuple(a for a in axes if a is not None)
        sizes = math.prod(w.shape) if axes is every else w.shape[0] * w.shape[2]
        trace.costs.append(Cost(node.name, sizes / math.prod(a.size for a in known) * places / trace.batch, known))
    return Labels(shape, () if rows is None else (Field((last,), rows),), x.stored and z.stored and w.stored)


def deformed(trace: Trace, node: Node) -> Value:
    """A convolution that reads where ``offset`` says; the channels of offsets and masks are places, not features."""
    x, w, offset, mask = (trace.of(a) for a in node.args[:4])
    groups, parts = node.args[11:13]
    if x is None or w is None or groups != 1 or parts != 1:
        return unknown(trace, node)
    shape = trace.shape(node)
    for given in (offset, mask):
        if given is not None:
            trace.freeze(given, node, "coordinates")
    trace.role(node.args[1], "weight", node, out=0)
    for dim in (2, 3):
        trace.freeze(w.field(dim), node, "the kernel's window")
    trace.untouchable(x, (0, 2, 3), node, "it is convolved over")
    rows, read = trace.axis(w, 0, node), trace.axis(w, 1, node)
    trace.tie(trace.axis(x, 1, node), read, node, "it reads an axis that is never cut")
    tie_bias(trace, node, node.args[4], rows)
    trace.costs.append(weight_cost(trace, node, shape[0] * math.prod(shape[2:]), w, (rows, read), ()))
    return Labels(shape, () if rows is None else (Field((1,), rows),))


RULES["torchvision.deform_conv2d.default"] = deformed

__all__ = ["expanded"]
