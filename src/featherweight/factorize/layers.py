"""Which layers can be factorized, and what each costs in which form."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from featherweight.factorize.surgery import Places, form_for, groups_of, kernels, replace, sizes_of, stem
from featherweight.judge.costs import alone, file_bytes
from featherweight.network import Network
from featherweight.network.edit import TRANSPOSED, bias_name, clear_dead, read_tensors, readers_of
from featherweight.network.layers import APART, Layer, not_finite, select
from featherweight.network.matrices import layout
from featherweight.network.operators import schema_argument
from featherweight.numerics.factors.chains import Link, composed
from featherweight.numerics.factors.forms import FORMS, PARTS, Ranks, Shape
from featherweight.steps import Skipped

#: what ``LowRank(form=...)`` may be -> the forms that are tried, the cheapest that keeps to the rule being taken
CHOICES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("svd", "spatial", "tucker2", "cp", "tt", "squeeze", "separable")},
    "grouped": tuple(f"grouped{parts}" for parts in PARTS),
    "auto": ("svd", "spatial", "tucker2", "grouped2", "grouped4"),
}
#: names of the links of any form
NAMES = ("reduce", "core", "core1", "core2", "core3", "expand")


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs: parameters and multiply-accumulates for one sample, biases left out."""

    params: int
    macs: int


@dataclass(frozen=True)
class Factorable:
    """A layer that can be factorized. values: of one sample, by node. kernels: of each group [o, i, *k]."""

    network: Network
    layer: Layer
    values: Mapping[str, Any]
    kernels: tuple[Tensor, ...]

    @property
    def shape(self) -> Shape:
        """Of the kernel of one group."""
        return tuple(self.kernels[0].shape)

    @property
    def adjoint(self) -> bool:
        return self.layer.calls[0].target in TRANSPOSED

    @cached_property
    def own_bias(self) -> bool:
        """Whether the layer may be given a bias of its own: its calls have none, or one that no other call reads."""
        calls = self.layer.calls
        names, given = {bias_name(call) for call in calls}, [schema_argument(call, "bias") for call in calls]
        if self.adjoint or names == {None}:
            return not self.adjoint and all(g is None for g in given)
        name = next(iter(names))
        return len(names) == 1 and name is not None and len(readers_of(self.network, name)) == len(given) \
            and len(self.network.tied_names(name)) == 1

    @cached_property
    def new_bias(self) -> int:
        """Parameters of the bias that a fit to data adds where there is none."""
        without = self.own_bias and schema_argument(self.layer.calls[0], "bias") is None
        return outputs_of(self.layer, self.network) if without else 0

    @cached_property
    def whole(self) -> LayerCost:
        call = self.layer.calls[0]
        return self._cost([("core", (self.shape[0] * groups_of(call), *self.shape[1:]), groups_of(call))])

    def forms(self, choice: str) -> list[str]:
        """The forms of ``CHOICES`` that this layer can have."""
        found = [form_for(name, self.shape) for name in CHOICES[choice]]
        fits = [n for n in found if not n.startswith("grouped") or self.shape[1] % int(n.removeprefix("grouped")) == 0]
        return list(dict.fromkeys(fits)) or ["svd"]

    def cost(self, form: str, ranks: Ranks, data: bool = False) -> LayerCost:
        """What the layer costs in this form. data: it was fit to data, which may have added a bias."""
        found = self._cost(sizes_of(self.layer.calls[0], self.shape, form, ranks))
        return LayerCost(found.params + self.new_bias, found.macs) if data else found

    def _cost(self, sizes: list[Any]) -> LayerCost:
        macs = sum(Places.of(call, self.values).macs(sizes, self.adjoint) for call in self.layer.calls)
        return LayerCost(sum(math.prod(shape) for _, shape, _ in sizes), macs)

    def error(self, form: str, ranks: Ranks, grams: tuple[Tensor, ...] | None = None) -> float:
        """The squared error of this form over the square of the whole: of the weights, or with ``grams`` (one a group)
        of the outputs."""
        lost = total = 0.0
        for g, kernel in enumerate(self.kernels):
            gram = None if grams is None else grams[g]
            away = composed(FORMS[form].links(kernel.double(), ranks, gram)) - kernel.double()
            lost, total = lost + _square(away, gram), total + _square(kernel.double(), gram)
        return lost / max(total, 1e-300)

    def split(self, form: str, ranks: Ranks, bias: bool = False) -> Network:
        """The layer alone as a chain of zeros, for questions of size and time. bias: its last link has one."""
        network = alone(self.network, self.layer.weight)
        read = read_tensors(network)
        links = [Link(name, torch.zeros(shape, dtype=self.kernels[0].dtype), groups)
                 for name, shape, groups in sizes_of(self.layer.calls[0], self.shape, form, ranks)]
        inside = next(layer for layer in select(network).layers if self.layer.weight in layer.names)
        zeros = self.kernels[0].new_zeros(outputs_of(self.layer, self.network))
        replace(network, inside, links, zeros if bias else None)
        clear_dead(network, read)
        return network

    def growth(self, form: str, ranks: Ranks, bias: bool = False) -> int:
        """By how many bytes the file grows where the layer is split; negative where it shrinks; of the layer alone."""
        before = file_bytes(alone(self.network, self.layer.weight))
        return file_bytes(self.split(form, ranks, bias)) - before


def _square(kernel: Tensor, gram: Tensor | None) -> float:
    flat = kernel.flatten(1)
    return float((flat if gram is None else flat @ gram).mul(flat).sum())


def outputs_of(layer: Layer, network: Network) -> int:
    """Output channels of a layer."""
    call, weight = layer.calls[0], network.tensor(layer.weight)
    own = kernels(call, weight)
    return own[0].shape[1] * len(own) if call.target in TRANSPOSED else own[0].shape[0] * len(own)


def factorable(network: Network, ignore: tuple[str, ...]) -> tuple[list[Factorable], list[Skipped],
                                                                   tuple[frozenset[str], ...]]:
    """The layers that can be factorized, those that cannot and why, and what all are known by."""
    selected, values = select(network, ignore), network.values(batch=1)
    modules = set(dict(network.named_modules()))
    found, skipped = [], list(selected.skipped)
    for layer in selected.layers:
        if reason := _refusal(network, layer, modules):
            skipped.append(Skipped(layer.weight, reason))
        else:
            weight = network.tensor(layer.weight).detach()
            found.append(Factorable(network, layer, values, tuple(kernels(layer.calls[0], weight))))
    return found, skipped, selected.seen


def _refusal(network: Network, layer: Layer, modules: Collection[str]) -> str:
    """Why this layer cannot be factorized, whatever its ranks; "" if it can."""
    name, weight = layer.weight, network.tensor(layer.weight)
    others = sorted({str(n.target) for n in readers_of(network, name)} - {str(c.target) for c in layer.calls})
    if others:
        return f"its weight is also read by {', '.join(others)}"
    if len({(str(c.target), groups_of(c)) for c in layer.calls}) > 1:
        return "its weight is read by calls of several kinds"
    if len({layout(call) for call in layer.calls}) > 1:
        return APART
    if reason := not_finite(weight):
        return reason
    if not weight.any():
        return "its weight is all zero"
    if name in network.patterns:
        return f"its zeros are kept ({network.patterns[name]}); factors would fill them"
    taken = [n for part in NAMES if (n := f"{stem(name)}{part}") in modules]
    return f"the name {taken[0]} is taken" if taken else ""
