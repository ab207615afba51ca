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
from featherweight.network.edit import CONVOLUTIONS
from featherweight.network.matrices import rows
from featherweight.network.network import Network
from featherweight.task import Batch, call, move

#: numbers of unfolded rows held at once
HELD = 1 << 24
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
