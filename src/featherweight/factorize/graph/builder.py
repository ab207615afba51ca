"""What puts calls and tensors in the place of a layer's call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from featherweight.factorize.surgery import AXES, PLAIN, stem
from featherweight.network import Network
from featherweight.network.edit import insert_call, tensor_node
from featherweight.network.operators import schema_argument


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
    """Puts calls in the place of a convolution or linear call. weight: the old one, of ``shape``;
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

    def buffer(self, name: str, value: Tensor) -> Node:
        """The node of a tensor that no training changes."""
        full = f"{stem(self.weight)}{name}"
        self.network.add_tensor(full, value.to(self.network.tensor(self.weight)), buffer=True)
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


__all__ = ["Builder", "options"]
