"""How much each group of channels matters: damage as more and more of one group is silenced, all others whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featherweight.axes.groups import AxisGroup, AxisGroups
from featherweight.errors import RecipeError, did_you_mean
from featherweight.judge.bench import Form, standing
from featherweight.judge.damage import Judge, damages
from featherweight.network import Network
from featherweight.steps.moved import tell
from featherweight.task import Task

#: shares of a group that a curve is drawn of, and those that an allocation is content with
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FEW_SHARES = (0.25, 0.5, 0.75, 0.9)
#: calibration batches that each point reads
BATCHES = 2
KINDS = ("output", "loss")


@dataclass(frozen=True)
class Curve:
    """One group's sensitivity. ``changes[i]``: what silencing the ``shares[i]`` lowest-scoring channels changes.

    kind: "output" (|y' - y|^2 / |y|^2 over all floating-point outputs) or "loss" (the loss less that of the whole
    network). channels: how many the group has.

    Example:
        >>> curve = fw.prune.Curve("conv1", shares=(0.25, 0.5), changes=(0.01, 0.08), kind="output", channels=16)
        >>> dict(zip(curve.shares, curve.changes))
        {0.25: 0.01, 0.5: 0.08}
    """

    group: str
    shares: tuple[float, ...]
    changes: tuple[float, ...]
    kind: str
    channels: int


def curves(network: Network, task: Task, groups: Sequence[AxisGroup], scores: Sequence[npt.NDArray[np.float64]],
           shares: Sequence[float] = SHARES, batches: int = BATCHES, kind: str = "output") -> tuple[Curve, ...]:
    """The curve of every group, on ``batches`` calibration batches: len(groups) * len(shares) * batches passes at most,
    each from where the group is first read.

    scores: [n_channels] of each group. A silenced channel's weights are read as zeros; nothing is re-estimated.
    kind="output" needs no loss, and its curves are smoother: a loss hardly moves where it is near zero.
    Raises RecipeError for an unknown kind, TaskError without calibration data or, for kind="loss", without a loss.
    """
    if kind not in KINDS:
        raise RecipeError(f"sensitivity was given kind={kind!r}; {did_you_mean(kind, KINDS)}; write kind=\"output\"")
    counts = [[len(lowest(mine, share)) for share in shares] for mine in scores]
    forms = {(group.name, count): silence(network, group, np.argsort(mine, kind="stable")[:count])
             for group, mine, own in zip(groups, scores, counts, strict=True) for count in own}
    found = dict(zip(forms, damages(network, task, list(forms.values()), Judge(kind, "calibration", batches)),
                     strict=True))
    return tuple(Curve(group.name, tuple(shares), tuple(found[group.name, c] for c in own), kind, len(group))
                 for group, own in zip(groups, counts, strict=True))


def sensitivity(network: Network, task: Task, axes: AxisGroups, groups: Sequence[AxisGroup],
                scores: Sequence[npt.NDArray[np.float64]], shares: Sequence[float] = SHARES, batches: int = BATCHES,
                kind: str = "output") -> tuple[Curve, ...]:
    """``curves`` as version 0.1 had it; ``fw.sensitivity`` measures every family."""
    tell("featherweight.prune.sensitivity", 'fw.sensitivity(network, task, "prune.channels", measure=...)')
    return curves(network, task, groups, scores, shares, batches, kind)


def lowest(scores: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.int64]:
    """The channels of the lowest scores, this share of a group."""
    return np.argsort(scores, kind="stable")[:round(share * len(scores))]


def silence(network: Network, group: AxisGroup, channels: npt.NDArray[np.int64]) -> Form:
    """The form in which the graph reads the tensors of these channels as zeros: it computes what a cut would."""
    places: dict[str, list[tuple[int, Tensor]]] = {}
    for m in group.members:
        index = torch.from_numpy(m.index[channels].ravel()).to(network.tensor(m.tensor).device)
        places.setdefault(m.tensor, []).append((m.dim, index))
    return Form({name: partial(_masked, where) for name, where in places.items()})


def _masked(where: list[tuple[int, Tensor]], tensor: Tensor) -> Tensor:
    for dim, index in where:
        tensor = tensor.index_fill(dim, index, 0)
    return tensor


def silenced(network: Network, group: AxisGroup, channels: npt.NDArray[np.int64]) -> AbstractContextManager[None]:
    """For a while, these channels of ``network`` are silent."""
    return standing(network, silence(network, group, channels))
