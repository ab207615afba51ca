"""What compact filters are in the graph: a few convolutions in the place of one."""

from __future__ import annotations

import torch
from torch.fx import Node

from featherweight.factorize.graph.builder import Builder, options
from featherweight.factorize.surgery import AXES

aten = torch.ops.aten
#: names of the tensors that the forms have
PARTS = ("moves.weight", "point.weight", "point.bias", "squeeze.weight", "wide.weight", "wide.bias", "primary.weight",
         "cheap.weight", "ghost.bias", "base", "order")


def put_shift(at: Builder) -> Node:
    """Every channel moved by a depthwise convolution of one 1 each, then 1 x 1."""
    channels = at.shape[1]
    moved = at.convolved(at.call.args[0], "moves.weight", None, options(at.call), channels)
    return at.convolved(moved, "point.weight", at.bias(name="point."))


def put_fire(at: Builder) -> Node:
    """1 x 1, then 1 x 1 and k x k side by side."""
    own, order = options(at.call), at.value("order").argsort()
    count = len(at.value("point.weight"))
    squeezed = at.convolved(at.call.args[0], "squeeze.weight", None)
    point = at.convolved(squeezed, "point.weight", at.bias(order[:count], "point."), {
        **own, "padding": [0] * len(own["padding"]), "dilation": [1] * len(own["dilation"])})
    wide = at.convolved(squeezed, "wide.weight", at.bias(order[count:], "wide."), own)
    return _joined(at, [point, wide])


def put_ghost(at: Builder) -> Node:
    """The primary filters, and a depthwise convolution of what they give."""
    order = at.value("order").argsort()
    count, ghosts = len(at.value("primary.weight")), len(at.value("base"))
    primary = at.convolved(at.call.args[0], "primary.weight", None, options(at.call))
    size, axes = at.value("cheap.weight").shape[2], AXES[at.call.target]
    chosen = at.make(aten.index_select.default, primary, -1 - axes, at.stored("base"))
    cheap = at.convolved(chosen, "cheap.weight", None, {
        "stride": [1] * axes, "padding": [size // 2] * axes, "dilation": [1] * axes}, ghosts)
    assert len(order) == count + ghosts
    whole = _joined(at, [primary, cheap])
    bias = at.bias(name="ghost.")
    return whole if bias is None else at.make(
        aten.add.Tensor, whole, at.make(aten.reshape.default, bias, [-1, *[1] * axes]))


def _joined(at: Builder, parts: list[Node]) -> Node:
    """The channels of all parts in the order of the outputs."""
    axis = -1 - AXES[at.call.target]
    return at.make(aten.index_select.default, at.make(aten.cat.default, parts, axis), axis, at.stored("order"))


__all__ = ["PARTS", "put_fire", "put_ghost", "put_shift"]
