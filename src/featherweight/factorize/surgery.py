"""What a factorized layer is in the graph: two or three calls in the place of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import bias_name, insert_call, readers_of, tensor_node, weight_name
from featherweight.network.matrices import outputs_first
from featherweight.network.operators import schema_argument
from featherweight.numerics import lowrank

aten = torch.ops.aten
#: convolutions that can be split -> their axes of space; linear has none
SPLIT: dict[Any, int] = {
    aten.linear.default: 0,
    aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3,
    aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3,
}
WHOLE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
Ranks = tuple[int, ...]
#: (weight, ranks) -> the factors by name
Factors = Callable[[Tensor, Ranks], dict[str, Tensor]]


def pointwise(weight: Tensor) -> bool:
    """Whether the kernel is 1x1 (or a matrix): one rank rather than two."""
    return weight[0, 0].numel() == 1


def parts(weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """The factors by name, in the order they are called: reduce, core, expand.

    One rank r: reduce [r, i], expand [o, r] (with the kernel's trailing ones). Two ranks (p, q) for o and i: reduce
    [q, i], core [p, q, h, w], expand [o, p]; a factor of full rank is multiplied into the core, unless both are.
    """
    o, i = weight.shape[:2]
    ones = [1] * (weight.dim() - 2)
    if len(ranks) == 1:
        a, b = lowrank.split(weight.reshape(o, i), ranks[0])
        return {"reduce": a.reshape(*a.shape, *ones), "expand": b.reshape(*b.shape, *ones)}
    p, q = ranks
    a, core, b = lowrank.tucker2(weight, p, q)
    found = {"reduce": a.reshape(*a.shape, *ones), "core": core, "expand": b.reshape(*b.shape, *ones)}
    for name in left_out(weight, ranks):
        full = torch.einsum("op,p...->o...", b, core) if name == "expand" else torch.einsum("pq...,qi->pi...", core, a)
        found["core"] = full.contiguous()
        del found[name]
    return found


def blank(weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """Zeros in the shapes of the factors that ``parts`` gives, for questions of size."""
    (o, i), ones = weight.shape[:2], [1] * (weight.dim() - 2)
    p, q = ranks[0], ranks[-1]
    sizes = {"reduce": [q, i, *ones], "core": [p, q, *weight.shape[2:]], "expand": [o, p, *ones]}
    missing = ("core",) if len(ranks) == 1 else left_out(weight, ranks)
    return {name: weight.new_zeros(size) for name, size in sizes.items() if name not in missing}


def multiplied(factors: Mapping[str, Tensor]) -> Tensor:
    """The weight that ``parts`` made these factors of, as far as their ranks give it: [o, i] or [o, i, h, w]."""
    reduce, expand = (factors[n].flatten(1) if n in factors else None for n in ("reduce", "expand"))
    if "core" not in factors:
        assert reduce is not None
        assert expand is not None
        return expand @ reduce
    found = factors["core"]
    if reduce is not None:
        found = torch.einsum("pq...,qi->pi...", found, reduce)
    return found if expand is None else torch.einsum("op,p...->o...", expand, found)


def left_out(weight: Tensor, ranks: Ranks) -> tuple[str, ...]:
    """Which of "reduce" and "expand" is not needed: its rank is full and the other's is not."""
    if len(ranks) == 1 or (ranks[0] == weight.shape[0]) == (ranks[1] == weight.shape[1]):
        return ()
    return ("expand",) if ranks[0] == weight.shape[0] else ("reduce",)


def cost(weight: Tensor, ranks: Ranks | None, places_in: int, places_out: int) -> tuple[int, int, int]:
    """(params, MACs, calls) of the layer, split at ``ranks`` or whole (None), the bias left out.

    places: positions in space (and time, and sample) of its input and output.
    """
    o, i = weight.shape[:2]
    if ranks is None:
        return weight.numel(), weight.numel() * places_out, 1
    if len(ranks) == 1:
        size = ranks[0] * (o + i)
        return size, size * places_out, 2
    p, q = ranks
    without = left_out(weight, ranks)
    first = 0 if "reduce" in without else q * i
    last = 0 if "expand" in without else o * p
    core = p * q * weight[0, 0].numel()
    return first + core + last, first * places_in + (core + last) * places_out, 3 - len(without)


def stem(name: str) -> str:
    """What the factors of the weight ``name`` are called by: "conv1.weight" -> "conv1." (+ "reduce.weight")."""
    return name.removesuffix("weight") if name.endswith("weight") else f"{name}_"


def replace(network: Network, call: Node, ranks: Ranks, make: Factors = parts) -> None:
    """Puts the factors' calls in the place of ``call``; the bias goes with the last, stride and padding with the core
    (with the first where there is none: the rest then sees fewer places)."""
    name = str(weight_name(call))
    weight = network.tensor(name)
    trains = isinstance(weight, nn.Parameter) and weight.requires_grad
    factors = make(outputs_first(call, weight.detach()), ranks)
    bias = _bias(network, call, f"{stem(name)}{list(factors)[-1]}.bias")
    spatial = "core" if "core" in factors else "reduce"
    value: Any = call.args[0]
    for part, factor in factors.items():
        own = f"{stem(name)}{part}.weight"
        stored = nn.Parameter(factor, requires_grad=trains) if isinstance(weight, nn.Parameter) else factor
        network.add_tensor(own, stored, buffer=not isinstance(weight, nn.Parameter))
        args: tuple[Any, ...] = (value, tensor_node(network, own, call), bias if part == list(factors)[-1] else None)
        if call.target is aten.linear.default:
            target: Any = call.target
        elif part == spatial:
            target = call.target
            args += tuple(schema_argument(call, a) for a in ("stride", "padding", "dilation", "groups"))
        else:
            target = WHOLE[SPLIT[call.target]]
        value = insert_call(network, target, args, before=call, like=call)
    call.replace_all_uses_with(value)
    network.graph.erase_node(call)


def _bias(network: Network, call: Node, new: str) -> Any:
    """The node of the layer's bias, stored under ``new`` where no other call reads it."""
    node = schema_argument(call, "bias")
    old = bias_name(call)
    if old is None or len(readers_of(network, old)) != 1 or len(network.tied_names(old)) != 1:
        return node
    value = network.tensor(old)
    network.add_tensor(new, value, buffer=not isinstance(value, nn.Parameter))
    return tensor_node(network, new, call)
