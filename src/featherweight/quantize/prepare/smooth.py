"""SmoothQuant: outliers move from the activations that linear calls read into their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.axes.scales import (
    PASS,
    Follower,
    ScaleReader,
    channel_axis,
    input_ranges,
    scaled,
    spread,
    unfit,
    widest,
)
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.network.edit import WEIGHTED, bias_name, weight_name
from featherweight.numerics.balance import smoothing
from featherweight.quantize.ranges import watched
from featherweight.steps import Skipped
from featherweight.task import Task

aten = torch.ops.aten


@dataclass(frozen=True)
class SmoothedCalls:
    """A call in whose tensors scales are absorbed, the calls that read its channels, which of them are free."""

    node: Node
    readers: tuple[ScaleReader, ...]
    free: Tensor

    @property
    def linears(self) -> list[ScaleReader]:
        return [r for r in self.readers if r.node.target is aten.linear.default]


def smoothed(network: Network, task: Task, alpha: float, batches: int | None) -> tuple[dict[str, Tensor],
                                                                                        list[Skipped]]:
    """Smooths what the linear calls of ``network`` read, in place; gives the new tensors by name, and the linear calls
    whose scales nothing absorbs. The network's function stays.

    Xiao et al. 2023, eqs. 3-4: inputs are divided by s = max|X|^alpha / max|W|^(1 - alpha), weights multiplied. Every
    call that reads the same channels (q, k, v) shares s; 1 / s goes into the affine weights of a layer norm, an rms
    norm or another product with a stored vector, or into the output channels of a linear or convolution call (v for the
    projection behind attention). Raises TaskError where calibration data is missing or empty.
    """
    sites, skipped = find_sites(network)
    seen = _largest_inputs(network, task, {r.node.name: str(r.node.args[0]) for s in sites for r in s.linears}, batches)
    values: dict[str, Tensor] = {}

    def change(name: str, to: Callable[[Tensor], Tensor]) -> None:
        old = network.tensor(name).detach()
        values[name] = to(old.double()).to(old.dtype)
        network.set_tensor(name, values[name])

    for site in sites:
        width = len(site.free)
        inputs, weights = torch.zeros(2, width, dtype=torch.float64, device=site.free.device)
        for reader in site.readers:
            weight = network.tensor(str(weight_name(reader.node))).detach().double()
            weights = torch.maximum(weights, widest(input_ranges(reader.node, weight), reader.labels, width))
        for reader in site.linears:
            inputs = torch.maximum(inputs, widest(seen[reader.node.name], reader.labels, width))
        scale = torch.where(site.free, smoothing(inputs, weights, alpha), 1.0)
        _absorb(site.node, scale, change)
        for reader in site.readers:
            change(str(weight_name(reader.node)), partial(_scaled_inputs, reader, scale))
    return values, skipped


def _scaled_inputs(reader: ScaleReader, scale: Tensor, weight: Tensor) -> Tensor:
    return scaled(reader.node, weight, inputs=spread(scale, reader.labels))


def find_sites(network: Network) -> tuple[list[SmoothedCalls], list[Skipped]]:
    """Where scales of linear calls' inputs are absorbed, in graph order; and the linear calls without such a place."""
    follower = Follower(network)
    sites: list[SmoothedCalls] = []
    stopped: dict[Node, str] = {}
    for node in network.calls():
        why = None if node.target not in ABSORB else ABSORB[node.target](network, node)
        if why is None:
            continue
        if why:
            stopped[node] = why
            continue
        paths = follower.follow(node, channel_axis(network, node) if node.target in WEIGHTED else -1)
        device = device_of(network)
        site = SmoothedCalls(node, tuple(ScaleReader(r.node, r.labels.to(device)) for r in paths.readers),
                             paths.free.to(device))
        if site.linears and site.free.any():
            sites.append(site)
        elif paths.reasons:
            stopped[node] = paths.reasons[0]
    served = {r.node for s in sites for r in s.linears}
    skipped = []
    for node in network.calls(aten.linear.default):
        if node not in served:
            name = weight_name(node) or node.meta.get("module") or node.name
            skipped.append(Skipped(name, f"not smoothed: {unfit(network, node) or _origin(node, stopped)}"))
    return sites, skipped


def _origin(node: Node, stopped: dict[Node, str]) -> str:
    """Why nothing before a linear call absorbs its scales."""
    source: Any = node.args[0]
    while source not in stopped and source.target in PASS and isinstance(source.args[0], Node):
        source = source.args[0]
    if source in stopped:
        return f"what it reads comes from {source.name}: {stopped[source]}"
    if source.op == "placeholder":
        return "it reads an input of the network"
    return f"what it reads comes from {source.target}, which absorbs no scale"


# ---- where scales are absorbed
def _stored(network: Network, arguments: Iterable[Any]) -> str:
    """Why the affine weights of a norm cannot be scaled; "" where they can."""
    given = [a for a in arguments if a is not None]
    if any(not isinstance(a, Node) or a.op != "get_attr" for a in given):
        return "its affine weights are computed"
    return "" if all(len(network.users_of(str(a.target))) == 1 for a in given) else "its weights are read elsewhere too"


def _norm(network: Network, node: Node) -> str:
    if len(node.args) < 3 or node.args[2] is None or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return "a norm without affine weights, or over several axes"
    return _stored(network, node.args[2:4] if node.target is aten.layer_norm.default else node.args[2:3])


def _product(network: Network, node: Node) -> str | None:
    """A product of a computed value with a stored vector along the last axis; None for others."""
    vectors = [a for a in node.args if isinstance(a, Node) and a.op == "get_attr"
               and network.tensor(str(a.target)).dim() == 1 and network.tensor(str(a.target)).is_floating_point()]
    if len(vectors) != 1 or network.tensor(str(vectors[0].target)).numel() == 1:
        return None
    return _stored(network, vectors)


#: operator -> (network, call) -> why it cannot absorb scales along its channels ("": it can; None: it is no such call)
ABSORB: dict[Any, Callable[[Network, Node], str | None]] = {
    aten.layer_norm.default: _norm, aten.rms_norm.default: _norm, aten.mul.Tensor: _product,
    **dict.fromkeys(WEIGHTED, unfit),
}


def _absorb(node: Node, scale: Tensor, change: Callable[[str, Callable[[Tensor], Tensor]], None]) -> None:
    """Divides what a call of ``ABSORB`` gives by ``scale``, along its channels."""
    if node.target in WEIGHTED:
        change(str(weight_name(node)), lambda w: scaled(node, w, outputs=1 / scale))
        if (bias := bias_name(node)) is not None:
            change(bias, lambda b: b / scale)
        return
    for argument in node.args if node.target is aten.mul.Tensor else node.args[2:4]:
        if isinstance(argument, Node) and argument.op == "get_attr":
            change(str(argument.target), lambda t: t / scale)


def _largest_inputs(network: Network, task: Task, wanted: dict[str, str], batches: int | None) -> dict[str, Tensor]:
    """Linear call's name -> [i] float64, the largest magnitude that it reads in each input channel.

    wanted: call's name -> name of the activation that it reads."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        def tap(value: Tensor) -> None:
            new = value.detach().double().abs().reshape(-1, value.shape[-1]).amax(0)
            found[name] = torch.maximum(found.get(name, new), new)

        return tap

    if wanted:
        watched(network, task, {value: watch(value) for value in set(wanted.values())}, batches, "smoothing needs")
    return {name: found[value] for name, value in wanted.items()}


__all__ = ["find_sites", "smoothed"]
