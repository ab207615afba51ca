"""How labels pass through what moves, splits, joins and picks elements: more rules for the table in ``basics``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from featherweight.axes.labels import Field, Ints, Labels, Value
from featherweight.axes.rules.basics import RULES, apart, broadcast, first, rule, unknown, wrap
from featherweight.axes.rules.reshapes import reshape
from featherweight.axes.trace import Trace, path_of, simplify
from featherweight.network.operators import schema_argument as argument

__all__ = ["RULES", "pad_widths"]

aten = torch.ops.aten


@rule("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "squeeze", "squeeze.dim",
      "squeeze.dims", "unsqueeze", "view_as", "reshape_as")
def reshaped(trace: Trace, node: Node) -> Value:
    return reshape(trace, first(trace, node), trace.shape(node), node)


@rule("permute", "transpose.int", "swapaxes", "swapdims", "t", "movedim.int", "numpy_T", "mT", "adjoint")
def permuted(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    probe = torch.empty([1] * len(x.shape)).as_strided([i + 1 for i in range(len(x.shape))], [0] * len(x.shape))
    order = [s - 1 for s in node.target(probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]
    return x.moved(trace.shape(node), order.index)


@rule("expand", "expand_as", "broadcast_to")
def expanded(trace: Trace, node: Node) -> Value:
    x, shape = first(trace, node), trace.shape(node)
    shift = len(shape) - len(x.shape)
    grown = [d for d in range(len(x.shape)) if x.shape[d] != shape[d + shift]]
    fields = trace.untouchable(x, grown, node, "one channel is spread over many")
    spread = Labels(x.shape, fields, x.stored).moved(shape, lambda d: d + shift)
    other = trace.of(node.args[1]) if node.target is aten.expand_as.default else None
    if other is None:
        return spread
    for d in grown:
        if any(f.dims[-1] == d + shift for f in other.fields):
            other = trace.part(other, d + shift, node)
    return Labels(shape, (*spread.fields, *(f for d in grown for f in other.fields if f.dims == (d + shift,))))


@rule("repeat")
def repeated(trace: Trace, node: Node) -> Value:
    x, shape = first(trace, node), trace.shape(node)
    shift = len(shape) - len(x.shape)
    fields = trace.untouchable(x, [d for d in range(len(x.shape)) if x.shape[d] != shape[d + shift]], node,
                               "channels are repeated")
    return Labels(x.shape, fields, x.stored).moved(shape, lambda d: d + shift)


def taken(trace: Trace, x: Labels, dim: int, index: Ints | slice, shape: tuple[int, ...], node: Node) -> Labels:
    """Labels after picking positions along one axis that stays."""
    fields = []
    for f in x.fields:
        if dim in f.dims:
            where: list[Any] = [slice(None)] * len(f.dims)
            where[f.dims.index(dim)] = index
            f = Field(f.dims, f.atoms[tuple(where)])
            if len(f.dims) > 1:
                trace.grids.append(f.atoms)
        if f.atoms.size:
            fields.append(f)
    return Labels(shape, tuple(fields), x.stored)


@rule("slice.Tensor", "narrow")
def sliced(trace: Trace, node: Node) -> Value:
    x, shape = first(trace, node), trace.shape(node)
    dim = wrap(int(argument(node, "dim")), x)
    if x.field(dim) is None:
        return Labels(shape, x.fields, x.stored)
    start = argument(node, "start")
    step = 1 if node.target is aten.narrow.default else argument(node, "step")
    if not all(isinstance(v, (int, type(None))) for v in (start, step)) or (step or 1) < 1:
        fields = trace.untouchable(x, [dim], node, "channels are taken by a computed position")
        return Labels(shape, fields, x.stored)
    low = slice(start, None).indices(x.shape[dim])[0]
    return taken(trace, x, dim, slice(low, low + shape[dim] * (step or 1), step or 1), shape, node)


@rule("slice_scatter")
def overwritten(trace: Trace, node: Node) -> Value:
    """A value in which a slice is replaced by another value of the slice's shape."""
    x, part = first(trace, node), trace.of(node.args[1])
    dim, shape = wrap(int(argument(node, "dim")), x), trace.shape(node)
    start, end, step = (argument(node, n) for n in ("start", "end", "step"))
    if part is None or not all(isinstance(v, (int, type(None))) for v in (start, end, step)) or step != 1:
        return unknown(trace, node)
    low = slice(start, None).indices(x.shape[dim])[0]
    inside = taken(trace, x, dim, slice(low, low + part.shape[dim]), part.shape, node)
    kept = broadcast(trace, [inside, part], part.shape, node)
    return Labels(shape, tuple(f for f in x.fields if any(set(f.dims) <= set(k.dims) for k in kept)),
                  x.stored and part.stored)


@rule("select.int")
def selected(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    dim, index = wrap(int(argument(node, "dim")), x), argument(node, "index")
    return _pick(trace, x, dim, index, trace.shape(node), node)


@rule("select_scatter")
def replaced(trace: Trace, node: Node) -> Value:
    """A value in which one position of an axis is replaced by another value, which has no such axis."""
    x, part = first(trace, node), trace.of(node.args[1])
    if part is None:
        return unknown(trace, node)
    dim, index = wrap(int(argument(node, "dim")), x), argument(node, "index")
    inside = _pick(trace, x, dim, index, part.shape, node)
    kept = broadcast(trace, [inside, part], part.shape, node)
    fields = tuple(f for f in x.fields if dim not in f.dims
                   and any({d - (d > dim) for d in f.dims} <= set(k.dims) for k in kept))
    return Labels(x.shape, fields, x.stored and part.stored)


def _pick(trace: Trace, x: Labels, dim: int, index: Any, shape: tuple[int, ...], node: Node) -> Labels:
    """One position of an axis, which goes. It must be an axis that is not cut itself."""
    fields = []
    for f in x.fields:
        if dim not in f.dims:
            fields.append(f)
        elif len(f.dims) == 1 or not isinstance(index, int):
            trace.freeze(f, node, "one channel is taken by its position")
        else:
            i = f.dims.index(dim)
            for axis in range(len(f.dims)):  # the axis itself stays whole: its positions go together
                if axis == i:
                    trace.unite_along(f.atoms, axis)
            dims = tuple(d for d in f.dims if d != dim)
            simple = simplify(trace, Field(dims, f.atoms.take([index], axis=i).squeeze(i)), node)
            if simple is not None:
                fields.append(simple)
    return Labels(x.shape, tuple(fields), x.stored).moved(shape, lambda d: d - (d > dim))


@rule("unbind.int")
def unbound(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    dim = wrap(int(argument(node, "dim")), x)
    shape = x.shape[:dim] + x.shape[dim + 1:]
    return [_pick(trace, x, dim, i, shape, node) for i in range(x.shape[dim])]


@rule("split.Tensor", "split_with_sizes", "split.sizes", "chunk", "tensor_split.sections", "tensor_split.indices",
      "unsafe_split.Tensor", "unsafe_chunk")
def parted(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    dim = wrap(int(argument(node, "dim")), x)
    found, start = [], 0
    for part in trace.shapes[node.name]:
        shape = tuple(int(s) for s in part.shape)
        found.append(taken(trace, x, dim, slice(start, start + shape[dim]), shape, node))
        start += shape[dim]
    return found


def getitem(trace: Trace, node: Node) -> Value:
    value = trace.values.get(node.args[0].name) if isinstance(node.args[0], Node) else None
    return value[node.args[1]] if isinstance(value, list) and isinstance(node.args[1], int) else trace.plain(node)


RULES[operator.getitem] = getitem


@rule("cat", "concat")
def joined(trace: Trace, node: Node) -> Value:
    inputs = [x for x in map(trace.of, node.args[0]) if x is not None and x.shape != (0,)]  # type: ignore[arg-type]
    shape = trace.shape(node)
    dim = int(argument(node, "dim")) % len(shape)
    inputs = [apart(trace, x, inputs, shape, node) for x in inputs]
    fields: list[Field] = []
    parts = [f for f in (x.field(dim) for x in inputs) if f is not None]
    grid = len(parts) == len(inputs) and len(parts[0].dims) > 1 and all(
        f.dims == parts[0].dims and _but(f, dim) == _but(parts[0], dim) for f in parts)
    if grid:  # the other axes that were split off with this one stay beside it
        fields.append(Field(parts[0].dims, np.concatenate([f.atoms for f in parts], parts[0].dims.index(dim))))
        trace.grids.append(fields[0].atoms)
    for other in range(len(shape)):
        if other != dim and not (grid and other in parts[0].dims):
            _joined_across(trace, inputs, other, dim, fields, node)
    if not grid and any(x.field(dim) is not None for x in inputs):
        pieces = []
        for x in inputs:
            atoms = trace.axis(x, dim, node)
            if atoms is None:
                atoms = trace.fresh(x.shape[dim])
                trace.freeze(atoms, node, "it stands beside channels that are cut")
            pieces.append(atoms)
        fields.append(Field((dim,), np.concatenate(pieces)))
    return Labels(shape, tuple(fields), all(x.stored for x in inputs))


def _but(f: Field, dim: int) -> list[int]:
    """The lengths of a field's axes but one."""
    return [n for d, n in zip(f.dims, f.atoms.shape, strict=True) if d != dim]


def _joined_across(trace: Trace, inputs: Sequence[Labels], other: int, dim: int, fields: list[Field],
                   node: Node) -> None:
    """Unites the labels of the axes along which values do not stand beside one another."""
    own = [x.field(other) for x in inputs]
    whole = all(f is not None and f.dims == own[0].dims and dim not in f.dims for f in own)  # type: ignore[union-attr]
    for f in own:
        if f is not None and not whole:
            trace.freeze(f, node, "it meets an axis that is never cut")
    if whole and own[0] is not None and own[0].dims[0] == other:
        for f in own[1:]:
            assert f is not None
            trace.unite(own[0].atoms, f.atoms)
        fields.append(own[0])


@rule("stack")
def stacked(trace: Trace, node: Node) -> Value:
    inputs = [x for x in map(trace.of, node.args[0]) if x is not None]  # type: ignore[arg-type]
    shape = trace.shape(node)
    dim = int(argument(node, "dim")) % len(shape)
    fields: list[Field] = []
    for other in range(len(shape) - 1):
        _joined_across(trace, inputs, other, -1, fields, node)
    return Labels(inputs[0].shape, tuple(fields), all(x.stored for x in inputs)).moved(shape, lambda d: d + (d >= dim))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def padded(trace: Trace, node: Node) -> Value:
    """New channels of zeros are atoms of their own: they follow whatever they are added to."""
    x, shape = first(trace, node), trace.shape(node)
    pads, fields = pad_widths(node, len(shape)), []
    zero = node.target in (aten.pad.default, aten.constant_pad_nd.default) and not argument(node, "value") and (
        node.target is not aten.pad.default or argument(node, "mode") == "constant")
    for f in x.fields:
        grown = [d for d in f.dims if pads[d] != (0, 0)]
        if not grown:
            fields.append(f)
        elif len(f.dims) > 1 or not zero or min(pads[grown[0]]) < 0:
            trace.freeze(f, node, "channels are padded by something else than zeros")
        else:
            low, high = pads[grown[0]]
            fields.append(Field(f.dims, np.concatenate([trace.fresh(low), f.atoms, trace.fresh(high)])))
    return Labels(shape, tuple(fields))


def pad_widths(node: Node, ndim: int) -> list[tuple[int, int]]:
    """(before, after) for every axis; a computed width counts as none, which concerns axes that are never cut only."""
    widths = [w if isinstance(w, int) else 0 for w in argument(node, "padding" if "_pad" in str(node.target) and
              "constant" not in str(node.target) else "pad")]
    pads = [(0, 0)] * ndim
    for i in range(len(widths) // 2):
        pads[ndim - 1 - i] = (widths[2 * i], widths[2 * i + 1])
    return pads


@rule("pixel_shuffle")
def shuffled(trace: Trace, node: Node) -> Value:
    x, shape = first(trace, node), trace.shape(node)
    dim = len(shape) - 3
    atoms = trace.axis(x, dim, node)
    if atoms is None:
        return Labels(shape, trace.rest(x, range(len(shape))))
    fields = trace.untouchable(x, [dim + 1, dim + 2], node, "it mixes channels")
    grid = atoms.reshape(shape[dim], -1)
    trace.blocks.append((grid.ravel(), f"{path_of(node)}: blocks of {grid.shape[1]} for pixel_shuffle"))
    return Labels(shape, (*(f for f in fields if dim not in f.dims), Field((dim,), trace.unite_along(grid, 1))))


@rule("pixel_unshuffle", "repeat_interleave.self_int")
def several(trace: Trace, node: Node) -> Value:
    """Every channel becomes several in a row."""
    x, shape = first(trace, node), trace.shape(node)
    dim = len(shape) - 3 if "pixel" in str(node.target) else argument(node, "dim")
    if dim is None:
        return unknown(trace, node)
    dim = wrap(int(dim), x)
    times = shape[dim] // x.shape[dim]
    fields = trace.untouchable(x, [dim + 1, dim + 2] if "pixel" in str(node.target) else [], node, "it mixes channels")
    return Labels(shape, tuple(Field(f.dims, f.atoms.repeat(times, f.dims.index(dim)) if dim in f.dims else f.atoms)
                               for f in fields), x.stored)
