"""A network on another device: tensors that are tied stay tied, and calls that make tensors make them there."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import map_aggregate

from featherweight.network.network import Network


def device_of(network: Network) -> torch.device:
    """Where the network's tensors lie; the CPU if it has none."""
    return next((t.device for t in network.tensors().values()), torch.device("cpu"))


def placed(network: Network, device: torch.device | str) -> Network:
    """A copy of ``network`` that runs on ``device``.

    Beside moving the tensors it rewrites the device that calls such as ``aten.arange`` got at capture, which
    ``network.to(device)`` alone leaves behind.
    """
    place = torch.device(device)
    other = network.copy()
    moved: set[int] = set()
    known = other.tensors()
    for name, tensor in known.items():
        if tensor.device != place and id(tensor) not in moved:
            other.set_tensor(name, tensor.to(place))
        moved.add(id(tensor))

    def redirect(argument: Any) -> Any:
        return place if isinstance(argument, torch.device) else argument

    for node in other.calls():
        if any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values())):
            node.args = map_aggregate(node.args, redirect)
            node.kwargs = map_aggregate(node.kwargs, redirect)
    other.changed()
    return other
