"""Which weights of a network can be stored in another form, and in which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import TRANSPOSED, WEIGHTED, weight_name
from featherweight.numerics.formats import ACTIVATIONS, GRIDS, HALVES, value_bits, weight_bits
from featherweight.quantize.request import Request, of_ends, split
from featherweight.quantize.store import Stored
from featherweight.steps import Skipped

aten = torch.ops.aten

#: recurrent calls, and which of their arguments lists the weights (matrices) and biases
RECURRENT = {aten.lstm.input: 2, aten.gru.input: 2, aten.rnn_tanh.input: 2, aten.rnn_relu.input: 2}
READABLE = (*WEIGHTED, aten.embedding.default, *RECURRENT)


@dataclass(frozen=True)
class LayerForm:
    """A weight, the calls that read it, and the form that it and what these calls read shall have."""

    stored: Stored
    nodes: tuple[Node, ...]
    activations: str | None

    @property
    def on_grid(self) -> bool:
        """Whether what the calls read is rounded to a grid that is chosen beforehand."""
        return self.activations in ACTIVATIONS


def layers(network: Network, request: Request) -> tuple[list[LayerForm], list[Skipped]]:
    """The weights that are stored in another form, in graph order; and the others, with why."""
    found: dict[str, list[Node]] = {}
    skipped: list[Skipped] = []
    first: dict[int, str] = {}
    for node, name in [(n, w) for n in network.calls(*READABLE) for w in read_weights(network, n)]:
        if name is not None:
            name = first.setdefault(id(network.tensor(name)), name)
        reasons = list(_reasons(network, node, name, request.ignore))
        if reasons:
            skipped.append(Skipped(name or node.meta.get("module") or node.name, reasons[0]))
        elif name is not None:
            found.setdefault(name, []).append(node)
    refused = {s.path for s in skipped}
    for pattern in (*request.ignore, *request.mixed):
        if not any(matches(n, w, (pattern,)) for n in network.calls(*READABLE) for w in read_weights(network, n)):
            where = "ignore" if pattern in request.ignore else "mixed"
            skipped.append(Skipped(pattern, f"this {where} pattern matched no layer"))
    outer = ends(network)
    made = []
    for name, nodes in found.items():
        if refused & set(network.tied_names(name)):
            continue
        layer, why = _layer(network, name, nodes, request, outer)
        skipped += [Skipped(name, why)] if why else []
        made += [layer] if layer is not None else []
    return made, skipped


def _layer(network: Network, name: str, nodes: list[Node], request: Request,
           outer: set[Node]) -> tuple[LayerForm | None, str]:
    """The layer, and what could not be had of it; None where nothing could."""
    kind, values = request.weights, request.activations
    if request.ends is not None and outer & set(nodes) and _few(kind, values):
        kind, values = of_ends(request.ends, request.activations)
    for pattern, text in request.mixed.items():
        if any(matches(n, name, (pattern,)) for n in nodes):
            kind, values = split(text, request.activations)
    weight, axis = network.tensor(name), weight_axis(nodes[0])
    if kind in GRIDS and GRIDS[kind].odd and network.patterns.keys() & set(network.tied_names(name)):
        return None, f'its pruned zeros have no place among the levels of {kind}; write mixed={{"{name}": "ternary"}}'
    if kind in HALVES and (largest := float(weight.detach().abs().max())) > (limit := torch.finfo(HALVES[kind]).max):
        return None, f'its weights reach {largest:.3g}, and {kind} ends at {limit:g}; write mixed={{"{name}": "bf16"}}'
    lookup = nodes[0].target is aten.embedding.default
    if isinstance(request.granularity, int) and kind in GRIDS:
        length = weight[0].numel()
        if not lookup and nodes[0].target not in TRANSPOSED and length % request.granularity == 0:
            group = None if length == request.granularity else request.granularity  # a whole row is a channel
            return LayerForm(Stored(name, axis, kind, group), tuple(nodes), values), ""
        why = f"a scale per channel: its rows of {length} numbers are not whole groups of {request.granularity}"
        return LayerForm(Stored(name, axis, kind), tuple(nodes), values), why
    whole = request.granularity == "tensor" and not lookup
    return LayerForm(Stored(name, None if whole else axis, kind), tuple(nodes), None if lookup else values), ""


def _few(weights: str, activations: str | None) -> bool:
    """Whether fewer than 8 bits are asked for."""
    return min(weight_bits(weights), value_bits(activations)) < 8


def ends(network: Network) -> set[Node]:
    """The calls with a weight that no other one comes before, or after: they see the input, or give the output."""
    before: set[Node] = set()
    after: set[Node] = set()
    outer = set()
    calls = network.calls()
    for node in calls:
        if any(i in before for i in node.all_input_nodes):
            before.add(node)
        if node.target in WEIGHTED:
            outer |= {node} - before
            before.add(node)
    for node in reversed(calls):
        if any(u in after for u in node.users):
            after.add(node)
        if node.target in WEIGHTED:
            outer |= {node} - after
            after.add(node)
    return outer


def read_weight(node: Node) -> str | None:
    """The name of the stored weight that a linear, convolution or embedding call reads."""
    if node.target is aten.embedding.default:
        table = node.args[0]
        return str(table.target) if isinstance(table, Node) and table.op == "get_attr" else None
    return weight_name(node)


def read_weights(network: Network, node: Node) -> list[str | None]:
    """The names of the stored weights that a call reads: one, but of a recurrent call."""
    if node.target not in RECURRENT:
        return [read_weight(node)]
    listed: Any = node.args[RECURRENT[node.target]]
    stored = [str(n.target) if n.op == "get_attr" else None for n in listed]
    return [name for name in stored if name is None or network.tensor(name).dim() == 2]


def weight_axis(node: Node) -> int:
    """The axis of a call's weight along which every channel gets a scale of its own."""
    return 1 if node.target in TRANSPOSED else 0


def _reasons(network: Network, node: Node, name: str | None, ignore: tuple[str, ...]) -> Iterator[str]:
    if matches(node, name, ignore):
        yield "named in ignore"
    if name is None:
        yield "its weight is computed, or stored in another form already"
        return
    weight = network.tensor(name)
    if weight.dtype != torch.float32:
        yield f"its weight is {str(weight.dtype).removeprefix('torch.')}; expected float32"
    elif not weight.numel() or not torch.isfinite(weight).all():
        yield "its weight is empty or not finite"
    for reader in network.users_of(name):
        alike = (reader.target is aten.embedding.default) == (node.target is aten.embedding.default)
        if not alike or not set(network.tied_names(name)) & set(read_weights(network, reader)):
            yield f"its weight is read by {reader.target} too, which would read it back to float at every run"
        elif weight_axis(reader) != weight_axis(node):
            yield "its weight is read along different axes"


def matches(node: Node, name: str | None, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits a call's name, its module's path or its weight's name."""
    known = [node.name, node.meta.get("module") or "", name or ""]
    return any(fnmatch(k, pattern) for k in known for pattern in patterns)


__all__ = ["LayerForm", "ends", "layers", "matches", "read_weight", "read_weights", "weight_axis"]
