"""How much a channel matters: one number per channel of every axis group, higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.operators import schema_argument
from featherweight.network.surgery import CONVOLUTIONS, TRANSPOSED, WEIGHTED, weight_name
from featherweight.prune.axes import AxisGroup, Member
from featherweight.prune.labels import Ints
from featherweight.task import Task, call, move

Scores = list[npt.NDArray[np.float64]]
Score = Callable[[Network, Task, Sequence[AxisGroup], int], Scores]
#: calibration batches that a gradient score reads at most
BATCHES = 16


def normalised(scores: Scores) -> Scores:
    """Every group divided by its mean, so that channels of different groups can be ranked together.

    This is the normalizer of DepGraph (Fang et al. 2023, section 3.4).
    """
    return [s / max(float(s.mean()), 1e-30) for s in scores]


def along(member: Member, values: Tensor) -> npt.NDArray[np.float64]:
    """Sums ``values`` (shaped like the member's tensor) over all but the positions of each channel: [n_channels]."""
    rest = [d for d in range(values.dim()) if d != member.dim]
    flat = values.double().sum(rest) if rest else values.double()
    found: npt.NDArray[np.float64] = flat.cpu().numpy()[member.index].sum(1)
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
        found = []
        for group in groups:
            total = np.zeros(len(group))
            for m in weighing(group):
                total += along(m, network.tensor(m.tensor).detach().double().abs() ** power)
            found.append(total)
        return found

    return score


@dataclass(frozen=True)
class Reader:
    """A convolution or linear call that reads a group's channels: from which node, which axis, which positions."""

    node: str
    axis: int
    index: Ints


def readers(network: Network, groups: Sequence[AxisGroup]) -> list[list[Reader]]:
    """Who reads every group's channels. Readers that take whole groups of channels count where their result is read."""
    calls: dict[str, list[Node]] = {}
    for node in network.calls(*WEIGHTED):
        name = weight_name(node)
        for tied in network.tied_names(name) if name is not None else ():
            calls.setdefault(tied, []).append(node)
    found = []
    for group in groups:
        mine = []
        for m in group.members:
            for n in calls.get(m.tensor, ()):
                if m.dim != (0 if n.target in TRANSPOSED else 1):
                    continue
                blocks = np.arange(int(schema_argument(n, "groups")) if n.target in CONVOLUTIONS and m.dim else 1)
                width = network.tensor(m.tensor).shape[m.dim]
                index = (m.index[:, :, None] + blocks * width).reshape(len(group), -1)
                mine.append(Reader(str(n.args[0]), 1 if n.target in CONVOLUTIONS else -1, index))
        found.append(mine)
    return found


def taylor(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """Squared first-order change of the loss when nobody hears a channel: (sum of x dL/dx)^2, averaged over samples.

    x are the channel's values where convolutions and linear layers read them; readers and places are summed before the
    square. This is Molchanov et al. 2019, eq. 8, for the weights that read the channel (sum of w dL/dw = sum of
    x dL/dx), taken sample by sample. The first axis of a value counts as samples.
    """
    task.require("calibration", "loss")
    assert task.loss is not None
    if not groups:
        return []
    work = network.copy().eval()
    for parameter in work.parameters():
        parameter.requires_grad_(True)
    found = readers(work, groups)
    device = next((t.device for t in work.tensors().values()), torch.device("cpu"))
    total, count = [np.zeros(len(g)) for g in groups], 0
    for inputs, target in task.batches("calibration", BATCHES):
        values: dict[str, Tensor] = {}
        taps = {r.node: partial(values.__setitem__, r.node) for mine in found for r in mine}
        with torch.enable_grad(), work.taps(taps):
            loss = task.loss(call(work, move(inputs, device)), move(target, device))
            values = {n: v for n, v in values.items() if v.requires_grad}
            slopes = torch.autograd.grad(loss, list(values.values()), allow_unused=True) if values else ()
        change = {n: (x * s).detach() for (n, x), s in zip(values.items(), slopes, strict=True) if s is not None}
        for t, group, mine in zip(total, groups, found, strict=True):
            t += _squares(group, [(change[r.node], r) for r in mine if r.node in change])
        count += 1
    return [t / max(count, 1) for t in total]


def _squares(group: AxisGroup, change: list[tuple[Tensor, Reader]]) -> npt.NDArray[np.float64]:
    """Mean over samples of the squared sum over readers and places: [n_channels]."""
    total: dict[int, npt.NDArray[np.float64]] = {}
    for x, reader in change:
        axis = reader.axis % x.dim()
        places = [d for d in range(1, x.dim()) if d != axis]
        flat = (x.sum(places) if places else x).double().cpu().numpy()
        own = flat[:, reader.index].sum(2)
        total[len(own)] = total.get(len(own), 0.0) + own
    return sum(((t ** 2).mean(0) for t in total.values()), start=np.zeros(len(group)))


#: scores whose groups can be compared as they are: they are all changes of one loss
COMPARABLE = {"random", "taylor"}
#: name -> score; add one of your own under a new name
SCORES: dict[str, Score] = {"random": random, "l1": norm(1), "l2": norm(2), "taylor": taylor}
