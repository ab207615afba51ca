"""Weights that a graph makes of fewer numbers: what is stored, the calls that make them, and which layers allow it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.fx import Node

from featherweight.errors import PlanError, did_you_mean
from featherweight.judge.costs import alone, growth
from featherweight.network import Network
from featherweight.network.edit import clear_dead, insert_call, read_tensors, readers_of, tensor_node
from featherweight.network.layers import Layer, Selection, not_finite
from featherweight.steps import Plan, Skipped

P = TypeVar("P", bound=Plan)


class Item(Protocol):
    """What a plan says of one weight."""

    @property
    def weight(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Made:
    """Puts calls before the first reading of a weight; ``in_place`` has all readings take what these gave."""

    network: Network
    weight: str

    def stored(self, part: str, value: Tensor) -> Node:
        """The node of a tensor behind the weight's name; of floats a parameter, trained where the weight is."""
        weight, name = self.network.tensor(self.weight), f"{self.weight}_{part}"
        if value.is_floating_point():
            trains = isinstance(weight, nn.Parameter) and weight.requires_grad
            self.network.add_tensor(name, nn.Parameter(value.to(weight), requires_grad=trains))
        else:
            self.network.add_tensor(name, value.to(weight.device), buffer=True)
        return tensor_node(self.network, name, self.network.reads_of(self.weight)[0])

    def make(self, target: Any, *args: Any) -> Node:
        first = self.network.reads_of(self.weight)[0]
        return insert_call(self.network, target, args, before=first, like=next(iter(first.users)))

    def in_place(self, made: Node) -> None:
        """Takes the weight out of the network."""
        for node in self.network.reads_of(self.weight):
            node.replace_all_uses_with(made)
            self.network.graph.erase_node(node)
        for name in self.network.tied_names(self.weight):
            self.network.remove_tensor(name)


def stays(network: Network, layer: Layer, parts: Collection[str]) -> str:
    """Why a layer's weight cannot be made of others, stored under ``parts``, whatever that saves; "" if it can."""
    weight = network.tensor(layer.weight)
    if reason := not_finite(weight):
        return reason
    if not weight.any():
        return "its weight is all zero"
    if layer.weight in network.patterns:
        return f"its zeros are kept ({network.patterns[layer.weight]}); other weights would fill them"
    own = {str(call.target) for call in layer.calls}
    others = sorted({str(user.target) for user in readers_of(network, layer.weight)} - own)
    if others:
        return f"its weight is also read by {', '.join(others)}"
    taken = [name for part in parts if (name := f"{layer.weight}_{part}") in network.tensors()]
    return f"the name {taken[0]} is taken" if taken else ""


def applied(network: Network, items: Sequence[Item], tensors: Mapping[str, Tensor], parts: Sequence[str],
            put: Callable[[Made, Any], None]) -> Network:
    """A copy whose weights are made of the ``parts`` in a plan's tensors, as ``put`` does it for each item. PlanError
    where the network or the tensors are not those of the plan."""
    changed = network.copy()
    before = read_tensors(changed)
    for one in items:
        if one.weight not in changed.tensors():
            raise PlanError(f"the plan makes {one.weight!r} of fewer numbers, which this network does not have; "
                            f"{did_you_mean(one.weight, changed.tensors())}")
        shape = tuple(changed.tensor(one.weight).shape)
        lacks = [part for part in parts if f"{one.weight}_{part}" not in tensors]
        if shape != one.shape or lacks:
            raise PlanError(f"the plan makes {one.weight!r} of shape {list(one.shape)}; here it is {list(shape)}, and "
                            f"the plan lacks {lacks or 'nothing'}: plan again on this network, and load plans with "
                            "their tensors: Plan.load(path)")
        put(Made(changed, one.weight), one)
    clear_dead(changed, before)
    return changed


def planned(network: Network, selected: Selection, fit: Callable[[Layer], tuple[Item, dict[str, Tensor]]],
            refusal: Callable[[Layer], str], plan: Callable[[tuple[Any, ...], dict[str, Tensor]], P]) -> P:
    """The plan of the layers that become smaller, which says why the others stay."""
    found: list[Any] = []
    skipped, tensors = list(selected.skipped), dict[str, Tensor]()
    for layer in selected.layers:
        reason = refusal(layer)
        if not reason:
            one, own = fit(layer)
            inside = alone(network, layer.weight)
            grown = growth(inside, plan((one,), own).apply(inside))
            reason = f"its {', '.join(grown)} would grow" if grown else ""
        if reason:
            skipped.append(Skipped(layer.weight, reason))
        else:
            found.append(one)
            tensors |= own
    return replace(plan(tuple(found), tensors), skipped=tuple(skipped))


__all__ = ["Item", "Made", "applied", "planned", "stays"]
