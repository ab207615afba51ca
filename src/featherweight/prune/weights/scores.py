"""How much a single weight matters: name of a score -> one number per weight, as matrices [o, i], higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from featherweight.calibrate.moments import input_norms, second_moments
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.network.matrices import as_matrix
from featherweight.numerics.obs import inverse_factor
from featherweight.task import Batch, Task, batch_size, call, move

Calls = Mapping[str, Sequence[Node]]
Matrices = dict[str, Tensor]
#: (network, task, weight's name -> its calls, seed) -> name -> scores [o, i]
WeightScore = Callable[[Network, Task, Calls, int], Matrices]
#: calibration batches that a score reads at most, and single samples for "fisher"
BATCHES, SAMPLES = 16, 256
#: numbers of Hessians held at once
HELD = 1 << 27


def matrix(network: Network, name: str, calls: Calls) -> Tensor:
    """The weight as [o, i] on the CPU, float64; what one output reads lies in one row."""
    return as_matrix(calls[name][0], network.tensor(name).detach()).flatten(0, 1).double().cpu()


def magnitude(network: Network, task: Task, calls: Calls, seed: int) -> Matrices:
    """|w| (Han et al. 2015)."""
    return {n: matrix(network, n, calls).abs() for n in calls}


def random(network: Network, task: Task, calls: Calls, seed: int) -> Matrices:
    """Uniform noise: the baseline that every score has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(matrix(network, n, calls).shape, generator=generator, dtype=torch.float64) for n in calls}


def wanda(network: Network, task: Task, calls: Calls, seed: int) -> Matrices:
    """|w| ||x||_2, x the weight's input over the calibration data (Sun et al. 2023, eq. 1), divided by the tensor's
    mean so that tensors can be ranked together. The paper compares within ``allocation="output"``."""
    norms = input_norms(network, task.batches("calibration", BATCHES), calls) if calls else {}
    found = {}
    for name in calls:
        weight = network.tensor(name).detach().double()
        scores = as_matrix(calls[name][0], weight.abs() * norms.pop(name)).flatten(0, 1).cpu()
        found[name] = scores / scores.mean().clamp_min(1e-30)
    return found


def taylor(network: Network, task: Task, calls: Calls, seed: int) -> Matrices:
    """|w dL/dw|, the first-order change of the calibration loss when the weight goes (Lee et al. 2019, eq. 4)."""
    total = {n: torch.zeros_like(matrix(network, n, calls)) for n in calls}
    for gradients, count in _gradients(network, task, calls, task.batches("calibration", BATCHES)):
        total = {n: t + gradients[n] * count for n, t in total.items()}
    return {n: (t * matrix(network, n, calls)).abs() for n, t in total.items()}


def fisher(network: Network, task: Task, calls: Calls, seed: int) -> Matrices:
    """w^2 E[(dL/dw)^2] / 2 over single samples: LeCun et al. 1990, eq. 5, the Hessian's diagonal replaced by the
    empirical Fisher information (Theis et al. 2018, eq. 6).

    The first ``SAMPLES`` samples are read; a network of fixed batch is told of whole batches only.
    """
    total, count = {n: torch.zeros_like(matrix(network, n, calls)) for n in calls}, 0
    for gradients, _ in _gradients(network, task, calls, _singles(network, task)):
        total = {n: t + gradients[n].square() for n, t in total.items()}
        count += 1
    return {n: matrix(network, n, calls).square() * t / (2 * max(count, 1)) for n, t in total.items()}


def obs(network: Network, task: Task, calls: Calls, seed: int) -> Matrices:
    """w^2 / [H^-1]_jj, the rise of the layer's squared error when the weight goes and others make up for it (Hassibi
    & Stork 1993, eq. 5), H from calibration inputs; divided by the squares of the layer's outputs, so that tensors can
    be ranked together."""
    found = {}
    for part in _held(network, calls):
        moments = second_moments(network, task.batches("calibration", BATCHES), part)
        for name, hessian in moments.items():
            weight = as_matrix(calls[name][0], network.tensor(name).detach()).double()
            upper = inverse_factor(hessian, 0.01)
            scores = weight.square() / upper.square().sum(-2)[:, None]
            size = (weight @ hessian * weight).sum().clamp_min(1e-30)
            found[name] = (scores / size).flatten(0, 1).cpu()
    return {n: found[n] for n in calls}


def _held(network: Network, calls: Calls) -> Iterator[dict[str, Sequence[Node]]]:
    """The calls in parts whose Hessians may be held together."""
    part: dict[str, Sequence[Node]] = {}
    held = 0
    for name, mine in calls.items():
        shape = as_matrix(mine[0], network.tensor(name)).shape
        size = shape[0] * shape[2] ** 2
        if part and held + size > HELD:
            yield part
            part, held = {}, 0
        part[name] = mine
        held += size
    if part:
        yield part


def _gradients(network: Network, task: Task, calls: Calls, batches: Iterator[Batch]) -> Iterator[tuple[Matrices, int]]:
    """Gradients [o, i] of the mean loss of each batch, and how many samples that had."""
    task.require("calibration", "loss")
    assert task.loss is not None
    work = network.copy().eval()
    for parameter in work.parameters():
        parameter.requires_grad_(False)
    weights = [work.tensor(n).requires_grad_(True) for n in calls]
    device = device_of(work)
    for inputs, target in batches:
        with torch.enable_grad():
            loss = task.loss(call(work, move(inputs, device)), move(target, device))
        unread = [None] * len(weights)
        found = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else unread
        whole = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        yield {n: as_matrix(calls[n][0], g.detach()).flatten(0, 1).double().cpu()
               for n, g in zip(calls, whole, strict=True)}, batch_size(inputs)


def _singles(network: Network, task: Task) -> Iterator[Batch]:
    """The calibration data sample by sample, where the network takes any batch."""
    free = network.signature.dynamic_batch
    left = SAMPLES
    for batch in task.batches("calibration"):
        size = batch_size(batch[0])
        if not free:
            yield batch
            left -= size
        for index in range(min(size, left) if free else 0):
            yield _sample(batch, index, size)
            left -= 1
        if left <= 0:
            return


def _sample(batch: Batch, index: int, size: int) -> Batch:
    def one(tensor: Tensor) -> Tensor:
        return tensor[index:index + 1] if tensor.dim() and tensor.shape[0] == size else tensor

    found: Any = tree_map_only(Tensor, one, batch)
    return found[0], found[1]


#: name -> score; add one of your own under a new name
WEIGHT_SCORES: dict[str, WeightScore] = {
    "magnitude": magnitude, "random": random, "wanda": wanda, "taylor": taylor, "fisher": fisher, "obs": obs}
#: scores of what a layer is given
READ_INPUTS = ("wanda", "obs")
#: name -> what of the task a score reads
NEEDS: dict[str, tuple[str, ...]] = {
    "wanda": ("calibration",), "taylor": ("calibration", "loss"), "fisher": ("calibration", "loss"),
    "obs": ("calibration",)}
