"""The layers of a network: weights by name, and the calls that read them."""

from __future__ import annotations

from torch.fx import Node

from featherweight.network.edit import WEIGHTED, weight_name
from featherweight.network.network import Network


def calls_of(network: Network) -> dict[str, list[Node]]:
    """Stored weight's name -> the linear and convolution calls that read it, in order; a tied one under its first."""
    first: dict[int, str] = {}
    found: dict[str, list[Node]] = {}
    for node in network.calls(*WEIGHTED):
        name = weight_name(node)
        if name is not None:
            found.setdefault(first.setdefault(id(network.tensor(name)), name), []).append(node)
    return found
