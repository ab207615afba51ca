"""Zeros that must stay: the pattern a sparsifying step left in a weight, kept through every optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.network import Network


class Zeros:
    """Where the weights named in ``network.patterns`` are zero now, they are after ``restore`` too.

    Gradients are cleared at the same places, so that neither the norm for clipping nor a momentum sees them.
    """

    def __init__(self, network: Network) -> None:
        known = network.tensors()
        self.places: list[tuple[Tensor, Tensor]] = []
        seen: set[int] = set()
        for name in network.patterns:
            tensor = known.get(name)
            if tensor is not None and tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                self.places.append((tensor, tensor.detach() == 0))

    def clear_gradients(self) -> None:
        for tensor, zero in self.places:
            if tensor.grad is not None:
                tensor.grad.masked_fill_(zero, 0)

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, zero in self.places:
                tensor.masked_fill_(zero, 0)
