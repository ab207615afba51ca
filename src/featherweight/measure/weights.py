"""The weights of a network as they act, however they are stored: plain, as integers with a scale, or in a codebook.

A part of the graph that depends on no input is a *constant*. Where a constant that was decoded from small integers
(dequantized, looked up in a codebook, unpacked from bits) or widened from halves meets the data, its decoded elements
are the weight's; the integers, scales, zero points and codebook entries behind it are storage and are not counted
beside them. So it is with the table of an embedding that looks up integers or halves and decodes the rows it found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from featherweight.network import Network
from featherweight.network.edit import constant_nodes

aten = torch.ops.aten


@dataclass(frozen=True)
class Weight:
    """One weight as it acts. ``stored`` names the tensors it is made from; ``node`` gives it to its readers.

    Example:
        >>> weight = fw.measure.weights(network)[0]
        >>> weight.name, weight.numel, weight.nonzeros, weight.bytes
        ('0.weight', 72, 72, 288)
    """

    node: Node
    stored: tuple[str, ...]
    decoded: bool
    numel: int
    nonzeros: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.stored[0]


def weights(network: Network) -> tuple[Weight, ...]:
    """Every weight that the graph reads, each stored tensor counted once, in the order in which it is first read.

    Example:
        >>> [weight.name for weight in fw.measure.weights(network)]
        ['0.weight', '1.weight', '1.bias', '3.weight', '3.bias', '7.weight', '7.bias']
    """
    constant = constant_nodes(network)
    decoded: list[Weight] = []
    claimed: set[int] = set()
    plain: dict[int, Weight] = {}
    for node in network.graph.nodes:
        if node not in constant or not _meets_data(node, constant):
            continue
        leaves = _leaves(node)
        if _is_looked_up(network, node):
            decoded.append(_looked_up(network, node))
            claimed.add(id(network.tensor(str(node.target))))
            continue
        if node.op == "call_function" and _is_decoded(network, node, leaves):
            storage = [leaf for leaf in leaves if id(network.tensor(str(leaf.target))) not in claimed]
            codes = [leaf for leaf in storage if _is_code(network.tensor(str(leaf.target)))] or storage
            if codes:
                decoded.append(_decoded(network, node, codes[0], storage))
                claimed |= {id(network.tensor(str(leaf.target))) for leaf in storage}
            continue
        for leaf in leaves:
            tensor = network.tensor(str(leaf.target))
            if isinstance(tensor, nn.Parameter) and id(tensor) not in plain and not _only_scales(leaf):
                plain[id(tensor)] = _plain(leaf, tensor)
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    found = [*decoded, *(w for key, w in plain.items() if key not in claimed)]
    return tuple(sorted(found, key=lambda w: order[w.node]))


def params(network: Network) -> int:
    """Number of weights: elements of the parameters, tied ones once, decoded weights by their decoded elements.

    Parameters that the graph does not read are counted too, for they are in the file. Batch statistics, scales, zero
    points, codebook entries and other buffers are not.

    Example:
        >>> fw.measure.params(network)
        1516
    """
    return sum(w.numel for w in weights(network)) + sum(t.numel() for t in _unread(network))


def nonzeros(network: Network) -> int:
    """How many of the ``params`` are not zero.

    Example:
        >>> sparse = fw.prune.Weights(sparsity=0.5).plan(network, task).apply(network)
        >>> fw.measure.nonzeros(sparse) < fw.measure.nonzeros(network)
        True
    """
    return sum(w.nonzeros for w in weights(network)) + sum(int(t.count_nonzero()) for t in _unread(network))


def _unread(network: Network) -> list[Tensor]:
    read = {id(network.tensor(str(n.target))) for n in network.graph.nodes if n.op == "get_attr"}
    return [p for p in network.parameters() if id(p) not in read]


def _meets_data(node: Node, constant: set[Node]) -> bool:
    return any(user not in constant for user in node.users)


def _leaves(node: Node) -> list[Node]:
    """The stored tensors a constant is made from, in argument order."""
    seen: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen[current] = None
            stack.extend(reversed(current.all_input_nodes))
    return [n for n in seen if n.op == "get_attr"]


def _is_code(tensor: Tensor) -> bool:
    """Whether a stored tensor holds codes: integers of up to 16 bits, or floats of 8 bits and fewer."""
    if tensor.dtype is torch.bool:
        return False
    return tensor.dtype.itemsize <= (1 if tensor.dtype.is_floating_point else 2) and not tensor.dtype.is_complex \
        and tensor.dim() > 0


def _is_narrow(network: Network, leaf: Node) -> bool:
    """Whether a stored tensor holds codes, or halves beside weights of full precision."""
    tensor = network.tensor(str(leaf.target))
    half = tensor.dtype in (torch.float16, torch.bfloat16) and not isinstance(tensor, nn.Parameter)
    return _is_code(tensor) or half


def _is_looked_up(network: Network, node: Node) -> bool:
    """Whether embeddings, and nothing else, look up rows of a stored tensor that are decoded afterwards."""
    if node.op != "get_attr" or not _is_narrow(network, node):
        return False
    return all(u.target is aten.embedding.default and u.args[0] is node for u in node.users)


def _looked_up(network: Network, node: Node) -> Weight:
    """The weight of an embedding; a scale per row that its rows are multiplied with belongs to what is stored."""
    scales: dict[str, None] = {}
    for row in node.users:
        for product in (u for plain in row.users for u in plain.users if u.target is aten.mul.Tensor):
            for other in (o for o in product.all_input_nodes if o.target is aten.embedding.default):
                if isinstance(other.args[0], Node) and other.args[0].op == "get_attr":
                    scales[str(other.args[0].target)] = None
    names = (str(node.target), *(name for name in scales if name != node.target))
    table = network.tensor(names[0])
    return Weight(node, names, True, table.numel(), int(table.count_nonzero()),
                  sum(t.numel() * t.element_size() for t in map(network.tensor, names)), dtype_name(table),
                  tuple(table.shape))


def _is_decoded(network: Network, node: Node, leaves: list[Node]) -> bool:
    if any(_is_code(network.tensor(str(leaf.target))) or _is_widened(network, leaf) for leaf in leaves):
        return True
    return any(str(n.target).startswith("quantized_decomposed.") for n in _calls(node))


def _is_widened(network: Network, leaf: Node) -> bool:
    """Whether a stored tensor holds halves that are read as wider floats only."""
    return _is_narrow(network, leaf) and bool(leaf.users) and all(
        u.target is aten.to.dtype and isinstance(u.args[1], torch.dtype)
        and u.args[1].itemsize > network.tensor(str(leaf.target)).element_size() for u in leaf.users)


def _calls(node: Node) -> list[Node]:
    """The calls that a constant is computed by."""
    seen: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op == "call_function" and current not in seen:
            seen[current] = None
            stack.extend(current.all_input_nodes)
    return list(seen)


def _only_scales(leaf: Node) -> bool:
    """Whether a stored tensor serves quantizing operators only, as their scale or zero point."""
    return bool(leaf.users) and all(
        str(u.target).startswith("quantized_decomposed.") and u.args[0] is not leaf for u in leaf.users)


def _plain(leaf: Node, tensor: Tensor) -> Weight:
    return Weight(leaf, (str(leaf.target),), False, tensor.numel(), int(tensor.detach().count_nonzero()),
                  tensor.numel() * tensor.element_size(), dtype_name(tensor), tuple(tensor.shape))


def _decoded(network: Network, node: Node, codes: Node, storage: list[Node]) -> Weight:
    value = evaluate(network, node)
    names = [str(codes.target), *(str(leaf.target) for leaf in storage if leaf is not codes)]
    tensors = {id(t): t for t in map(network.tensor, names)}.values()
    return Weight(node, tuple(names), True, value.numel(), int(value.count_nonzero()),
                  sum(t.numel() * t.element_size() for t in tensors), dtype_name(network.tensor(names[0])),
                  tuple(value.shape))


def evaluate(network: Network, node: Node) -> Tensor:
    """The value of a constant node."""
    values: dict[Node, Any] = {leaf: network.tensor(str(leaf.target)).detach() for leaf in _leaves(node)}
    needed = set(_calls(node))
    with torch.no_grad():
        for call in network.graph.nodes:
            if call in needed:
                args = map_arg(call.args, lambda n: values[n])
                values[call] = call.target(*args, **map_arg(call.kwargs, lambda n: values[n]))
    value: Tensor = values[node]
    return value


def dtype_name(tensor: Tensor) -> str:
    """A tensor's number type without "torch.": "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
