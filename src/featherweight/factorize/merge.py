"""``Merge``: two calls in a row become one where that is smaller: a factorization that lost its sense is undone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.errors import PlanError
from featherweight.factorize.surgery import ALONG, AXES, PLAIN, groups_of
from featherweight.judge.costs import growth
from featherweight.network import Network
from featherweight.network.edit import (
    TRANSPOSED,
    bias_name,
    clear_dead,
    insert_call,
    read_tensors,
    readers_of,
    tensor_node,
)
from featherweight.network.layers import Layer, not_finite, select
from featherweight.network.matrices import outputs_first
from featherweight.network.operators import schema_argument
from featherweight.numerics.factors.chains import Link, composed
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.task import Task


@dataclass(frozen=True)
class Merged:
    """Two layers, by the names of their weights, of which the second alone reads the first; and their shapes."""

    first: str
    second: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class MergePlan(Plan):
    """Which calls are merged, in this order; what is merged has the name of the second weight.

    Example:
        >>> thin = fw.capture(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)), torch.zeros(2, 8))
        >>> [(pair.first, pair.second) for pair in fw.factorize.Merge().plan(thin, fw.Task()).pairs]
        [('0.weight', '1.weight')]
    """

    kind: ClassVar[str] = "factorize.merge/1"
    pairs: tuple[Merged, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy with one call in the place of each two; PlanError where the layers are not as planned."""
        changed = network.copy()
        for pair in self.pairs:
            layers = {layer.weight: layer for layer in select(changed).layers}
            before = read_tensors(changed)
            first, second = layers.get(pair.first), layers.get(pair.second)
            if first is None or second is None or _refusal(changed, first, second) or pair.shapes != (
                    tuple(changed.tensor(pair.first).shape), tuple(changed.tensor(pair.second).shape)):
                raise PlanError(f"the plan merges {pair.first!r} and {pair.second!r} of shapes {pair.shapes[0]} and "
                                f"{pair.shapes[1]}; here they are others, or no longer follow one another: plan again "
                                "on this network")
            _merge(changed, first, second)
            clear_dead(changed, before)
        return changed

    def summary(self) -> str:
        shown = ", ".join(f"{p.first} into {p.second}" for p in self.pairs)
        return f"merge: {len(self.pairs)} pairs of layers" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class Merge(Rewrite):
    """Multiplies two linear layers or convolutions with nothing between them into one, where that has no more
    parameters, MACs and bytes. A factorization whose ranks were pruned little, or trained away, is so taken back.

    ignore: patterns of layers to leave alone (``network/layers``).

    Example:
        >>> thin = fw.capture(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)), torch.zeros(2, 8))
        >>> merged = fw.factorize.Merge().plan(thin, fw.Task()).apply(thin)
        >>> fw.measure.params(merged)
        72
    """

    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.STRUCTURE

    def plan(self, network: Network, task: Task) -> MergePlan:
        """Reads no data."""
        pairs: list[Merged] = []
        reasons: dict[str, str] = {s.path: s.reason for s in select(network, self.ignore).skipped}
        work, again = network, True
        while again:
            again = False
            selected = select(work, self.ignore)
            producers = {call: layer for layer in selected.layers for call in layer.calls}
            for second in selected.layers:
                first = producers.get(second.calls[0].args[0])  # type: ignore[arg-type]
                reason = "no linear or convolution call is the only one before it" if first is None else \
                    _refusal(work, first, second)
                if first is not None and not reason:
                    shapes = tuple(work.tensor(first.weight).shape), tuple(work.tensor(second.weight).shape)
                    pair = Merged(first.weight, second.weight, shapes)
                    merged = MergePlan((pair,)).apply(work)
                    grown = growth(work, merged)
                    if not grown:
                        work, again = merged, True
                        pairs.append(pair)
                        break
                    reason = f"merged with {first.weight} the {', '.join(grown)} would grow"
                reasons[second.weight] = reason
        gone = {name for pair in pairs for name in (pair.first, pair.second)}
        return MergePlan(tuple(pairs), skipped=tuple(Skipped(p, r) for p, r in reasons.items() if p not in gone))


def _refusal(network: Network, first: Layer, second: Layer) -> str:
    """Why two layers, the second of which reads the first, cannot be one; "" if they can."""
    calls = (*first.calls, *second.calls)
    if len(calls) != 2 or len(calls[0].users) != 1 or any(len(layer.names) > 1 for layer in (first, second)):
        return f"{first.weight} or it is read by several calls"
    if calls[1].args[0] is not calls[0]:
        return f"it does not read {first.weight} alone"
    if any(len(readers_of(network, layer.weight)) > 1 for layer in (first, second)):
        return f"{first.weight} or its weight is read by other calls too"
    if any(c.target in TRANSPOSED or groups_of(c) > 1 for c in calls):
        return "grouped and transposed convolutions are not merged"
    if AXES.get(calls[0].target, 0) != AXES.get(calls[1].target, 0):
        return f"{first.weight} is of another kind"
    for layer in (first, second):
        if reason := not_finite(network.tensor(layer.weight)):
            return reason
        if layer.weight in network.patterns:
            return f"zeros are kept ({network.patterns[layer.weight]}); a product would fill them"
    if any(_given(c, "bias") is not None and bias_name(c) is None for c in calls):
        return "its bias is computed"
    return _options(network, *calls)[1]


def _given(call: Node, name: str) -> Any:
    return schema_argument(call, name)


def _options(network: Network, first: Node, second: Node) -> tuple[dict[str, list[int]], str]:
    """The options of one convolution that does both, or why there is none: along each axis one of them must do
    nothing, and no padding may come behind a bias."""
    axes = AXES.get(first.target, 0)
    found: dict[str, list[int]] = {name: [] for name in ("stride", "padding", "dilation")}
    if not axes:
        return found, ""
    each = []
    for call in (first, second):
        given = {name: _given(call, name) for name in found}
        if isinstance(given["padding"], str):
            return found, "its padding is a word"
        spread = {n: [v] * axes if isinstance(v, int) else list(v) * (axes // len(v)) for n, v in given.items()}
        if any(isinstance(v, Node) for values in spread.values() for v in values):
            return found, "its options are computed"
        kernel = network.tensor(str(call.args[1].target)).shape[2:]  # type: ignore[union-attr]
        each.append((spread, kernel))
    for d in range(axes):
        busy = [kernel[d] > 1 or any(spread[n][d] != ALONG[n] for n in ("stride", "padding"))
                for spread, kernel in each]
        if all(busy):
            return found, "both work along the same axis of space"
        spread = each[1 if busy[1] else 0][0]
        for name, values in found.items():
            values.append(int(spread[name][d]))
    if _given(first, "bias") is not None and any(p for p in each[1][0]["padding"]):
        return found, "it pads what has a bias before"
    return found, ""


@torch.no_grad()
def _merge(network: Network, first: Layer, second: Layer) -> None:
    calls = first.calls[0], second.calls[0]
    kernels = [outputs_first(c, network.tensor(layer.weight).detach()).double()
               for c, layer in zip(calls, (first, second), strict=True)]
    old = network.tensor(second.weight)
    product = composed([Link("", k) for k in kernels]).to(old.dtype).contiguous()
    bias = _merged_bias(network, calls, kernels[1])
    name = _free(network, second.weight, "merged")
    stored, trains = isinstance(old, nn.Parameter), isinstance(old, nn.Parameter) and old.requires_grad
    network.add_tensor(name, nn.Parameter(product, requires_grad=trains) if stored else product, buffer=not stored)
    weight = tensor_node(network, name, calls[1])
    given: Any = None
    if bias is not None:
        own = f"{name.removesuffix('weight')}bias"
        network.add_tensor(own, nn.Parameter(bias.to(old.dtype), requires_grad=trains))
        given = tensor_node(network, own, calls[1])
    axes = AXES.get(calls[0].target, 0)
    options: Mapping[str, Any] = _options(network, *calls)[0]
    more = [options["stride"], options["padding"], options["dilation"]] if axes else []
    made = insert_call(network, PLAIN[axes], (calls[0].args[0], weight, given, *more), before=calls[1], like=calls[1])
    calls[1].replace_all_uses_with(made)
    network.graph.erase_node(calls[1])


def _merged_bias(network: Network, calls: tuple[Node, Node], kernel: Tensor) -> Tensor | None:
    """b2 + (sum over the kernel of W2) b1, None where neither call has one."""
    names = [bias_name(c) for c in calls]
    inner = None if names[0] is None else kernel.flatten(2).sum(2) @ network.tensor(names[0]).double() \
        if kernel.dim() > 2 else kernel @ network.tensor(names[0]).double()
    outer = None if names[1] is None else network.tensor(names[1]).detach().double()
    return inner if outer is None else outer if inner is None else inner + outer


def _free(network: Network, weight: str, part: str) -> str:
    """A name for the product beside the weight: "fc.expand.weight" -> "fc.merged.weight" of a factorized layer."""
    stem = weight.removesuffix("weight").rstrip(".")
    base = stem.rpartition(".")[0] if stem.rpartition(".")[2] in ("expand", "core") else stem
    for count in range(len(network.tensors()) + 1):
        name = f"{base}.{part}{count or ''}.weight".lstrip(".")
        if name not in network.tensors():
            return name
    raise AssertionError(math.inf)


__all__ = ["Merge", "MergePlan", "Merged"]
