"""Scores that read the network's own numbers only, no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featherweight.axes.groups import AxisGroup, Member
from featherweight.network import Network
from featherweight.network.edit import stored_value
from featherweight.task import Task

Floats = npt.NDArray[np.float64]
Scores = list[Floats]
Score = Callable[[Network, Task, Sequence[AxisGroup], int], Scores]


def along(member: Member, values: Tensor) -> Floats:
    """Sums ``values`` (shaped like the member's tensor) over all but the positions of each channel: [n_channels]."""
    rest = [d for d in range(values.dim()) if d != member.dim]
    flat = values.double().sum(rest) if rest else values.double()
    found: Floats = flat.cpu().numpy()[member.index].sum(1)
    return found


def numbers(network: Network, member: Member) -> Tensor:
    """The weight that calls compute with, in the shape of the member's tensor."""
    node = network.node(member.computed) if member.computed else None
    found: Tensor = network.tensor(member.tensor).detach() if node is None else stored_value(network, node)
    return found


def weighing(group: AxisGroup) -> tuple[Member, ...]:
    """The members that tell how much a channel matters: weights and norms' scales, made or read."""
    return tuple(m for m in group.members if m.role in ("weight", "norm"))


def random(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """Uniform noise: the baseline that every score has to beat."""
    generator = np.random.default_rng(seed)
    return [generator.random(len(g)) for g in groups]


def norm(power: int) -> Score:
    """Sum over all coupled weights of |w|^power: what makes the channel, scales it and reads it (DepGraph, eq. 6)."""

    def score(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
        return [sum((along(m, numbers(network, m).double().abs() ** power) for m in weighing(g)),
                    start=np.zeros(len(g))) for g in groups]

    return score


def fpgm(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """Sum of the Euclidean distances of a channel's weights to those of all other channels of its group: one near the
    geometric median of all can be stood in for by the others (He et al. 2019, "FPGM", eq. 4). Filters that make the
    channel and columns that read it count alike; the distances are summed over all coupled weights."""
    return [sum((_distances(m, numbers(network, m)) for m in g.members if m.role == "weight"),
                start=np.zeros(len(g))) for g in groups]


def _distances(member: Member, weight: Tensor) -> Floats:
    index = torch.from_numpy(member.index).to(weight.device)
    each = weight.double().movedim(member.dim, 0)[index].flatten(1)
    total: Floats = torch.cdist(each, each).sum(1).cpu().numpy()
    return total


def bn(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """|gamma| of the norms that the channel passes, summed (Liu et al. 2017, "Network Slimming", section 3). A group
    without a norm gets the size of the channel where it is made, the root of the sum of its squared weights, which is
    the gain that a norm's scale would show."""
    return [_gains(network, g) for g in groups]


def _gains(network: Network, group: AxisGroup) -> Floats:
    norms = [m for m in group.members if m.role == "norm"]
    if norms:
        return sum((along(m, numbers(network, m).double().abs()) for m in norms),
                   start=np.zeros(len(group)))
    made = [m for m in weighing(group) if m.makes] or list(weighing(group))
    squares = sum((along(m, numbers(network, m).double() ** 2) for m in made), start=np.zeros(len(group)))
    root: Floats = np.sqrt(squares)
    return root
