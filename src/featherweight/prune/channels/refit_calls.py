"""Calls whose input weights a compensation refits after a cut: what each of them reads, and what it should give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from featherweight.axes.groups import AxisGroups
from featherweight.axes.rules.basics import operators
from featherweight.axes.trace import operator_name, path_of
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, bias_name, constant_value, out_axis, readers_of, weight_name
from featherweight.network.matrices import as_matrix, from_matrix, windows
from featherweight.network.operators import schema_argument as argument
from featherweight.numerics.patches import patches_at
from featherweight.steps import Skipped

aten = torch.ops.aten
ADD = {aten.add.Tensor, aten.add_.Tensor}
#: calls that may hold weights and are not refit
OTHERS = {*operators("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"),
          *operators("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")}
#: kept groups [g], and the kept inputs [i] and outputs [o] inside each of them
Parts = tuple[Tensor, Tensor, Tensor]
#: a channel whose factor after the call is below this share of the largest says nothing of what it should have been
TINY = 1e-4


@dataclass(frozen=True)
class RefitCall:
    """One linear or convolution call, and the weight that it alone reads.

    groups [g], ins [i], outs [o]: the groups that are kept, and the positions kept inside each of them.
    bias: the bias that it alone reads; mean: else the running mean of the batch norm that follows; neither where a
    constant has no place. chain: the calls that change its result alone, one after the other, and can be undone; total:
    the addition at their end, and which of its arguments is the other summand. saturation: (low, high) outside which
    the activation function after the end is constant; None where there is none, or several that differ.
    """

    node: Node
    weight: str
    kernel: tuple[int, ...]
    groups: Tensor
    ins: Tensor
    outs: Tensor
    bias: str | None = None
    mean: str | None = None
    chain: tuple[Node, ...] = ()
    total: tuple[Node, int] | None = None
    saturation: tuple[float, float] | None = None

    @property
    def constant(self) -> str | None:
        """The tensor that takes up a constant: bias + c, or mean - c."""
        return self.bias if self.bias is not None else self.mean

    @property
    def end(self) -> Node:
        """The call whose activation should stay what it was."""
        return self.total[0] if self.total else self.chain[-1] if self.chain else self.node

    def undone(self, network: Network, value: Tensor) -> Tensor:
        """What the call should give so that the chain ends in the activation ``value``; not finite where it cannot be
        told."""
        for node in reversed(self.chain):
            value = UNDO[node.target](network, node, value)
        return value

    def matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as [groups, o, i, window], of the whole call."""
        matrix = as_matrix(self.node, weight)
        return matrix.reshape(*matrix.shape[:2], -1, math.prod(self.kernel))

    def kept(self, weight: Tensor) -> Tensor:
        """The weights that are kept, as [g, o, i * window]."""
        return self.matrix(weight)[self.groups][:, self.outs][:, :, self.ins].flatten(2)

    def put(self, weight: Tensor, kept: Tensor) -> Tensor:
        """A copy of ``weight`` with other values where it is kept."""
        matrix = self.matrix(weight).clone()
        shape = len(self.groups), len(self.outs), len(self.ins), matrix.shape[3]
        matrix[self.groups[:, None, None], self.outs[:, None], self.ins] = kept.reshape(shape).to(weight.dtype)
        return from_matrix(self.node, matrix.flatten(2), weight.shape)

    def outputs(self, channels: int) -> Tensor:
        """The kept ones of this many output channels, group by group."""
        return (self.groups[:, None] * (channels // self._groups) + self.outs).flatten()

    def read(self, x: Tensor, places: Tensor) -> Tensor:
        """X [g, r, i * window]: the kept inputs that the call reads of ``x`` for some output places of every sample."""
        if not self.kernel:
            return self._flat(x).index_select(1, places)[..., self.ins].flatten(0, 1)[None]
        x = x if x.dim() == len(self.kernel) + 2 else x[None]
        ins = (self.groups[:, None] * (x.shape[1] // self._groups) + self.ins).flatten()
        table = windows(self.node, self.kernel, x)
        chosen = (torch.arange(len(x), device=x.device)[:, None] * len(table) + places).flatten()
        return patches_at(x.index_select(1, ins), table, chosen, len(self.groups))

    def made(self, y: Tensor, places: Tensor) -> Tensor:
        """Y [g, r, o]: the kept outputs at these places of ``y``, which has the shape of the call's output."""
        flat = self._flat(y)
        found = flat.index_select(1, places)[..., self.outputs(flat.shape[2])]
        return found.view(len(flat), len(places), len(self.groups), -1).permute(2, 0, 1, 3).flatten(1, 2)

    @property
    def _groups(self) -> int:
        return int(argument(self.node, "groups")) if self.kernel else 1

    def places(self, y: Tensor) -> int:
        """Output positions of one sample."""
        return self._flat(y).shape[1]

    def _flat(self, value: Tensor) -> Tensor:
        """An input or output of the call as [n, places, channels]."""
        if self.kernel:
            return (value if value.dim() == len(self.kernel) + 2 else value[None]).flatten(2).mT
        return value.reshape(value.shape[0] if value.dim() > 1 else 1, -1, value.shape[-1])


# ---- what follows a call, undone
def _norm(network: Network, node: Node, value: Tensor) -> Tensor:
    gamma, beta, mean, variance = (constant_value(network, a) for a in node.args[1:5])
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + float(argument(node, "eps")))
    factor = factor if gamma is None else factor * gamma
    shift = -mean * factor if beta is None else beta - mean * factor
    shape = (1, -1, *(1,) * (value.dim() - 2))
    return (value - shift.view(shape)) / _told(factor).view(shape)


def _told(factor: Tensor) -> Tensor:
    """NaN for factors next to nothing."""
    size = factor.abs()
    return torch.where(size > TINY * size.max(), factor, torch.nan)


def _scaled(network: Network, node: Node, value: Tensor) -> Tensor:
    factor = next(t for a in node.args[:2] if (t := constant_value(network, a)) is not None)
    return value / _told(factor)


def _permuted(network: Network, node: Node, value: Tensor) -> Tensor:
    order = [int(d) % value.dim() for d in argument(node, "dims")]
    return value.permute([order.index(d) for d in range(len(order))])


def _transposed(network: Network, node: Node, value: Tensor) -> Tensor:
    return value.transpose(int(argument(node, "dim0")), int(argument(node, "dim1")))


def _same(network: Network, node: Node, value: Tensor) -> Tensor:
    return value


UNDO: Mapping[Any, Callable[[Network, Node, Tensor], Tensor]] = {
    aten.batch_norm.default: _norm, aten.mul.Tensor: _scaled, aten.permute.default: _permuted,
    aten.transpose.int: _transposed, aten.dropout.default: _same, aten.clone.default: _same,
    aten.contiguous.default: _same,
}


def _can_undo(network: Network, node: Node, value: Node, shapes: Mapping[str, Any]) -> bool:
    """Whether the call changes ``value`` by stored numbers alone, and can be undone."""
    if node.target not in UNDO or node.all_input_nodes.count(value) != 1:
        return False
    others = [a for a in node.args if isinstance(a, Node) and a is not value]
    if any(a.op != "get_attr" for a in others):
        return False
    if node.target is aten.batch_norm.default:
        stored = [constant_value(network, a) is not None for a in node.args[3:5]]
        return node.args[0] is value and all(stored) and not argument(node, "training")
    if node.target is aten.dropout.default:
        return not argument(node, "train")
    return node.target is not aten.mul.Tensor or (len(others) == 1 and shapes[node.name] == shapes[value.name])


#: activation function -> (low, high) outside which it is constant
SATURATION: Mapping[Any, tuple[float, float]] = {
    **dict.fromkeys(operators("relu"), (0.0, math.inf)), **dict.fromkeys(operators("relu6"), (0.0, 6.0)),
    **dict.fromkeys(operators("hardswish"), (-3.0, math.inf)), **dict.fromkeys(operators("hardsigmoid"), (-3.0, 3.0)),
}


def _saturation(node: Node) -> tuple[float, float] | None:
    if node.target in operators("hardtanh"):
        return float(argument(node, "min_val")), float(argument(node, "max_val"))
    return SATURATION.get(node.target)


# ---- finding them
def find_refit_calls(network: Network, axes: AxisGroups,
                     kept: np.ndarray) -> tuple[list[RefitCall], tuple[Skipped, ...]]:
    """The calls that read what a cut changes, in graph order; and what of them is left as it is, and why."""
    names = {id(network.tensor(n)): n for n in axes.tensors}
    lost = {n for n, atoms in axes.tensors.items() if any(a is not None and not kept[a].all() for a in atoms)}
    shapes = {n: getattr(v, "shape", None) for n, v in network.values().items()}
    touched: set[Node] = set()
    found: list[RefitCall] = []
    left: list[Skipped] = []
    for node in network.graph.nodes:
        if node.op == "get_attr" and names.get(id(network.tensor(str(node.target)))) in lost:
            touched.add(node)
        if node.op != "call_function" or not touched.intersection(node.all_input_nodes):
            continue
        touched.add(node)
        path = path_of(node) or node.name
        if node.target in WEIGHTED and node.args[0] in touched:
            parts = _refusal(network, node) or _parts(network, axes, kept, node, names)
            if isinstance(parts, str):
                left.append(Skipped(path, parts))
                continue
            found.append(_refit_call(network, node, parts, shapes))
            if found[-1].constant is None:
                left.append(Skipped(path, "no constant: it has no bias of its own, and no batch norm follows"))
        elif node.target in OTHERS and any(getattr(axes.values.get(a.name), "stored", False)
                                           for a in node.all_input_nodes):
            left.append(Skipped(path, f"not refit: {operator_name(node)}"))
    return found, tuple(left)


def _refusal(network: Network, node: Node) -> str:
    """Why the weight of a call cannot be refit; empty if it can."""
    name = weight_name(node)
    if name is None:
        return "not refit: its weight is computed"
    if len(readers_of(network, name)) > 1:
        return "not refit: its weight is read elsewhere too"
    dtype = network.tensor(name).dtype
    return "" if dtype.is_floating_point else f"not refit: its weight holds {dtype}"


def _refit_call(network: Network, node: Node, parts: Parts, shapes: Mapping[str, Any]) -> RefitCall:
    name = str(weight_name(node))
    bias, mean = bias_name(node), None
    if bias is not None and len(network.users_of(bias)) > 1:
        bias = None
    chain, total = _after(network, node, shapes)
    if bias is None and chain and chain[0].target is aten.batch_norm.default:
        stored = str(chain[0].args[3].target)  # type: ignore[union-attr]
        mean = stored if len(network.users_of(stored)) == 1 else None
    kernel = tuple(network.tensor(name).shape[2:])
    end = total[0] if total else chain[-1] if chain else node
    bounds = {_saturation(u) for u in end.users}
    return RefitCall(node, name, kernel, *parts, bias, mean, chain, total, bounds.pop() if len(bounds) == 1 else None)


def _parts(network: Network, axes: AxisGroups, kept: np.ndarray, node: Node, names: Mapping[int, str]) -> Parts | str:
    """Kept groups, and the kept inputs and outputs of each; or why they cannot be told."""
    weight = network.tensor(str(weight_name(node)))
    atoms = axes.tensors[names[id(weight)]]
    groups = len(as_matrix(node, weight))
    rows, columns = (np.ones(s, dtype=bool) if a is None else kept[a]
                     for s, a in zip(weight.shape[:2], atoms[:2], strict=True))
    split = rows.reshape(groups, -1)
    alive = split.any(1)
    if not (split[alive] == split[alive][0]).all():
        return "not refit: its groups keep different positions"
    first, second = (torch.from_numpy(np.flatnonzero(m)).to(weight.device) for m in (split[alive][0], columns))
    ins, outs = (first, second) if out_axis(node) else (second, first)
    return torch.from_numpy(np.flatnonzero(alive)).to(weight.device), ins, outs


def _after(network: Network, node: Node,
           shapes: Mapping[str, Any]) -> tuple[tuple[Node, ...], tuple[Node, int] | None]:
    """What follows a call alone: the chain that can be undone, and the addition after it.

    The other summand must come earlier than the call: the last branch of a sum makes up for the others.
    """
    chain: list[Node] = []
    end: Node = node
    while len(end.users) == 1:
        user = next(iter(end.users))
        if user.target in ADD:
            which = int(user.args[0] is end)
            other = user.args[which]
            early = isinstance(other, Node) and other is not end and other.op != "get_attr" and other < node
            alike = shapes[user.name] == shapes[end.name] and argument(user, "alpha") == 1
            return tuple(chain), (user, which) if early and alike else None
        if not _can_undo(network, user, end, shapes):
            break
        chain.append(user)
        end = user
    return tuple(chain), None
