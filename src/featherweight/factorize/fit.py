"""Factors that look at data: layer after layer, each fit to what the whole network gave, on what the compressed gives.

Zhang et al. 2016, "Accelerating very deep convolutional networks", section 3.2 (asymmetric reconstruction: the inputs
of the compressed network, the outputs of the whole one); Wang et al. 2025, "SVD-LLM" (the root of the second moments
as the whitening whose singular values are the errors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from featherweight.calibrate.pair import Pair
from featherweight.factorize.layers import Factorable
from featherweight.factorize.plan import Split
from featherweight.factorize.surgery import AXES, stem, weight_of
from featherweight.network import Network
from featherweight.network.edit import bias_name
from featherweight.network.matrices import as_matrix
from featherweight.network.program import Tap
from featherweight.numerics.factors.chains import Link, composed, refit_last, side_by_side
from featherweight.numerics.factors.forms import FORMS
from featherweight.numerics.least_squares import Moments, refit
from featherweight.steps import Skipped
from featherweight.task import Task

#: share of the mean second moment that holds a refit weight where it was
RIDGE = 1e-4


@torch.no_grad()
def fitted(network: Network, task: Task, layers: Sequence[Factorable],
           splits: Sequence[Split]) -> tuple[list[Split], dict[str, Tensor], list[Skipped]]:
    """The splits with the errors that they have on calibration data, their factors and biases by name, and what was
    done without data and why."""
    shifts: dict[str, Tensor] = {}
    known = {layer.layer.weight: layer for layer in layers}
    taps: dict[str, Tap] = {call.name: partial(_shifted, shifts, call.name, AXES.get(call.target, 0))
            for s in splits for call in known[s.weight].layer.calls}
    pair = Pair.of(network.copy().eval(), task.batches("calibration"), taps=taps)
    said = pair.admit()
    found: list[Split] = []
    tensors: dict[str, Tensor] = {}
    skipped = [Skipped("", said)] if said else []
    for split in sorted(splits, key=lambda s: pair.whole.order.number[known[s.weight].layer.calls[0].name]):
        layer = known[split.weight]
        if layer.adjoint:
            skipped.append(Skipped(f"{split.weight} (data)", "a transposed convolution is factorized without data"))
            found.append(replace(split, error=layer.error(split.name, split.ranks)))
            pair.set(split.weight, _plain(layer, split))
            continue
        moments = _moments(pair, network, layer)
        links, error = _links(layer, split, moments)
        weight = weight_of(layer.layer.calls[0], links, network.tensor(split.weight).shape)
        pair.set(split.weight, weight)
        tensors |= {f"{stem(split.weight)}{link.name}.weight": link.weight for link in links}
        if layer.own_bias:
            shift = _shift(layer, weight, moments)
            shifts |= {call.name: shift for call in layer.layer.calls}
            tensors[f"{stem(split.weight)}bias"] = _bias(network, layer, shift)
        found.append(replace(split, error=error))
    order = {s.weight: n for n, s in enumerate(splits)}
    return sorted(found, key=lambda s: order[s.weight]), tensors, skipped


def _shifted(shifts: dict[str, Tensor], name: str, axes: int, value: Tensor) -> Tensor:
    """What a call gives, with its new bias in the place of the old one. axes: those of space, behind the channels."""
    return value + shifts[name].to(value).view(-1, *[1] * axes) if name in shifts else value


def _moments(pair: Pair, network: Network, layer: Factorable) -> Moments:
    """Of the rows that the layer reads in the compressed network, and of what the whole one makes of its own."""
    found = Moments()
    weight = network.tensor(layer.layer.weight).detach()
    pair.go_to(layer.layer.calls[0].name)
    for n, call in enumerate(layer.layer.calls):
        here = pair if n == 0 else pair.ahead()
        here.go_to(call.name)
        x, z = here.rows(call)
        found.add(x, z @ as_matrix(call, weight).to(z).mT)
    return found


def _links(layer: Factorable, split: Split, moments: Moments) -> tuple[list[Link], float]:
    """The chain, and its squared error over the variance of what the best layer of full rank gives."""
    gram, cross = moments.products()
    chains, lost, total = [], 0.0, 0.0
    for g, kernel in enumerate(layer.kernels):
        best = refit(gram[g], cross[g], kernel.flatten(1), RIDGE)
        links = FORMS[split.name].links(best.view(kernel.shape), split.ranks, gram[g])
        links = refit_last(links, gram[g], cross[g], RIDGE)
        away = composed(links).flatten(1) - best
        lost, total = lost + float((away @ gram[g] * away).sum()), total + float((best @ gram[g] * best).sum())
        chains.append([replace(link, weight=link.weight.to(kernel.dtype)) for link in links])
    return side_by_side(chains), max(lost, 0.0) / max(total, 1e-300)


def _shift(layer: Factorable, weight: Tensor, moments: Moments) -> Tensor:
    """What must be added to the new outputs [o] so that their means are those of the whole network."""
    given, wanted = moments.means()
    made = as_matrix(layer.layer.calls[0], weight).double()
    return (wanted - (made @ given[..., None])[..., 0]).flatten()


def _bias(network: Network, layer: Factorable, shift: Tensor) -> Tensor:
    name = bias_name(layer.layer.calls[0])
    old = network.tensor(layer.layer.weight).detach().new_zeros(len(shift)) if name is None else network.tensor(name)
    return (old.detach().double() + shift.to(old.device)).to(old.dtype)


def _plain(layer: Factorable, split: Split) -> Tensor:
    call = layer.layer.calls[0]
    links = side_by_side([FORMS[split.name].links(kernel, split.ranks) for kernel in layer.kernels])
    return weight_of(call, links, layer.network.tensor(split.weight).shape)


__all__ = ["fitted"]
