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
from featherweight.network.matrices import as_matrix, from_matrix, layout, portions, rows
from featherweight.network.network import Network
from featherweight.task import Batch, call, move

Calls = Mapping[str, Sequence[Node]]


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


def _chunks(node: Node, weight: Tensor, x: Tensor) -> Iterator[Tensor]:
    """The rows [g, n, i * k] that a call's weight is multiplied with, so many at once as may be held."""
    for part in portions(node, weight, x):
        yield rows(node, weight, x[part])


def gram(node: Node, weight: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """Sum of x x^T [g, i * k, i * k], float64, over the rows of a call's ``inputs`` that meet its weight."""
    found = torch.zeros((), dtype=torch.float64, device=weight.device)
    for x in inputs:
        for chunk in _chunks(node, weight, x.float()):
            found = found + (chunk.mT @ chunk).double()
    return found


def second_moments(network: Network, batches: Iterable[Batch], calls: Calls) -> dict[str, Tensor]:
    """Weight's name -> sum of x x^T [g, i * k, i * k], float64, over the rows that it is multiplied with in its calls.

    calls: weight's name -> its linear and convolution calls in ``network``. Runs in evaluation mode, whole batches.
    """
    nodes = [n for mine in calls.values() for n in mine]
    found: dict[str, Tensor] = {}
    for batch in batches:
        here = inputs_of(network, batch, nodes)
        for name, mine in calls.items():
            for node in mine:
                found[name] = gram(node, network.tensor(name), [here[node.name]]) + found.get(name, 0.0)
    return found


def input_norms(network: Network, batches: Iterable[Batch], calls: Calls) -> dict[str, Tensor]:
    """Weight's name -> in its shape, float64, the L2 norm of every input that each number is multiplied with, over all
    rows of all calls."""
    first = {(name, layout(node)): node for name, mine in calls.items() for node in reversed(mine)}
    found: dict[tuple[str, tuple[int, int]], Tensor] = {}  # squares [g, i * k] for the calls of one layout
    for batch in batches:
        here = inputs_of(network, batch, [n for mine in calls.values() for n in mine])
        for name, mine in calls.items():
            for node in mine:
                for chunk in _chunks(node, network.tensor(name), here[node.name]):
                    key = name, layout(node)
                    found[key] = chunk.square().sum(1).double() + found.get(key, 0.0)
    squares: dict[str, Tensor] = {}
    for (name, read), own in found.items():
        node, weight = first[name, read], network.tensor(name)
        spread = from_matrix(node, own[:, None].expand_as(as_matrix(node, weight)), weight.shape)
        squares[name] = spread + squares.get(name, 0.0)
    return {name: own.sqrt() for name, own in squares.items()}
