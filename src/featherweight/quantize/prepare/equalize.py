"""Cross-layer equalization: output channels of a call and input channels of those that read it get equal ranges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.axes.scales import (
    Follower,
    ScaleReader,
    channel_axis,
    input_ranges,
    output_ranges,
    scaled,
    spread,
    unfit,
    widest,
)
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, bias_name, weight_name
from featherweight.numerics.balance import equalizing
from featherweight.steps import Skipped

ROUNDS = 100  #: at most
CLOSE = 1e-3  #: the ranges are equal when no scale differs from 1 by more


@dataclass(frozen=True)
class EqualizedCall:
    """A call, the calls that read its channels, and which channels [o] may be scaled."""

    node: Node
    readers: tuple[ScaleReader, ...]
    free: Tensor


def equalized(network: Network) -> tuple[dict[str, Tensor], list[Skipped]]:
    """Equalizes the weights of ``network`` (batch norm folded) in place; gives the new tensors by name, and the weights
    whose output channels could not be scaled, with why. The network's function stays.

    Nagel et al. 2019, eqs. 9-11, pair by pair in graph order until no scale changes. A reader may be any linear or
    convolution call (what an input channel of a depthwise one is scaled with, its output channel is too, and goes on to
    the next pair). Several readers of an activation are taken as one, whose range is the widest. A channel whose
    weights are almost zero would be scaled up together with its bias, and with it the activation's whole grid: a scale
    is bounded so that no bias gets larger than the largest that its layer had (in the paper's place: absorbing high
    biases, for which the statistics of the batch norm would be needed).
    """
    pairs, skipped = find_pairs(network)
    nodes = {n.name: n for p in pairs for n in (p.node, *(r.node for r in p.readers))}
    weights = {name: network.tensor(str(weight_name(n))).detach().double() for name, n in nodes.items()}
    biases = {p.node.name: network.tensor(name).detach().double() for p in pairs
              if (name := bias_name(p.node)) is not None}
    highest = {name: b.abs().max() for name, b in biases.items()}
    for _ in range(ROUNDS):
        moved = 0.0
        for pair in pairs:
            scale = _scale(pair, weights)
            name = pair.node.name
            if name in biases:
                low = biases[name].abs() / highest[name].clamp(min=torch.finfo(torch.float64).tiny)
                scale = torch.where(pair.free, torch.maximum(scale, low.clamp(max=1)), scale)
                biases[name] = biases[name] / scale
            weights[name] = scaled(pair.node, weights[name], outputs=1 / scale)
            for reader in pair.readers:
                r = reader.node
                weights[r.name] = scaled(r, weights[r.name], inputs=spread(scale, reader.labels))
            moved = max(moved, float((scale - 1).abs().max()))
        if moved < CLOSE:
            break
    values = {}
    for name, node in nodes.items():
        for held, new in ((weight_name(node), weights[name]), (bias_name(node), biases.get(name))):
            if held is not None and new is not None:
                values[held] = new.to(network.tensor(held).dtype)
    for held, new in values.items():
        network.set_tensor(held, new)
    return values, skipped


def find_pairs(network: Network) -> tuple[list[EqualizedCall], list[Skipped]]:
    """The calls of which some output channels may be scaled, in graph order, and why the others may not."""
    follower = Follower(network)
    pairs, skipped = [], []
    for node in network.calls(*WEIGHTED):
        name = weight_name(node) or node.meta.get("module") or node.name
        why = unfit(network, node)
        if why:
            skipped.append(Skipped(name, f"not equalized: {why}"))
            continue
        paths = follower.follow(node, channel_axis(network, node))
        if paths.readers and paths.free.any():
            device = network.tensor(name).device
            readers = tuple(ScaleReader(r.node, r.labels.to(device)) for r in paths.readers)
            pairs.append(EqualizedCall(node, readers, paths.free.to(device)))
        elif any(u.op != "output" for u in node.users):
            reason = paths.reasons[0] if paths.reasons else "no linear or convolution call reads it"
            skipped.append(Skipped(name, f"not equalized with what reads it: {reason}"))
    return pairs, skipped


def _scale(pair: EqualizedCall, weights: dict[str, Tensor]) -> Tensor:
    first = output_ranges(pair.node, weights[pair.node.name])
    second = torch.zeros_like(first)
    for reader in pair.readers:
        ranges = input_ranges(reader.node, weights[reader.node.name])
        second = torch.maximum(second, widest(ranges, reader.labels, len(first)))
    return torch.where(pair.free, equalizing(first, second), 1.0)


__all__ = ["equalized", "find_pairs"]
