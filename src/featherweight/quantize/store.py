"""Doing: weights stored as integers or halves in a network, activations rounded between its calls."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import PlanError
from featherweight.network import Network
from featherweight.network.edit import insert_call, node_name
from featherweight.numerics import grids
from featherweight.numerics.formats import ACTIVATIONS, DYNAMIC, DYNAMIC_SPEC, GRIDS, HALVES, unsigned
from featherweight.numerics.grids import SMALLEST_SCALE, Spec

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Point:
    """An activation rounded to a grid: ``node`` gives it, ``readers`` (calls) take the rounded one.

    kind: a key of ``ACTIVATIONS``, or DYNAMIC: scale and zero point are those of each value. signed: whether a
    symmetric grid goes below zero.
    """

    node: str
    scale: float
    zero_point: int
    readers: tuple[str, ...]
    kind: str = "uint8"
    signed: bool = False

    @property
    def spec(self) -> Spec:
        if self.kind == DYNAMIC:
            return DYNAMIC_SPEC
        spec = ACTIVATIONS[self.kind]
        return spec if self.signed or not spec.signed else unsigned(spec)


@dataclass(frozen=True)
class Stored:
    """A weight stored in another form (in the plan's tensors: "NAME_scale").

    axis: the axis with a scale per channel; None where one scale serves all. kind: a key of ``GRIDS`` or ``HALVES``.
    group: every so many numbers of a row (an output channel) have a scale, [rows * groups]; None: a scale per channel.
    A weight whose rows lie along axis 1 is stored the other way around then, with its rows first.
    """

    weight: str
    axis: int | None
    kind: str = "int8"
    group: int | None = None

    def spread(self, scale: Tensor, shape: torch.Size) -> Tensor:
        """``scale`` shaped to meet a weight of ``shape``."""
        if self.group is not None:
            spread = scale.repeat_interleave(self.group)
            return spread.view(shape[::-1]).t() if self.axis else spread.view(shape)
        return scale if self.axis is None else scale.view([-1 if i == self.axis else 1 for i in range(len(shape))])

    def scales(self, shape: torch.Size) -> int:
        """How many scales a weight of ``shape`` has."""
        if self.group is not None:
            return math.prod(shape) // self.group
        return 1 if self.axis is None else shape[self.axis]


def scale_name(weight: str) -> str:
    """The name of a stored weight's scales."""
    return f"{weight}_scale"


def zero_name(weight: str) -> str:
    """Zero points are stored although they are zero: runtimes find an integer kernel only where they are."""
    return f"{weight}_zero_point"


def store_weight(network: Network, stored: Stored, scale: Tensor | None) -> None:
    """Puts integers, or halves, in the place of a weight; its readers read them back to float32."""
    name = stored.weight
    try:
        weight = network.tensor(name).detach()
    except KeyError as error:
        raise PlanError(f"the plan stores {name!r}, which the network has not; plan again for this network") from error
    if not weight.is_floating_point():
        raise PlanError(f"the plan stores {name!r}, which is {weight.dtype} already; plan again for this network")
    if stored.kind in HALVES:
        nodes = _replaced(network, name, weight.to(HALVES[stored.kind]))
        if _is_table(nodes):
            _look_up(network, nodes, None)
        _read_through(network, nodes, lambda node, like: insert_call(
            network, aten.to.dtype, (node, weight.dtype), after=node, like=like))
        return
    if scale is None:
        raise PlanError(f"the plan lacks the tensor {scale_name(name)!r}; load it with the tensors that lie beside it")
    if stored.scales(weight.shape) != scale.numel():
        raise PlanError(f"the plan stores {name!r} with {scale.numel()} scales along axis "
                        f"{stored.axis}; it is {list(weight.shape)} {weight.dtype}: plan again for this network")
    scale = scale.to(weight.device)
    spec = GRIDS[stored.kind]
    spread = stored.spread(scale, weight.shape)
    numbers = grids.quantize_rows(weight, spread, spec) if weight.dim() else grids.quantize(
        weight.double(), spread, torch.zeros((), dtype=torch.int32, device=scale.device), spec)
    turns = stored.group is not None and stored.axis
    nodes = _replaced(network, name, numbers.t().contiguous() if turns else numbers)
    if turns:
        _read_as_stored(network, nodes)
    if _is_table(nodes):
        _table(network, nodes, stored, scale)
    elif stored.axis is None and stored.group is None:
        grid = (float(scale), 0, spec.lowest, spec.highest, spec.dtype)
        _read_through(network, nodes, lambda node, like: insert_call(
            network, decomposed.dequantize_per_tensor.default, (node, *grid), after=node, like=like))
    else:
        _per_channel(network, nodes, stored, _beside(network, nodes, scale_name(name), scale),
                     weight.shape[::-1] if turns else weight.shape)


def _table(network: Network, nodes: list[Node], stored: Stored, scale: Tensor) -> None:
    """Embeddings look rows up; a linear call that is tied to them reads all of the same numbers back, by row."""
    others = [node for node in nodes if _read_otherwise(node)]
    scales = _beside(network, nodes, scale_name(stored.weight), scale if others else scale[:, None])
    column = scales
    if others:
        like = next(iter(nodes[0].users))
        column = insert_call(network, aten.unsqueeze.default, (scales, 1), after=scales, like=like)
    _look_up(network, nodes, column)
    if others:
        _per_channel(network, others, stored, scales)


def _replaced(network: Network, name: str, numbers: Tensor) -> list[Node]:
    """Puts ``numbers`` in the place of tensor ``name`` under all its names; the nodes that read it."""
    names, reads = network.tied_names(name), network.reads_of(name)
    patterns = {n: network.patterns[n] for n in names if n in network.patterns}
    for known in names:
        network.remove_tensor(known)
    for known in names:
        network.add_tensor(known, numbers, buffer=True)
    network.patterns.update(patterns)
    return reads


def _read_as_stored(network: Network, nodes: list[Node]) -> None:
    """Who read ``nodes`` turned around (``aten.t``) reads them as they are."""
    for node in nodes:
        for turn in list(node.users):
            turn.replace_all_uses_with(node)
            network.graph.erase_node(turn)


def _read_through(network: Network, nodes: list[Node], make: Any) -> None:
    """Every reader of ``nodes`` reads what ``make(node, reader)`` puts after it."""
    for node in nodes:
        readers = _read_otherwise(node)
        if not readers:
            continue
        made = make(node, readers[0])
        for reader in readers:
            reader.replace_input_with(node, made)


def _read_otherwise(node: Node) -> list[Node]:
    """The readers of a stored weight that do not look rows of it up."""
    return [reader for reader in node.users if reader.target is not aten.embedding.default]


def _beside(network: Network, nodes: list[Node], name: str, tensor: Tensor) -> Node:
    """A new tensor of the network, and its node before the first of ``nodes``."""
    network.add_tensor(name, tensor, buffer=True)
    with network.graph.inserting_before(nodes[0]):
        return network.graph.create_node("get_attr", name, name=node_name(name))


def _per_channel(network: Network, nodes: list[Node], stored: Stored, scales: Node, shape: Sequence[int] = ()) -> None:
    """Reads numbers back by the ``scales`` of their channels, or groups. shape: of the weight, where it has groups."""
    spec, scale = GRIDS[stored.kind], network.tensor(str(scales.target))
    zeros = _beside(network, nodes, zero_name(stored.weight), torch.zeros_like(scale, dtype=spec.dtype))
    axis = 0 if stored.group is not None else stored.axis

    def read(node: Node, like: Node) -> Node:
        given = node
        if stored.group is not None:
            given = insert_call(network, aten.view.default, (node, [-1, stored.group]), after=node, like=like)
        whole = insert_call(network, decomposed.dequantize_per_channel.default,
                            (given, scales, zeros, axis, spec.lowest, spec.highest, spec.dtype), after=given, like=like)
        if stored.group is None:
            return whole
        return insert_call(network, aten.view.default, (whole, list(shape)), after=whole, like=like)

    _read_through(network, nodes, read)


def _is_table(nodes: list[Node]) -> bool:
    return any(n.target is aten.embedding.default for node in nodes for n in node.users)


def _look_up(network: Network, nodes: list[Node], scales: Node | None) -> None:
    """Embeddings look up numbers, and scales if there are any: only the rows asked for are read back to float. The node
    that gives the activation keeps its name, by which points know it."""
    for node in nodes:
        for reader in [user for user in node.users if user.target is aten.embedding.default]:
            index = reader.args[1]
            rows = insert_call(network, aten.embedding.default, (node, index), before=reader, like=reader)
            made: Any = aten.to.dtype
            args: tuple[Any, ...] = (rows, torch.float32)
            if scales is not None:
                plain = insert_call(network, made, args, before=reader, like=reader)
                steps = insert_call(network, aten.embedding.default, (scales, index), before=reader, like=reader)
                made, args = aten.mul.Tensor, (plain, steps)
            reader.target, reader.args, reader.kwargs = made, args, {}


def round_value(network: Network, point: Point) -> None:
    """Puts a quantize/dequantize pair after a node; the point's readers read the rounded activation."""
    try:
        node = network.node(point.node)
        readers = [network.node(r) for r in point.readers]
    except KeyError as error:
        raise PlanError(f"the plan names a node that the network has not ({error.args[0]}); "
                        "plan again for this network") from error
    back = _rounded(network, node, point)
    for reader in readers:
        if node not in reader.all_input_nodes:
            raise PlanError(f"the plan says that {reader.name!r} reads {node.name!r}, which it does not; "
                            "plan again for this network")
        reader.replace_input_with(node, back)


def _rounded(network: Network, node: Node, point: Point) -> Node:
    """The activation of ``node`` as it is read back from a point's grid."""
    spec, chosen = point.spec, node
    scale: Any = point.scale
    zero: Any = point.zero_point
    quantize, dequantize = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
    if point.kind == DYNAMIC:
        chosen = insert_call(network, decomposed.choose_qparams.tensor,
                             (node, spec.lowest, spec.highest, SMALLEST_SCALE, spec.dtype), after=node, like=node)
        scale, zero = (insert_call(network, operator.getitem, (chosen, i), after=chosen, like=node) for i in (0, 1))
        quantize, dequantize = decomposed.quantize_per_tensor.tensor, decomposed.dequantize_per_tensor.tensor
    grid = (scale, zero, spec.lowest, spec.highest, spec.dtype)
    last = node if chosen is node else scale
    whole = insert_call(network, quantize, (node, *grid), after=last, like=node)
    return insert_call(network, dequantize, (whole, *grid), after=whole, like=node)


def rounder(point: Point) -> Callable[[Tensor], Tensor]:
    """Rounds an activation to a point's grid."""
    if point.kind == DYNAMIC:
        return lambda value: grids.fake_quantize(value, *grids.minmax(value, point.spec), point.spec)
    scale, zero = torch.tensor(point.scale), torch.tensor(point.zero_point, dtype=torch.int32)
    return lambda value: grids.fake_quantize(value, scale.to(value.device), zero.to(value.device), point.spec)


def chosen_scale(weight: Tensor, stored: Stored, method: str) -> Tensor:
    """The scales of a weight's grid, "minmax" or "mse": [] or [channels] or [rows * groups]."""
    choose = grids.least_squares if method == "mse" else grids.minmax
    axis, values = stored.axis, weight
    if stored.group is not None:
        axis, values = 0, (weight.t() if stored.axis else weight).reshape(-1, stored.group)
    return choose(values, replace(GRIDS[stored.kind], axis=axis))[0]


__all__ = ["Point", "Stored", "chosen_scale", "round_value", "rounder", "scale_name", "store_weight", "zero_name"]
