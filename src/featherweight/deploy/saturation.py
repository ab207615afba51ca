"""Which calls of a quantized network saturate on processors without VNNI, found by running it on given inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import WEIGHTED
from featherweight.network.matrices import as_matrix, count_rows, rows_at
from featherweight.network.operators import schema_argument
from featherweight.network.program import Tap
from featherweight.numerics.saturation import saturated

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

ROUNDINGS = {decomposed.quantize_per_tensor.default, decomposed.quantize_per_tensor.tensor}
READINGS = {decomposed.dequantize_per_channel.default, decomposed.dequantize_per_tensor.default}
#: rows of a call's input that are looked at, evenly spread over all
LOOKED_AT = 1024


def saturating(network: Network, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The calls (by module path), in graph order, of which sums of two products of 8 bits saturate in 16 bits on these
    inputs: kernels of x86 processors without VNNI cut them off there. Looks at up to LOOKED_AT rows of each call.

    Example:
        >>> small = fw.quantize.Quantize().plan(network, task).apply(network)
        >>> fw.deploy.saturating(small, (images,))
        ()
    """
    read = {node: parts for node in network.calls(*WEIGHTED) if (parts := _integers(network, node)) is not None}
    found: set[Node] = set()

    def watch(rounding: Node) -> Tap:
        mine = {node: numbers for node, (numbers, given) in read.items() if given is rounding}
        return lambda value: found.update(node for node, numbers in mine.items()
                                          if _saturates(node, numbers, rounding, value))

    with network.taps({rounding.name: watch(rounding) for _, rounding in read.values()}), torch.no_grad():
        network(*args, **(kwargs or {}))
    return tuple(str(node.meta.get("module") or node.name) for node in read if node in found)


def _saturates(node: Node, numbers: Tensor, rounding: Node, given: Tensor) -> bool:
    """Whether a call saturates on the integers that its input is rounded to. Kernels add 128 to signed ones; padding is
    the zero point."""
    zero = schema_argument(rounding, "zero_point")
    zero, shift = zero if isinstance(zero, int) else 0, 128 if given.dtype == torch.int8 else 0
    x = given.cpu().float() - zero
    chosen = torch.unique(torch.linspace(0, count_rows(node, numbers, x) - 1, LOOKED_AT).long())
    window = numbers[0, 0].numel()
    sides = zip(as_matrix(node, numbers), rows_at(node, numbers, x, chosen) + (zero + shift), strict=True)
    return any(bool(saturated(*(side.reshape(len(side), -1, window).transpose(1, 2) for side in both)).any())
               for both in sides)


def _integers(network: Network, node: Node) -> tuple[Tensor, Node] | None:
    """A call's stored integers, outputs first for a linear one, and the rounding of what it reads; None where it does
    not multiply integers."""
    back, weight = node.args[:2]
    turned = isinstance(weight, Node) and weight.target is aten.t.default
    weight = weight.args[0] if turned else weight  # type: ignore[union-attr]
    if not (isinstance(back, Node) and isinstance(weight, Node) and weight.target in READINGS and back.args):
        return None
    rounding, stored = back.args[0], weight.args[0]
    if not (isinstance(rounding, Node) and rounding.target in ROUNDINGS and isinstance(stored, Node)
            and stored.op == "get_attr"):
        return None
    numbers = network.tensor(str(stored.target)).cpu()
    return (numbers.t() if turned else numbers), rounding


__all__ = ["saturating"]
