"""Which weights of a network can be stored in another form, and in which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import TRANSPOSED, WEIGHTED, out_axis, readers_of
from featherweight.network.layers import APART, STORABLE, Layer, no_float, not_finite, select
from featherweight.numerics.formats import ACTIVATIONS, GRIDS, HALVES, value_bits, weight_bits
from featherweight.quantize.request import Request, of_ends, split
from featherweight.quantize.store import Stored
from featherweight.steps import Skipped

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerForm:
    """A layer's weight, the calls that read it, and the form that it and what these calls read shall have."""

    stored: Stored
    nodes: tuple[Node, ...]
    activations: str | None

    @property
    def on_grid(self) -> bool:
        """Whether what the calls read is rounded to a grid that is chosen beforehand."""
        return self.activations in ACTIVATIONS


def layers(network: Network, request: Request) -> tuple[list[LayerForm], list[Skipped]]:
    """The weights that are stored in another form, in graph order; and the others, with why."""
    selected, outer = select(network, request.ignore, STORABLE), ends(network)
    made: list[LayerForm] = []
    skipped = [*selected.skipped, *selected.unmatched(request.mixed, "mixed")]
    for layer in selected.layers:
        why, form = _refusal(network, layer), None
        if not why:
            form, why = _form(network, layer, request, outer)
        made += [] if form is None else [form]
        skipped += [Skipped(layer.weight, why)] if why else []
    return made, skipped


def _form(network: Network, layer: Layer, request: Request, outer: set[Node]) -> tuple[LayerForm | None, str]:
    """The layer's form, and what could not be had of it; None where nothing could."""
    name, nodes = layer.weight, layer.calls
    kind, values = request.weights, request.activations
    if request.ends is not None and outer & set(nodes) and _few(kind, values):
        kind, values = of_ends(request.ends, request.activations)
    for pattern, text in request.mixed.items():
        if layer.fits(pattern):
            kind, values = split(text, request.activations)
    weight, axis = network.tensor(name), out_axis(nodes[0])
    if kind in GRIDS and GRIDS[kind].odd and network.patterns.keys() & set(layer.names):
        return None, f'its pruned zeros have no place among the levels of {kind}; write mixed={{"{name}": "ternary"}}'
    if kind in HALVES and (largest := float(weight.detach().abs().max())) > (limit := torch.finfo(HALVES[kind]).max):
        return None, f'its weights reach {largest:.3g}, and {kind} ends at {limit:g}; write mixed={{"{name}": "bf16"}}'
    lookup = any(node.target is aten.embedding.default for node in nodes)
    if layer.kind == "stacked" and weight.dim() > 2 and kind in GRIDS:
        return LayerForm(Stored(name, 0, kind, _rows(request.granularity, weight.shape[-1])), nodes, values), ""
    if isinstance(request.granularity, int) and kind in GRIDS:
        length = weight.select(axis, 0).numel()
        if not lookup and nodes[0].target not in TRANSPOSED and length % request.granularity == 0:
            group = None if length == request.granularity else request.granularity  # a whole row is a channel
            return LayerForm(Stored(name, axis, kind, group), nodes, values), ""
        why = f"a scale per channel: its rows of {length} numbers are not whole groups of {request.granularity}"
        if lookup or nodes[0].target in TRANSPOSED:
            why = f"a scale per channel: the weight of {nodes[0].target} is not stored in groups"
        return LayerForm(Stored(name, axis, kind), nodes, values), why
    whole = request.granularity == "tensor" and not lookup
    looked = all(node.target is aten.embedding.default for node in nodes)
    return LayerForm(Stored(name, None if whole else axis, kind), nodes, None if looked else values), ""


def _rows(granularity: str | int, length: int) -> int:
    """How many numbers of a stacked matrix share a scale: a row as it lies, or the groups asked for where they fill
    it."""
    return granularity if isinstance(granularity, int) and length % granularity == 0 else length


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


def _refusal(network: Network, layer: Layer) -> str:
    """Why a layer's weight cannot be stored in another form; "" where it can."""
    weight = network.tensor(layer.weight)
    if why := no_float(weight, torch.float32) or not_finite(weight):
        return why
    readers = readers_of(network, layer.weight)
    if not set(readers) <= set(layer.calls):
        others = ", ".join(sorted({str(reader.target) for reader in readers}))
        return f"its weight is read by {others}: one of them would read it back to float at every run"
    return APART if len({out_axis(r) for r in readers}) > 1 else ""


__all__ = ["LayerForm", "ends", "layers"]
