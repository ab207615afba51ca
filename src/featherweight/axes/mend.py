"""Numbers in the graph that speak of channels: which calls hold some, and what they become after a cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from featherweight.axes.groups import AxisGroups
from featherweight.axes.labels import Ints, Labels
from featherweight.axes.rules.basics import operators
from featherweight.axes.rules.indexing import index_along
from featherweight.axes.rules.shuffles import channel_order
from featherweight.axes.rules.views import pad_widths
from featherweight.axes.rules.weights import picks, whole_groups
from featherweight.network import Network
from featherweight.network.edit import insert_call
from featherweight.network.operators import schema_argument as argument
from featherweight.network.operators import set_schema_argument

aten = torch.ops.aten


class Cut:
    """A decision on atoms, asked for by whoever rewrites a call. ``kept[atom]``: it stays."""

    def __init__(self, network: Network, axes: AxisGroups, kept: np.ndarray) -> None:
        self.network, self.axes, self.kept = network, axes, kept

    def labels(self, node: Any, index: int | None = None) -> Labels:
        value = self.axes.values[node.name]
        if isinstance(value, list):
            assert index is not None
            return value[index]
        assert isinstance(value, Labels)
        return value

    def stays(self, x: Labels, dim: int) -> np.ndarray:
        """Which positions of one axis stay."""
        f = x.field(dim)
        if f is None:
            return np.ones(x.shape[dim], dtype=bool)
        kept = self.kept[f.atoms]
        i = f.dims.index(dim)
        return np.asarray(kept.any(axis=tuple(a for a in range(kept.ndim) if a != i)))

    def size(self, x: Labels, dim: int) -> int:
        return int(self.stays(x, dim).sum())


Mend = Callable[[Cut, Node], None]
MENDS: dict[Any, Mend] = {}


def mend(*names: str) -> Callable[[Mend], Mend]:
    """Enters a function into the table of mends for these operators."""
    def enter(function: Mend) -> Mend:
        MENDS.update(dict.fromkeys(operators(*names), function))
        return function

    return enter


def changed_dims(cut: Cut, x: Labels) -> dict[int, int]:
    """Axis -> new length, for the axes that a cut made shorter."""
    sizes = {d: cut.size(x, d) for f in x.fields for d in f.dims}
    return {d: s for d, s in sizes.items() if s != x.shape[d]}


@mend("view", "reshape", "_unsafe_view", "expand", "broadcast_to")
def sizes(cut: Cut, node: Node) -> None:
    _sizes(cut, node, {a.name for a in node.target._schema.arguments} & {"size", "shape"}, 0)  # type: ignore[union-attr]


@mend("unflatten.int")
def unflattened(cut: Cut, node: Node) -> None:
    _sizes(cut, node, {"sizes"}, int(argument(node, "dim")) % len(cut.labels(node.args[0]).shape))


def _sizes(cut: Cut, node: Node, names: set[str], start: int) -> None:
    """New literal sizes; a size that the graph computes with an old one becomes -1 (what is left over)."""
    out = cut.labels(node)
    name = names.pop()
    given = list(argument(node, name))
    for dim, new in changed_dims(cut, out).items():
        at = dim - start
        if not 0 <= at < len(given) or given[at] == -1:
            continue
        if isinstance(given[at], int):
            given[at] = new
        elif "expand" not in str(node.target):
            given = [-1 if i == at else _frozen_size(g, out.shape[i + start]) for i, g in enumerate(given)]
    set_schema_argument(node, name, given)


def _frozen_size(given: Any, shape: int) -> Any:
    return shape if isinstance(given, int) and given == -1 else given


@mend("slice.Tensor", "slice_scatter")
def sliced(cut: Cut, node: Node) -> None:
    x = cut.labels(node.args[0])
    dim = int(argument(node, "dim")) % len(x.shape)
    stays = cut.stays(x, dim)
    if stays.all():
        return
    start, end, step = (argument(node, n) for n in ("start", "end", "step"))
    low, high, step = slice(start, end if isinstance(end, int) else None, step).indices(x.shape[dim])
    before = np.concatenate([[0], np.cumsum(stays)])
    if step == 1:
        set_schema_argument(node, "start", int(before[low]))
        set_schema_argument(node, "end", int(before[max(high, low)]))
    else:
        _take(cut, node, dim, np.flatnonzero(np.isin(np.flatnonzero(stays), np.arange(low, high, step))))


def _take(cut: Cut, node: Node, dim: int, index: Ints) -> None:
    """A slice with a step becomes a choice by a stored index."""
    node.args, node.kwargs = (node.args[0], dim, stored(cut, node, "index", index)), {}
    node.target = aten.index_select.default


def stored(cut: Cut, node: Node, what: str, index: np.ndarray) -> Node:
    """A new stored tensor, read before ``node``."""
    name = f"{node.name}_{what}"
    cut.network.add_tensor(name, torch.from_numpy(np.ascontiguousarray(index)), buffer=True)
    with cut.network.graph.inserting_before(node):
        made: Node = cut.network.graph.create_node("get_attr", name)
    return made


@mend("index_select", "index.Tensor")
def indexed(cut: Cut, node: Node) -> None:
    """A stored index names the channels that are left by their new places, and those that are gone no more."""
    dim, index = index_along(cut.network, node)
    if index is None:
        return
    x = cut.labels(node.args[0])
    stays = cut.stays(x, dim)
    if not stays.all():
        order = index.numpy()
        _take(cut, node, dim, (np.cumsum(stays) - 1)[order[stays[order]]])


@mend("channel_shuffle", "native_channel_shuffle")
def shuffled(cut: Cut, node: Node) -> None:
    x = cut.labels(node.args[0])
    reorder(cut, node, str(node.args[0]), 1, channel_order(node, x))


def reorder(cut: Cut, node: Node, source: str, dim: int, order: Ints) -> None:
    """What shuffled channels picks those that are left by their positions."""
    stays = cut.stays(cut.labels(cut.network.node(source)), dim)
    if not stays.all():
        node.args = (cut.network.node(source), *node.args[1:])
        _take(cut, node, dim, (np.cumsum(stays) - 1)[order[stays[order]]])


@mend("narrow")
def narrowed(cut: Cut, node: Node) -> None:
    x = cut.labels(node.args[0])
    dim = int(argument(node, "dim")) % len(x.shape)
    stays = cut.stays(x, dim)
    if not stays.all():
        start = int(argument(node, "start"))
        set_schema_argument(node, "start", int(stays[:start].sum()))
        set_schema_argument(node, "length", int(stays[start:start + int(argument(node, "length"))].sum()))


@mend("split.Tensor", "split_with_sizes", "split.sizes", "chunk", "tensor_split.sections", "tensor_split.indices",
      "unsafe_split.Tensor", "unsafe_chunk")
def parted(cut: Cut, node: Node) -> None:
    x = cut.labels(node.args[0])
    dim = int(argument(node, "dim")) % len(x.shape)
    if cut.stays(x, dim).all():
        return
    parts = cut.axes.values[node.name]
    assert isinstance(parts, list)
    lengths = [cut.size(p, dim) for p in parts]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], lengths, dim), {}


@mend("pad", "constant_pad_nd")
def padded(cut: Cut, node: Node) -> None:
    out = cut.labels(node)
    widths = list(argument(node, "pad"))
    for dim, (low, high) in enumerate(pad_widths(node, len(out.shape))):
        if (low or high) and out.field(dim) is not None:
            stays, at = cut.stays(out, dim), 2 * (len(out.shape) - 1 - dim)
            widths[at], widths[at + 1] = int(stays[:low].sum()), int(stays[len(stays) - high:].sum())
    set_schema_argument(node, "pad", widths)


@mend(*(f"conv{n}d.{o}" for n in (1, 2, 3) for o in ("default", "padding")), "conv_transpose1d",
      "conv_transpose2d.input", "conv_transpose3d.input")
def convolution(cut: Cut, node: Node) -> None:
    """A grouped convolution that lost whole groups has fewer; from an axis that is never cut it picks theirs."""
    x, w, groups = cut.labels(node.args[0]), cut.labels(node.args[1]), argument(node, "groups")
    if not isinstance(groups, int):  # computed: its channels are frozen
        return
    channel = len(x.shape) - len(w.shape) + 1
    if groups > 1 and whole_groups(x.shape[channel], groups):
        left = cut.stays(w, 0).reshape(groups, -1).any(axis=1)
        set_schema_argument(node, "groups", int(left.sum()))
        if picks(x, channel, groups) and not left.all():
            index = stored(cut, node, "picked", np.flatnonzero(left.repeat(x.shape[channel] // groups)))
            call = (node.args[0], channel, index)
            node.update_arg(0, insert_call(cut.network, aten.index_select.default, call, before=node))


@mend("group_norm")
def group_norm(cut: Cut, node: Node) -> None:
    x, groups = cut.labels(node.args[0]), int(argument(node, "num_groups"))
    if whole_groups(x.shape[1], groups):
        set_schema_argument(node, "num_groups", cut.size(x, 1) * groups // x.shape[1])


@mend("layer_norm", "rms_norm")
def layer_norm(cut: Cut, node: Node) -> None:
    x, shape = cut.labels(node.args[0]), list(argument(node, "normalized_shape"))
    start = len(x.shape) - len(shape)
    set_schema_argument(node, "normalized_shape", [cut.size(x, start + i) for i in range(len(shape))])


@mend("scaled_dot_product_attention")
def attention(cut: Cut, node: Node) -> None:
    """The scale stays one over the root of the width that a head had."""
    q = cut.labels(node.args[0])
    if argument(node, "scale") is None and not cut.stays(q, len(q.shape) - 1).all():
        set_schema_argument(node, "scale", q.shape[-1] ** -0.5)
