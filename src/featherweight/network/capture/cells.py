"""Recurrent cells written as linear calls and what combines them, so that all who know linear layers know them.

A cell (``nn.LSTMCell``, ``nn.GRUCell``, ``nn.RNNCell``) is one step of a recurrent layer, called by the model itself.
Its gates are linear calls of the input and of the state, [gates * h] numbers a sample (the equations of
``torch.nn.LSTMCell`` and the others); whole layers stay single calls, as runtimes have them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from featherweight.network.edit import insert_call
from featherweight.network.network import Network
from featherweight.network.operators import schema_argument

aten = torch.ops.aten

Call = Callable[..., Node]


def write_cells(network: Network) -> None:
    """Writes every recurrent cell of the graph out."""
    for node in network.calls(*FORMS):
        call = partial(_inserted, network, node)
        state, (w_ih, w_hh, b_ih, b_hh) = node.args[1], (schema_argument(node, n) for n in WEIGHTS)
        before: Sequence[Any] = state if isinstance(state, (list, tuple)) else [state]
        given = call(aten.linear.default, node.args[0], w_ih, *([] if b_ih is None else [b_ih]))
        starts = b_hh is not None and before[0].target in ZEROS  # the first step of a state that nobody gives
        fed = b_hh if starts else call(aten.linear.default, before[0], w_hh, *([] if b_hh is None else [b_hh]))
        made = FORMS[node.target](call, given, fed, *before)
        if len(made) == 1:
            node.replace_all_uses_with(made[0])
        else:
            for reader in list(node.users):
                assert reader.target is operator.getitem
                reader.replace_all_uses_with(made[reader.args[1]])  # type: ignore[index]
                network.graph.erase_node(reader)
        network.graph.erase_node(node)
    network.changed()


def _inserted(network: Network, node: Node, target: Any, *args: Any) -> Node:
    return insert_call(network, target, args, before=node, like=node)


def _lstm(call: Call, given: Node, fed: Node, state: Node, cell: Node) -> list[Node]:
    """c' = f * c + i * g, h' = o * tanh(c'); gates in the order i, f, g, o."""
    parts = call(aten.chunk.default, call(aten.add.Tensor, given, fed), 4, -1)
    i, f, g, o = (call(operator.getitem, parts, index) for index in range(4))
    kept = call(aten.mul.Tensor, call(aten.sigmoid.default, f), cell)
    new = call(aten.mul.Tensor, call(aten.sigmoid.default, i), call(aten.tanh.default, g))
    after = call(aten.add.Tensor, kept, new)
    return [call(aten.mul.Tensor, call(aten.sigmoid.default, o), call(aten.tanh.default, after)), after]


def _gru(call: Call, given: Node, fed: Node, state: Node) -> list[Node]:
    """h' = (h - n) * z + n, n = tanh(given_n + r * fed_n); gates in the order r, z, n."""
    read, back = call(aten.chunk.default, given, 3, -1), call(aten.chunk.default, fed, 3, -1)
    (r, z, n), (r_fed, z_fed, n_fed) = ([call(operator.getitem, parts, index) for index in range(3)]
                                        for parts in (read, back))
    reset = call(aten.sigmoid.default, call(aten.add.Tensor, r, r_fed))
    update = call(aten.sigmoid.default, call(aten.add.Tensor, z, z_fed))
    new = call(aten.tanh.default, call(aten.add.Tensor, n, call(aten.mul.Tensor, reset, n_fed)))
    return [call(aten.add.Tensor, call(aten.mul.Tensor, call(aten.sub.Tensor, state, new), update), new)]


def _plain(activation: Any, call: Call, given: Node, fed: Node, state: Node) -> list[Node]:
    """h' = activation(given + fed)."""
    return [call(activation, call(aten.add.Tensor, given, fed))]


#: what gives zeros, and nothing else
ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")
#: cell -> what computes its new states of (given, fed), the linear calls of its input and of its state
FORMS: dict[Any, Callable[..., list[Node]]] = {
    aten.lstm_cell.default: _lstm, aten.gru_cell.default: _gru,
    aten.rnn_tanh_cell.default: partial(_plain, aten.tanh.default),
    aten.rnn_relu_cell.default: partial(_plain, aten.relu.default),
}

__all__ = ["write_cells"]
