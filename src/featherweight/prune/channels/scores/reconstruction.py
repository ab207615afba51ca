"""The score "reconstruction": what the calls that read a channel lose of their outputs when it goes, refit as well as
can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from featherweight.axes.groups import AxisGroup
from featherweight.axes.labels import Ints
from featherweight.axes.readers import readers
from featherweight.calibrate.moments import inputs_of
from featherweight.network import Network
from featherweight.network.edit import CONVOLUTIONS, weight_name
from featherweight.network.matrices import as_matrix, count_rows, rows_at
from featherweight.numerics.least_squares import Moments, backward_selection, factor, reconstruction_errors
from featherweight.prune.channels.scores.data import unread
from featherweight.prune.channels.scores.weights import Floats, Scores
from featherweight.task import Task

#: calibration batches read at most
BATCHES = 16
#: samples of every batch, and of all their rows at most so many, that the second moments of one call's inputs are
#: taken of; chosen by chance
SAMPLES, ROWS = 8, 4096
#: pull of the refit towards the old weights, as a share of the inputs' mean square
RIDGE = 1e-3
#: from a call with more inputs (channels times window), an eighth of the channels left is taken at a time ...
STEPWISE = 1152
#: ... and one with still more is judged as if its inputs were uncorrelated
FITTED = 4608
#: numbers of second moments held at once
MEMORY = 1 << 28


def reconstruction(network: Network, task: Task, groups: Sequence[AxisGroup], seed: int) -> Scores:
    """Rise of the readers' squared output error when the channel goes and the weights of all others are refit, as a
    share of the variance of those outputs; summed over readers.

    Channels are taken out one after another, the cheapest first, and each counts what it cost at its turn (at least as
    much as those before it): the optimal brain surgeon (Hassibi & Stork 1993, eq. 5) on blocks, as in Kurtic et al.
    2023 ("ZipLM", section 3). Means are free: a bias or the next norm takes them up.
    """
    task.require("calibration")
    work = network.copy().eval()
    found = readers(work, groups)
    total = [np.zeros(len(g)) for g in groups]
    for calls in _portions(work, {r.call for mine in found for r in mine}):
        moments = _moments(work, task, calls, seed)
        for t, mine in zip(total, found, strict=True):
            for r in mine:
                if r.call in moments:
                    window = int(np.prod(work.tensor(r.weight).shape[2:]))
                    t += _errors(_matrix(work, work.node(r.call)), window, r.index, moments[r.call])
    return unread(network, task, groups, total)


def _matrix(network: Network, node: Node) -> Tensor:
    """The call's weight [g, o, p], float64."""
    return as_matrix(node, network.tensor(str(weight_name(node))).detach()).double()


def _portions(network: Network, calls: set[str]) -> Iterator[list[Node]]:
    """The calls in order, as many at once as memory allows."""
    portion: list[Node] = []
    held = 0
    for node in network.calls():
        if node.name not in calls:
            continue
        groups, _, width = _matrix(network, node).shape
        size = groups * width * (width if width <= FITTED else 1)
        if portion and held + size > MEMORY:
            yield portion
            portion, held = [], 0
        portion.append(node)
        held += size
    if portion:
        yield portion


def _moments(network: Network, task: Task, calls: Sequence[Node], seed: int) -> dict[str, Tensor]:
    """Call -> covariance of what its weight is multiplied with, [g, p, p]; of very wide calls its diagonal, [g, p]."""
    generator = torch.Generator().manual_seed(seed)
    found = {n.name: Moments() for n in calls}
    wide = {n.name for n in calls if _matrix(network, n).shape[2] > FITTED}
    for batch in task.batches("calibration", BATCHES):
        inputs = inputs_of(network, batch, calls)
        for node in calls:
            x = _some_rows(network, node, inputs[node.name], generator)
            x = x.mT.unsqueeze(-1) if node.name in wide else x
            found[node.name].add(x, x[..., :0])
    grams = {name: m.products()[0] for name, m in found.items() if m.count}
    return {name: gram[..., 0, 0] if name in wide else gram for name, gram in grams.items()}


def _some_rows(network: Network, node: Node, x: Tensor, generator: torch.Generator) -> Tensor:
    """[g, r, p]: ROWS of the rows that the call's weight is multiplied with, or all of a few samples."""
    weight = network.tensor(str(weight_name(node)))
    x = x if x.dim() >= weight.dim() else x[None]  # without a batch
    few = torch.randperm(x.shape[0], generator=generator)[:SAMPLES if node.target in CONVOLUTIONS else ROWS]
    x = x[few.to(x.device)]
    some = torch.randperm(count_rows(node, weight, x), generator=generator)[:ROWS]
    return rows_at(node, weight, x, some.to(x.device))


def _errors(weight: Tensor, window: int, index: Ints, moments: Tensor) -> Floats:
    """What each channel costs one reader, as a share of the variance of its outputs: [n_channels].

    weight [g, o, p]; index [n_channels, k]: the channels' positions among the g * p / window inputs; moments [g, p, p],
    or [g, p] where the inputs are taken as uncorrelated.
    """
    total = np.zeros(len(index))
    energy = float((weight * (weight @ moments if moments.dim() == 3 else weight * moments[:, None])).sum())
    if energy <= 0:
        return total
    each = weight.shape[2] // window
    for g in range(weight.shape[0]):
        inside = index // each == g
        for count in np.unique(inside.sum(1)):
            who = np.flatnonzero(inside.sum(1) == count)
            if count:
                places = (index[who][inside[who]] % each).reshape(len(who), -1)
                columns = torch.from_numpy((places[:, :, None] * window + np.arange(window)).reshape(len(who), -1))
                total[who] += _costs(weight[g], moments[g], columns.to(weight.device)).cpu().numpy() / energy
    return total


def _costs(weight: Tensor, moments: Tensor, columns: Tensor) -> Tensor:
    """Squared error that each block of ``columns`` [blocks, size] costs when the weights of all others are refit."""
    blocks, size = columns.shape
    flat = columns.flatten()
    if moments.dim() == 1:
        return (weight ** 2 * moments)[:, flat].sum(0).view(blocks, size).sum(1)
    own = moments[flat][:, flat]
    if len(flat) < len(moments):  # what the inputs of others cannot say of these
        inverse = torch.cholesky_inverse(factor(moments, RIDGE))[flat][:, flat]
        own = torch.cholesky_inverse(factor(inverse, 0.0))
    cross = own @ weight[:, flat].mT
    if len(flat) > STEPWISE:
        return _in_rounds(own, cross, size)
    order, rises = backward_selection(own, cross, size, RIDGE)
    found = torch.empty_like(rises)
    found[order] = rises.clamp(min=0).cummax(0).values
    return found


def _in_rounds(gram: Tensor, cross: Tensor, size: int) -> Tensor:
    """``backward_selection`` where the cheapest eighth of all blocks left goes at once: about three times the work of
    one inversion."""
    left = torch.arange(gram.shape[0] // size, device=gram.device)
    found, floor = torch.zeros(len(left), dtype=torch.float64, device=gram.device), 0.0
    while len(left):
        columns = (left[:, None] * size + torch.arange(size, device=gram.device)).flatten()
        rises = reconstruction_errors(gram[columns][:, columns], cross[columns], size, RIDGE)
        order = rises.argsort(stable=True)
        going = order[:max(1, len(left) // 8)]
        found[left[going]] = rises[going].clamp(min=floor)
        floor = float(found[left[going]].max())
        left = left[order[len(going):]]
    return found
