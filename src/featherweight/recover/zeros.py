"""What a training may change: the tensors that can be trained, and the zeros in them that must stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED


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


def trainable(network: Network) -> None:
    """Raises RecipeError if no tensor can be trained, or none but biases because all weights are integers."""
    integers = [n for n, t in network.tensors().items() if not t.is_floating_point() and t.dim() > 1]
    if not any(p.requires_grad and p.is_floating_point() for p in network.parameters()):
        raise RecipeError("the network has no trainable tensor (all are integers, or frozen); put recover.Train before "
                          "quantize.Quantize, or write Train(during=(quantize.Quantize(...),))" if integers else
                          "the network has no trainable tensor, as all are frozen (requires_grad=False); write "
                          "model.requires_grad_(True) before fw.capture, or network.requires_grad_(True)")
    weights = [n for call in network.calls(*WEIGHTED) for n in _stored(call.args[1])]
    matrices = [p for p in network.parameters() if p.requires_grad and p.dim() > 1]
    if integers and not matrices and not any(network.tensor(n).requires_grad for n in weights):
        raise RecipeError(f"all weights of the network are integers ({', '.join(integers[:3])}, ...) and cannot be "
                          "trained; put recover.Train before quantize.Quantize, or write "
                          "Train(during=(quantize.Quantize(...),))")


def _stored(value: Any) -> list[str]:
    """The tensors that a value is, or is computed from: of a shared weight, its codebook among them."""
    found, left, seen = [], [value], set()
    while left:
        node = left.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            left += node.all_input_nodes
            found += [str(node.target)] if node.op == "get_attr" else []
    return found
