"""What a factorized layer is in the graph: a chain of calls in the place of each of its calls.

A transposed convolution is the adjoint of the convolution whose kernel it stores: its chain is that kernel's, called
backwards, every link transposed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import CONVOLUTIONS, TRANSPOSED, bias_name, insert_call, readers_of, tensor_node
from featherweight.network.layers import Layer
from featherweight.network.matrices import outputs_first
from featherweight.network.operators import schema_argument
from featherweight.numerics.factors.chains import Link, composed, of_groups, side_by_side
from featherweight.numerics.factors.forms import FORMS, Ranks, Shape, Size, pointwise

aten = torch.ops.aten
#: axes of space -> the call of a link that works along none of them
PLAIN = {0: aten.linear.default, 1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TURNED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
#: options of a convolution that have a number for each axis of space, and what leaves an axis alone
ALONG = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}


def groups_of(call: Node) -> int:
    """The groups of a call: 1 of a linear one."""
    return int(schema_argument(call, "groups")) if call.target in CONVOLUTIONS else 1


def kernels(call: Node, weight: Tensor) -> list[Tensor]:
    """The kernel [o, i, *k] of each group of a call; of a transposed convolution that of its adjoint, as stored."""
    if call.target in CONVOLUTIONS:
        return list(weight.chunk(groups_of(call)))
    return [outputs_first(call, weight)]


def weight_of(call: Node, links: Sequence[Link], shape: torch.Size) -> Tensor:
    """The weight of ``shape`` that a chain stands for."""
    found = torch.cat([composed(chain) for chain in of_groups(links, groups_of(call))])
    return (found.transpose(0, 1) if call.target not in CONVOLUTIONS and found.shape != shape else found).reshape(shape)


def links_of(call: Node, weight: Tensor, form: str, ranks: Ranks) -> list[Link]:
    """The chain of a layer in this form, every group at the same ranks."""
    return side_by_side([FORMS[form].links(kernel, ranks) for kernel in kernels(call, weight.detach())])


def sizes_of(call: Node, shape: Shape, form: str, ranks: Ranks) -> list[Size]:
    """Name, shape and groups of each link of the chain of a layer whose kernel has this shape in each group."""
    groups = groups_of(call)
    return [(name, (own[0] * groups, *own[1:]), g * groups) for name, own, g in FORMS[form].sizes(shape, ranks)]


def form_for(form: str, shape: Shape) -> str:
    """The form that a kernel can have: that of a 1x1 kernel, or of a matrix, is the singular value decomposition."""
    return "svd" if pointwise(shape) else form


def stem(name: str) -> str:
    """What the factors of the weight ``name`` are called by: "conv1.weight" -> "conv1." (+ "reduce.weight")."""
    return name.removesuffix("weight") if name.endswith("weight") else f"{name}_"


# ---- which link works along which axis of space
def owners(sizes: Sequence[Size]) -> list[int]:
    """For each axis of space the number of the link that works along it, with the layer's stride and padding: the one
    that is longer than 1 there; where none is, the core, or the first link."""
    main = next((n for n, (name, _, _) in enumerate(sizes) if name.startswith("core")), 0)
    axes = len(sizes[0][1]) - 2
    return [next((n for n, (_, shape, _) in enumerate(sizes) if shape[2 + d] > 1), main) for d in range(axes)]


@dataclass(frozen=True)
class Places:
    """Positions in space of a call's input and output, and how often all of them occur (samples, tokens)."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    times: int

    @classmethod
    def of(cls, call: Node, values: Mapping[str, Any]) -> Places:
        """Of a call among the ``values`` of one sample."""
        given, made = values[str(call.args[0])], values[call.name]
        if call.target not in CONVOLUTIONS:
            return cls((), (), made.numel() // made.shape[-1])
        axes = AXES[call.target]
        return cls(tuple(given.shape[-axes:]), tuple(made.shape[-axes:]), 1)

    def macs(self, sizes: Sequence[Size], adjoint: bool) -> int:
        """Multiply-accumulates of a chain between them."""
        found, here, owner = 0, list(self.before), owners(sizes)
        for n, (_, shape, _) in reversed(list(enumerate(sizes))) if adjoint else enumerate(sizes):
            there = [self.after[d] if owner[d] == n else size for d, size in enumerate(here)]
            found += math.prod(shape) * math.prod(here if adjoint else there) * self.times
            here = there
        return found


AXES = {target: axes for axes in (1, 2, 3) for target in CONVOLUTIONS if f"{axes}d" in str(target)}


# ---- the graph
def replace(network: Network, layer: Layer, links: Sequence[Link], bias: Tensor | None = None) -> None:
    """Puts a chain in the place of each call of a layer; stride and padding go with the links that work along the axes,
    the bias with the last call.

    bias: a new one [o], None keeps what the calls have.
    """
    weight, calls = network.tensor(layer.weight), layer.calls
    stored, trains = isinstance(weight, nn.Parameter), isinstance(weight, nn.Parameter) and weight.requires_grad
    for link in links:
        value = nn.Parameter(link.weight, requires_grad=trains) if stored else link.weight
        network.add_tensor(f"{stem(layer.weight)}{link.name}.weight", value.to(weight.device), buffer=not stored)
    for call in calls:
        order = list(reversed(links)) if call.target in TRANSPOSED else list(links)
        name = f"{stem(layer.weight)}{order[-1].name}.bias"
        _chain(network, layer.weight, call, order, _bias(network, call, name, bias, trains))


def _chain(network: Network, weight: str, call: Node, order: Sequence[Link], bias: Any) -> None:
    sizes = [(link.name, tuple(link.weight.shape), link.groups) for link in order]
    adjoint = call.target in TRANSPOSED
    owner = owners(list(reversed(sizes)) if adjoint else sizes)
    owner = [len(order) - 1 - n for n in owner] if adjoint else owner
    value: Any = call.args[0]
    for n, link in enumerate(order):
        own = tensor_node(network, f"{stem(weight)}{link.name}.weight", call)
        last = bias if n == len(order) - 1 else None
        target, more = _options(call, [d for d, mine in enumerate(owner) if mine == n], link.groups)
        value = insert_call(network, target, (value, own, last, *more), before=call, like=call)
    call.replace_all_uses_with(value)
    network.graph.erase_node(call)


def _options(call: Node, mine: Sequence[int], groups: int) -> tuple[Any, tuple[Any, ...]]:
    """The operator of a link that works along the axes of space ``mine``, and its arguments after the bias."""
    axes = AXES.get(call.target, 0)
    plain = (TURNED if call.target in TRANSPOSED else PLAIN)[axes]
    if not mine and groups == 1:
        return plain, ()
    target = call.target if mine else plain
    names = [a.name for a in target._schema.arguments[3:]]  # type: ignore[union-attr]
    found: dict[str, Any] = {"groups": groups}
    for name in (n for n in names if n in ALONG):
        given = schema_argument(call, name) if mine else ALONG[name]
        whole = isinstance(given, str) or len(mine) == axes
        spread = [given] * axes if isinstance(given, (int, str)) else list(given) * (axes // len(given))
        found[name] = given if whole else [spread[d] if d in mine else ALONG[name] for d in range(axes)]
    return target, tuple(found[name] if isinstance(found[name], (int, str)) else list(found[name]) for name in names)


def _bias(network: Network, call: Node, new: str, value: Tensor | None, trains: bool) -> Any:
    """The node of the layer's bias, stored under ``new`` where it is a new one or no other call reads it."""
    old = bias_name(call)
    alone = old is not None and len(readers_of(network, old)) == 1 and len(network.tied_names(old)) == 1
    if value is None and not alone:
        return schema_argument(call, "bias")
    if value is None:
        assert old is not None
        kept = network.tensor(old)
    else:
        kept = nn.Parameter(value, requires_grad=trains)
    if new not in network.tensors():
        network.add_tensor(new, kept, buffer=not isinstance(kept, nn.Parameter))
    return tensor_node(network, new, call)
