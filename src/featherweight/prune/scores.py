"""How much a channel matters: one number per channel of every axis group, higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featherweight.network import Network
from featherweight.prune.axes import AxisGroup, Member
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


def taylor(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """Squared first-order change of the loss when a channel's weights go to zero: (sum of w dL/dw)^2, averaged over
    calibration batches (Molchanov et al. 2019, eq. 8), summed over the group's members."""
    task.require("calibration", "loss")
    assert task.loss is not None
    work = network.copy().eval()
    names = sorted({m.tensor for g in groups for m in weighing(g)})
    weights = [work.tensor(n).requires_grad_(True) for n in names]
    total = [np.zeros(len(g)) for g in groups]
    count = 0
    for inputs, target in task.batches("calibration", BATCHES):
        device = weights[0].device if weights else torch.device("cpu")
        with torch.enable_grad():
            loss = task.loss(call(work, move(inputs, device)), move(target, device))
            grads = torch.autograd.grad(loss, weights, allow_unused=True) if weights else ()
        products = {n: w.detach() * g for n, w, g in zip(names, weights, grads, strict=True) if g is not None}
        for t, group in zip(total, groups, strict=True):
            for m in weighing(group):
                if m.tensor in products:
                    t += along(m, products[m.tensor]) ** 2
        count += 1
    return [t / max(count, 1) for t in total]


#: name -> score; add one of your own under a new name
SCORES: dict[str, Score] = {"random": random, "l1": norm(1), "l2": norm(2), "taylor": taylor}
