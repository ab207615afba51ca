"""How much each group of channels matters: the loss as more and more of one group is silenced, all others whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featherweight.axes.groups import AxisGroup, AxisGroups
from featherweight.errors import RecipeError, did_you_mean
from featherweight.network import Network, trees
from featherweight.network.devices import device_of
from featherweight.numerics.change import relative_change
from featherweight.task import Batch, Predict, Task, call, move

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
    """

    group: str
    shares: tuple[float, ...]
    changes: tuple[float, ...]
    kind: str
    channels: int


def sensitivity(network: Network, task: Task, axes: AxisGroups, groups: Sequence[AxisGroup],
                scores: Sequence[npt.NDArray[np.float64]], shares: Sequence[float] = SHARES, batches: int = BATCHES,
                kind: str = "output") -> tuple[Curve, ...]:
    """The curve of every group, on ``batches`` calibration batches: len(groups) * len(shares) * batches passes.

    scores: [n_channels] of each group. A silenced channel's weights are read as zeros; nothing is re-estimated.
    kind="output" needs no loss, and its curves are smoother: a loss hardly moves where it is near zero.
    Raises RecipeError for an unknown kind, TaskError without calibration data or, for kind="loss", without a loss.
    """
    if kind not in KINDS:
        raise RecipeError(f"sensitivity was given kind={kind!r}; {did_you_mean(kind, KINDS)}; write kind=\"output\"")
    task.require("calibration", *(["loss"] if kind == "loss" else []))
    work = network.copy().eval()
    device = device_of(work)
    data = [(move(x, device), move(y, device)) for x, y in task.batches("calibration", batches)]
    found = []
    with torch.no_grad():
        whole, again = [call(work, x) for x, _ in data], work.replay()
        for group, mine in zip(groups, scores, strict=True):
            order = np.argsort(mine, kind="stable")
            counts = [round(share * len(group)) for share in shares]
            changes = {}
            for count in dict.fromkeys(counts):
                with silenced(work, group, order[:count]):
                    changes[count] = _change(again, task, data, whole, kind)
            found.append(Curve(group.name, tuple(shares), tuple(changes[c] for c in counts), kind, len(group)))
    return tuple(found)


def _change(work: Predict, task: Task, data: Sequence[Batch], whole: Sequence[Any], kind: str) -> float:
    total = 0.0
    for (x, y), before in zip(data, whole, strict=True):
        after = call(work, x)
        if kind == "loss":
            assert task.loss is not None
            total += float(task.loss(after, y)) - float(task.loss(before, y))
        else:
            total += relative_change(trees.floats(after), trees.floats(before))
    return total / max(len(data), 1)


@contextmanager
def silenced(network: Network, group: AxisGroup, channels: npt.NDArray[np.int64]) -> Iterator[None]:
    """For a while, the graph reads the tensors of these channels as zeros: it computes what a cut would."""
    places: dict[str, list[tuple[int, Tensor]]] = {}
    for m in group.members:
        index = torch.from_numpy(m.index[channels].ravel()).to(network.tensor(m.tensor).device)
        for name in network.tied_names(m.tensor):
            places.setdefault(name, []).append((m.dim, index))

    def masked(where: list[tuple[int, Tensor]], tensor: Tensor) -> Tensor:
        for dim, index in where:
            tensor = tensor.index_fill(dim, index, 0)
        return tensor

    taps: dict[str, Callable[[Any], Any]] = {
        n.name: partial(masked, places[str(n.target)])
        for n in network.graph.nodes if n.op == "get_attr" and str(n.target) in places}
    with network.taps(taps):
        yield
