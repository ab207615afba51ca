"""Scores that read data: what the loss, the outputs or the next layers say of a channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.axes.groups import AxisGroup
from featherweight.axes.readers import Reader, readers
from featherweight.calibrate.moments import inputs_of
from featherweight.network import Network, trees
from featherweight.network.devices import device_of
from featherweight.network.matrices import as_matrix
from featherweight.prune.channels.scores.weights import Floats, Scores, norm
from featherweight.task import Task, call, move

#: calibration batches that a score reads at most
BATCHES = 16
#: network's output, target -> the scalar whose slopes are taken
Objective = Callable[[Any, Any], Tensor]


def taylor(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """Squared first-order change of the loss when nobody hears a channel: (sum of x dL/dx)^2, averaged over samples.

    x are the channel's values where convolutions and linear layers read them; readers and places are summed before the
    square. This is Molchanov et al. 2019, eq. 8, for the weights that read the channel (sum of w dL/dw = sum of
    x dL/dx), taken sample by sample. The first axis of a value counts as samples. Where the network fits the
    calibration data so well that slopes vanish it says little: "fisher" does not have this weakness.
    """
    task.require("calibration", "loss")
    assert task.loss is not None
    loss = task.loss
    return _squared_slopes(network, task, groups, lambda output, target: loss(output, move(target, device_of(network))))


def fisher(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """Squared first-order change of the outputs when nobody hears a channel: |sum of x dy/dx|^2, averaged over samples.

    This is the Fisher information of a gate on the channel (Theis et al. 2018, eq. 7; Liu et al. 2021, "Group Fisher",
    eq. 5), with the outputs y taken as the mean of a Gaussian: it reads no target and no loss, and does not vanish
    where the loss does. The square is estimated with one random projection of the outputs for each sample.
    """
    task.require("calibration")
    generator = torch.Generator().manual_seed(seed)

    def projected(output: Any, target: Any) -> Tensor:
        return sum(((v * torch.randn(v.shape, generator=generator).to(v)).sum() for v in trees.floats(output)),
                   start=torch.zeros(()))

    return _squared_slopes(network, task, groups, projected)


def _squared_slopes(network: Network, task: Task, groups: Sequence[AxisGroup], objective: Objective) -> Scores:
    if not groups:
        return []
    work = network.copy().eval()
    for parameter in work.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    found = readers(work, groups)
    total, count = [np.zeros(len(g)) for g in groups], 0
    for change in _changes(work, task, {r.node for mine in found for r in mine}, objective):
        for t, group, mine in zip(total, groups, found, strict=True):
            t += _squares(group, [(change[r.node], r) for r in mine if r.node in change])
        count += 1
    return unread(network, task, groups, [t / max(count, 1) for t in total])


def _changes(work: Network, task: Task, nodes: set[str], objective: Objective) -> Iterator[dict[str, Tensor]]:
    """Batch by batch: x * d objective / dx of the values at ``nodes``."""
    for inputs, target in task.batches("calibration", BATCHES):
        values: dict[str, Tensor] = {}
        with torch.enable_grad(), work.taps({n: partial(values.__setitem__, n) for n in nodes}):
            goal = objective(call(work, move(inputs, device_of(work))), target)
            values = {n: v for n, v in values.items() if v.requires_grad}
            slopes = torch.autograd.grad(goal, list(values.values()), allow_unused=True) if values else ()
        yield {n: (x * s).detach() for (n, x), s in zip(values.items(), slopes, strict=True) if s is not None}


def _squares(group: AxisGroup, change: list[tuple[Tensor, Reader]]) -> Floats:
    """Mean over samples of the squared sum over readers and places: [n_channels]."""
    total: dict[int, Floats] = {}
    for x, reader in change:
        axis = reader.axis % x.dim()
        places = [d for d in range(1, x.dim()) if d != axis]
        flat = (x.sum(places) if places else x).double().cpu().numpy()
        own = flat[:, reader.index].sum(2)
        total[len(own)] = total.get(len(own), 0.0) + own
    return sum(((t ** 2).mean(0) for t in total.values()), start=np.zeros(len(group)))


def activation(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """|w| times the norm of the channel that it is multiplied with, summed over all weights that read the channel
    (Sun et al. 2024, "Wanda", eq. 1, whose scores of single weights are added up here; a window is one input).
    """
    task.require("calibration")
    work = network.copy().eval()
    found = readers(work, groups)
    axes = {r.call: r.axis for mine in found for r in mine}
    nodes = [n for n in work.calls() if n.name in axes]
    loud: dict[str, Tensor] = {}
    for batch in task.batches("calibration", BATCHES) if nodes else ():
        for name, x in inputs_of(work, batch, nodes).items():
            channels = x.transpose(0, axes[name]).flatten(1) if x.dim() > 1 else x[:, None]
            loud[name] = loud.get(name, 0.0) + channels.double().square().sum(1)
    total = [np.zeros(len(g)) for g in groups]
    for t, mine in zip(total, found, strict=True):
        for r in mine:
            heard = _heard(work, r) * loud[r.call].sqrt()
            t += heard.cpu().numpy()[r.index].sum(1)
    return unread(network, task, groups, total)


def _heard(network: Network, reader: Reader) -> Tensor:
    """Sum of |w| over all weights that read each position of the reader's input: [positions], float64."""
    weight = as_matrix(network.node(reader.call), network.tensor(reader.weight).detach())
    window = int(np.prod(network.tensor(reader.weight).shape[2:]))
    groups, outputs, _ = weight.shape
    return weight.double().abs().view(groups, outputs, -1, window).sum((1, 3)).flatten()


def unread(network: Network, task: Task, groups: Sequence[AxisGroup], scores: Scores) -> Scores:
    """``scores``, where groups that no convolution and no linear layer reads (all zero) have the sum of their squared
    weights instead, in such units that their mean is that of the other groups' means."""
    silent = [not s.any() for s in scores]
    if not any(silent):
        return scores
    others = [float(s.mean()) for s, none in zip(scores, silent, strict=True) if not none]
    level = float(np.mean(others)) if others else 1.0
    squares = norm(2)(network, task, groups, 0)
    return [q * level / max(float(q.mean()), 1e-30) if none else s
            for s, q, none in zip(scores, squares, silent, strict=True)]
