"""What flows into the layers on calibration data: second moments of the rows that a weight is multiplied with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network.devices import device_of
from featherweight.network.edit import CONVOLUTIONS, TRANSPOSED, WEIGHTED, weight_name
from featherweight.network.network import Network
from featherweight.network.operators import schema_argument
from featherweight.numerics.patches import patches, transposed_patches
from featherweight.task import Batch, call, move

#: numbers of unfolded rows held at once
HELD = 1 << 24
Calls = Mapping[str, Sequence[Node]]


def as_matrix(node: Node, weight: Tensor) -> Tensor:
    """``weight`` of a linear or convolution call as [g, o, i * k]: groups, outputs of one, what each output reads.

    A transposed convolution keeps its weight as [i, o, *kernel]; here it is turned.
    """
    if node.target not in CONVOLUTIONS:
        return weight[None]
    groups = int(schema_argument(node, "groups"))
    if node.target not in TRANSPOSED:
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2).reshape(groups, weight.shape[1], -1)


def from_matrix(node: Node, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The weight of ``shape`` that ``as_matrix`` made ``matrix`` of."""
    if node.target not in TRANSPOSED:
        return matrix.reshape(shape)
    groups = matrix.shape[0]
    split = matrix.reshape(groups, shape[1], shape[0] // groups, -1)
    return split.transpose(1, 2).reshape(shape)


def rows(node: Node, weight: Tensor, x: Tensor) -> Tensor:
    """[g, n, i * k]: the rows of input ``x`` that ``as_matrix(node, weight)`` is multiplied with."""
    if node.target not in CONVOLUTIONS:
        return x.reshape(1, -1, x.shape[-1])
    kernel = weight.shape[2:]
    axes, groups = len(kernel), int(schema_argument(node, "groups"))
    x = x if x.dim() == axes + 2 else x[None]
    stride, dilation = (_each(schema_argument(node, name), axes) for name in ("stride", "dilation"))
    padding = schema_argument(node, "padding")
    if node.target in TRANSPOSED:
        extra = _each(schema_argument(node, "output_padding"), axes)
        return transposed_patches(x, kernel, stride, _each(padding, axes), extra, dilation, groups)
    if isinstance(padding, str):
        whole = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        sides = [(w // 2, w - w // 2) for w in whole]
    else:
        sides = [(p, p) for p in _each(padding, axes)]
    return patches(x, kernel, stride, sides, dilation, groups)


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * axes if len(found) == 1 else found


class _Enough(Exception):
    """All that was asked for has been computed."""


def inputs_of(network: Network, batch: Batch, nodes: Sequence[Node]) -> dict[str, Tensor]:
    """Call's name -> the input it reads, for one batch. The graph runs no further than the last of them."""
    wanted = dict.fromkeys(str(n.args[0]) for n in nodes)
    last = next(n.name for n in reversed(network.graph.nodes) if n.name in wanted)
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        seen[name] = value.detach().float()
        if name == last:
            raise _Enough

    device = device_of(network)
    with torch.no_grad(), network.taps({name: partial(keep, name) for name in wanted}), suppress(_Enough):
        call(network, move(batch[0], device))
    return {n.name: seen[str(n.args[0])] for n in nodes}


def _chunks(node: Node, weight: Tensor, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the same samples of all ``inputs``, so many at once as may be held."""
    per_sample = max(1, inputs[0][:1].numel() * weight[:1, :1].numel())
    whole = node.target in CONVOLUTIONS and inputs[0].dim() < weight.dim()
    size = inputs[0].shape[0] if whole else max(1, HELD // per_sample)
    for start in range(0, inputs[0].shape[0], size):
        yield tuple(rows(node, weight, x[start:start + size]) for x in inputs)


def second_moments(network: Network, batches: Iterable[Batch], calls: Calls) -> dict[str, Tensor]:
    """Weight's name -> sum of x x^T [g, i * k, i * k], float64, over the rows that it is multiplied with in its calls.

    calls: weight's name -> its linear and convolution calls in ``network``. Runs in evaluation mode, whole batches.
    """
    return {n: h for n, (h, _) in _moments(network, None, batches, calls).items()}


def cross_moments(network: Network, original: Network, batches: Iterable[Batch], calls: Calls,
                  ) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight's name -> (sum of x x^T, sum of x z^T): x flows in ``network``, z at the same place in ``original``,
    which has the same graph."""
    return _moments(network, original, batches, calls)


def _moments(network: Network, original: Network | None, batches: Iterable[Batch], calls: Calls,
             ) -> dict[str, tuple[Tensor, Tensor]]:
    nodes = [n for mine in calls.values() for n in mine]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        here = inputs_of(network, batch, nodes)
        there = here if original is None else inputs_of(original, batch, nodes)
        for name, mine in calls.items():
            weight = network.tensor(name)
            for node in mine:
                for chunk in _chunks(node, weight, here[node.name], *([there[node.name]] if original else [])):
                    turned = chunk[0].transpose(1, 2)
                    both = [(turned @ other).double() for other in chunk]
                    old = found.get(name)
                    found[name] = (both[0] + old[0], both[-1] + old[1]) if old else (both[0], both[-1])
    return found


def input_norms(network: Network, batches: Iterable[Batch], calls: Calls) -> dict[str, Tensor]:
    """Weight's name -> the L2 norm [g, i * k], float64, of every input that it is multiplied with, over all rows."""
    nodes = [n for mine in calls.values() for n in mine]
    found: dict[str, Tensor] = {}
    for batch in batches:
        here = inputs_of(network, batch, nodes)
        for name, mine in calls.items():
            for node in mine:
                for (chunk,) in _chunks(node, network.tensor(name), here[node.name]):
                    found[name] = chunk.square().sum(1).double() + found.get(name, 0.0)
    return {n: t.sqrt() for n, t in found.items()}


def calls_of(network: Network) -> dict[str, list[Node]]:
    """Stored weight's name -> the linear and convolution calls that read it, in order; a tied one under its first."""
    first: dict[int, str] = {}
    found: dict[str, list[Node]] = {}
    for node in network.calls(*WEIGHTED):
        name = weight_name(node)
        if name is not None:
            found.setdefault(first.setdefault(id(network.tensor(name)), name), []).append(node)
    return found
