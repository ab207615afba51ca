"""What compact filters are in the graph: a few convolutions in the place of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.factorize.surgery import AXES, PLAIN, stem
from featherweight.network import Network
from featherweight.network.edit import insert_call, tensor_node
from featherweight.network.operators import schema_argument

aten = torch.ops.aten
#: names of the tensors that the forms have
PARTS = ("moves.weight", "point.weight", "point.bias", "squeeze.weight", "wide.weight", "wide.bias", "primary.weight",
         "cheap.weight", "ghost.bias", "base", "order")


def options(call: Node) -> dict[str, list[int]]:
    """Stride, padding and dilation of a convolution, one number for each axis of space."""
    axes, found = AXES[call.target], {}
    for name in ("stride", "padding", "dilation"):
        given = schema_argument(call, name)
        found[name] = [0] * axes if isinstance(given, str) else (
            [given] * axes if isinstance(given, int) else list(given) * (axes // len(given)))
    return found


@dataclass(frozen=True)
class Builder:
    """Puts calls in the place of a convolution. weight: the old one, of ``shape``;
    tensors: of the plan, by full name."""

    network: Network
    call: Node
    weight: str
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    def value(self, name: str) -> Tensor:
        return self.tensors[f"{stem(self.weight)}{name}"]

    def stored(self, name: str, value: Tensor | None = None) -> Node:
        """The node of a tensor, trained if it is of floats and the old weight is."""
        old = self.network.tensor(self.weight)
        value, full = self.value(name) if value is None else value, f"{stem(self.weight)}{name}"
        if value.is_floating_point() and isinstance(old, nn.Parameter) and not name.startswith("moves"):
            self.network.add_tensor(full, nn.Parameter(value.to(old), requires_grad=old.requires_grad))
        else:
            self.network.add_tensor(full, value.to(old) if value.is_floating_point() else value.to(old.device),
                                    buffer=True)
        return tensor_node(self.network, full, self.call)

    def make(self, target: Any, *args: Any) -> Node:
        return insert_call(self.network, target, args, before=self.call, like=self.call)

    def bias(self, outputs: Tensor | None = None, name: str = "") -> Node | None:
        """The bias of these outputs, or of all: the plan's, else the layer's."""
        given = self.call.args[2] if len(self.call.args) > 2 else None
        own = self.tensors.get(f"{stem(self.weight)}bias")
        if own is None and (outputs is None or given is None):
            return given if isinstance(given, Node) else None
        value = self.network.tensor(str(given.target)).detach() if own is None else own  # type: ignore[union-attr]
        return self.stored(f"{name}bias", value if outputs is None else value[outputs])

    def convolved(self, x: Any, weight: str, bias: Node | None, like: Mapping[str, list[int]] | None = None,
                  groups: int = 1) -> Node:
        """A convolution with a tensor of the plan, as of 1 x 1 or with the options ``like``."""
        axes, value = AXES[self.call.target], self.value(weight)
        kernel = value.view(*value.shape[:2], *[1] * axes) if value.dim() == 2 else value
        plain = {"stride": [1] * axes, "padding": [0] * axes, "dilation": [1] * axes} if like is None else like
        return self.make(PLAIN[axes], x, self.stored(weight, kernel), bias, plain["stride"], plain["padding"],
                         plain["dilation"], groups)


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


__all__ = ["PARTS", "Builder", "options", "put_fire", "put_ghost", "put_shift"]
