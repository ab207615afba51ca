"""What a graph computes from sizes alone: constants, were the sizes fixed."""

from __future__ import annotations

from torch.fx import Node

from featherweight.network.network import Network
from featherweight.network.operators import has_schema

IMAGE = 4  #: axes of an input from which on it counts as an image or a video


def from_sizes(network: Network) -> str:
    """The operators that make tensors of the free sizes of images and videos alone, "" if there are none."""
    shapes = [i.shape for i in network.signature.inputs]
    if not any(len(shape) >= IMAGE and None in shape[1:] for shape in shapes):
        return ""
    sizes: set[Node] = set()
    found: set[str] = set()
    for node in network.calls():
        if str(node.target) == "aten.sym_size.int":
            sizes.add(node)
        elif node.all_input_nodes and all(n.op == "get_attr" or n in sizes for n in node.all_input_nodes) and any(
                n in sizes for n in node.all_input_nodes):
            sizes.add(node)
            if has_schema(node.target):
                found.add(str(node.target).split(".")[1])
    return ", ".join(sorted(found))


__all__ = ["from_sizes"]
