"""Compact filters that look at data: layer after layer, on what the network compressed so far gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import conv1d, conv2d, conv3d

from featherweight.calibrate.pair import Pair
from featherweight.factorize.surgery import AXES
from featherweight.network import Network
from featherweight.network.edit import bias_name
from featherweight.network.layers import Layer
from featherweight.network.matrices import as_matrix
from featherweight.network.operators import schema_argument
from featherweight.network.program import Tap
from featherweight.numerics.factors.compact import Ghost
from featherweight.numerics.least_squares import Moments, refit
from featherweight.steps import Skipped
from featherweight.task import Task

RIDGE = 1e-4
CONVOLVE = {1: conv1d, 2: conv2d, 3: conv3d}


@dataclass(frozen=True)
class Fitted:
    """A layer in its form. tensors: by their names behind the layer's path. kernel: [o, i, *k] that they stand for; of
    ``ghost`` that of the primary outputs, from whose outputs the others are made. error: squared, relative."""

    tensors: dict[str, Tensor]
    kernel: Tensor
    ghost: Ghost | None = None
    error: float = 0.0


#: (call, kernel [o, i, *k], gram of what it is multiplied with) -> its form
Fit = Callable[[Node, Tensor, Tensor | None], Fitted]


@torch.no_grad()
def fitted(network: Network, task: Task | None, layers: Sequence[Layer], fit: Fit) -> tuple[list[Fitted],
                                                                                           list[Skipped]]:
    """The form of every layer, with its error; task: the data that it is fitted to, None for none."""
    if task is None:
        return [_judged(fit(one.calls[0], weight, None), weight) for one in layers
                for weight in [network.tensor(one.weight).detach()]], []
    ghosts: dict[str, Ghost] = {}
    taps: dict[str, Tap] = {one.calls[0].name: partial(_made, ghosts, one.calls[0].name) for one in layers}
    pair = Pair.of(network.copy().eval(), task.batches("calibration"), taps=taps)
    said = pair.admit()
    found = {}
    for one in sorted(layers, key=lambda layer: pair.whole.order.number[layer.calls[0].name]):
        found[one.weight] = _on_data(pair, network, one, fit, ghosts)
    return [found[one.weight] for one in layers], [Skipped("", said)] if said else []


def _judged(one: Fitted, weight: Tensor) -> Fitted:
    """With the error of its weights."""
    if one.ghost is not None:
        return replace(one, error=one.ghost.error)
    return replace(one, error=float((one.kernel - weight).double().square().sum() / weight.double().square().sum()))


def _made(ghosts: dict[str, Ghost], name: str, value: Tensor) -> Tensor:
    """What a call gives once its ghosts are made of its primary outputs."""
    if name not in ghosts:
        return value
    ghost, axes = ghosts[name], ghosts[name].cheap.dim() - 2
    given = value.index_select(-1 - axes, ghost.primary[ghost.base].to(value.device))
    cheap = CONVOLVE[axes](given, ghost.cheap.to(value), padding=ghost.cheap.shape[-1] // 2, groups=len(ghost.cheap))
    return value.index_copy(-1 - axes, ghost.ghosts.to(value.device), cheap)


def _on_data(pair: Pair, network: Network, layer: Layer, fit: Fit, ghosts: dict[str, Ghost]) -> Fitted:
    call, weight = layer.calls[0], network.tensor(layer.weight).detach()
    pair.go_to(call.name)
    moments = Moments()
    x, z = pair.rows(call)
    moments.add(x, z @ as_matrix(call, weight).to(z).mT)
    gram, cross = (m[0] for m in moments.products())
    best = refit(gram, cross, weight.flatten(1), RIDGE).view(weight.shape)
    one = fit(call, best.to(weight.dtype), gram)
    pair.set(layer.weight, one.kernel)
    if one.ghost is not None:
        ghosts[call.name] = one.ghost
    pair.keep([call.name])
    pair.go_past(call.name)
    wanted, given = ([v.double().movedim(-1 - AXES.get(call.target, 0), 0).flatten(1) for v in flow.gave(call.name)]
                     for flow in (pair.whole, pair.compressed))
    whole = torch.cat(wanted, 1)
    lost = whole - torch.cat(given, 1)
    shift = lost.mean(1)
    error = float((lost - shift[:, None]).square().sum() / (whole - whole.mean(1, keepdim=True)).square().sum())
    tensors = dict(one.tensors)
    if _may_shift(network, call):
        name = bias_name(call)
        old = 0 if name is None else network.tensor(name).detach().double()
        tensors["bias"] = (old + shift).to(weight.dtype)
        pair.compressed.change(call.name, partial(_moved, shift.view(-1, *[1] * AXES.get(call.target, 0))))
    pair.release([call.name])
    return replace(one, tensors=tensors, error=error)


def _moved(shift: Tensor, value: Tensor) -> Tensor:
    return value + shift.to(value)


def _may_shift(network: Network, call: Node) -> bool:
    """Whether the layer may have a bias of its own: it has none, or one that no other call reads."""
    name = bias_name(call)
    if name is None:
        return schema_argument(call, "bias") is None
    return len(network.users_of(name)) == 1 and len(network.tied_names(name)) == 1


__all__ = ["Fitted", "fitted"]
