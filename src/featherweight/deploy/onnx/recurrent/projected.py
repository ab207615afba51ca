"""Long short-term memories with projections (Sak et al. 2014) as plain ones, layer by layer: ONNX has no others.

With the projection P [p, h] of a layer, h_t = P (o * tanh(c_t)), what the gates get of h_t is (R P)(o * tanh(c_t)): a
plain layer with recurrent weights R P [4h, h], to whose outputs P is applied. It starts at P+ h_0, of which P makes
h_0.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import clear_dead, insert_call, read_tensors, stored_value, tensor_node
from featherweight.network.operators import schema_argument

aten = torch.ops.aten


def unprojected(network: Network) -> None:
    """Writes such calls out, on a copy of the network."""
    before, calls = read_tensors(network), network.calls(aten.lstm.input)
    for node in calls:
        weights, layers, both = (schema_argument(node, name) for name in ("params", "num_layers", "bidirectional"))
        each = len(weights) // (layers * (1 + bool(both)))
        if each % 2:  # matrices and biases come in pairs, a projection alone
            _write_out(network, node, [weights[i:i + each] for i in range(0, len(weights), each)])
            network.graph.erase_node(node)
    if calls:
        clear_dead(network, before)


def _write_out(network: Network, node: Node, weights: Sequence[Sequence[Any]]) -> None:
    """``weights``: of every layer and direction, the projection last."""

    def call(target: Any, *args: Any) -> Node:
        return insert_call(network, target, args, before=node)

    arguments: Any = node.args
    given, (hidden, memory), _, biases, layers, _, _, both, first = arguments
    directions = 1 + bool(both)
    ends: list[list[Node]] = [[], []]
    for layer in range(layers):
        mine = weights[directions * layer: directions * (layer + 1)]
        plain = [w for input_, recurrent, *rest, last in mine
                 for w in (input_, call(aten.linear.default, recurrent, call(aten.t.default, last)), *rest)]
        places = (0, directions * layer, directions * (layer + 1))
        back = _stored(network, f"{node.name}_{layer}_back",
                       torch.stack([torch.linalg.pinv(stored_value(network, last)).mT for *_, last in mine]), node)
        start = [call(aten.matmul.default, call(aten.slice.Tensor, hidden, *places), back),
                 call(aten.slice.Tensor, memory, *places)]
        made = call(aten.lstm.input, given, start, plain, biases, 1, 0.0, False, both, first)
        outputs, state, cells = (call(operator.getitem, made, i) for i in range(3))
        given = call(aten.linear.default, outputs, mine[0][-1]) if not both else call(aten.cat.default, [
            call(aten.linear.default, call(operator.getitem, call(aten.chunk.default, outputs, 2, -1), i), last)
            for i, (*_, last) in enumerate(mine)], -1)
        turned = call(aten.transpose.int, call(aten.stack.default, [last for *_, last in mine]), 1, 2)
        ends[0].append(call(aten.matmul.default, state, turned))
        ends[1].append(cells)
    whole = [given, *(call(aten.cat.default, end) if len(end) > 1 else end[0] for end in ends)]
    for reader in list(node.users):
        reader.replace_all_uses_with(whole[int(str(reader.args[1]))])
        network.graph.erase_node(reader)


def _stored(network: Network, name: str, value: Tensor, node: Node) -> Node:
    network.add_tensor(name, value, buffer=True)
    return tensor_node(network, name, node)


__all__ = ["unprojected"]
