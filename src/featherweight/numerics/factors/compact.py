"""Compact filters: a trained kernel [o, i, *k] as few filters and cheap ones, the nearest of each kind.

A gram [i * k, i * k] says what the kernel is multiplied with, so that errors are those of outputs; without one all
inputs count alike.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from featherweight.numerics import lowrank
from featherweight.numerics.factors.forms import weighed, without_root
from featherweight.numerics.least_squares import refit

RIDGE = 1e-6


@dataclass(frozen=True)
class Shift:
    """Every input channel moved by one offset or several, then a 1 x 1 kernel. Wu et al. 2018, "Shift", section 3.

    moves: [terms * i, 1, *k], one 1 in each, as the kernel of a depthwise convolution; point: [o, terms * i].
    """

    moves: Tensor
    point: Tensor


@dataclass(frozen=True)
class Fire:
    """1 x 1 to few channels, then k x k for some outputs and 1 x 1 for the others. Iandola et al. 2016, section 3.2,
    without the ReLU between.

    squeeze: [r, i]; point: [m, r], of the outputs ``few``; wide: [o - m, r, *k], of the outputs ``many``.
    """

    squeeze: Tensor
    point: Tensor
    wide: Tensor
    few: Tensor
    many: Tensor


@dataclass(frozen=True)
class Ghost:
    """Some filters as they are, the other outputs made of theirs by one small filter each. Han et al. 2020, eq. 3.

    primary: which outputs keep their filter; ghosts: the others; base: for each ghost the number, among ``primary``, of
    the output that it is made of; cheap: [ghosts, 1, *size]. error: squared, over the square of all kernels.
    """

    primary: Tensor
    ghosts: Tensor
    base: Tensor
    cheap: Tensor
    error: float


def shift(kernel: Tensor, terms: int = 1, gram: Tensor | None = None) -> Shift:
    """For each input channel the ``terms`` offsets of the largest part of the output, then least squares."""
    i, window = kernel.shape[1], kernel[0, 0].numel()
    flat = kernel.double().flatten(1)
    full = torch.eye(i * window, dtype=torch.float64) if gram is None else gram.double()
    strength = (flat.square().sum(0) * full.diagonal()).view(i, window)
    places = strength.topk(min(terms, window), 1).indices.sort(1).values
    chosen = (torch.arange(i)[:, None] * window + places).flatten()
    own = full[chosen][:, chosen]
    point = refit(own, full[chosen] @ flat.T, flat[:, chosen], RIDGE)
    moves = torch.zeros(len(chosen), window, dtype=kernel.dtype)
    moves[torch.arange(len(chosen)), places.flatten()] = 1
    return Shift(moves.view(-1, 1, *kernel.shape[2:]), point.to(kernel.dtype))


def of_shift(made: Shift, inputs: int) -> Tensor:
    """The kernel [o, i, *k] that it stands for, of ``inputs`` channels."""
    found = made.point[:, :, None] * made.moves.flatten(1)  # [o, terms * i, k]
    summed = found.view(len(found), inputs, -1, found.shape[2]).sum(2)
    return summed.view(*summed.shape[:2], *made.moves.shape[2:])


def fire(kernel: Tensor, rank: int, share: float = 0.5, gram: Tensor | None = None) -> Fire:
    """The outputs with the least energy off the centre, ``share`` of them, become 1 x 1; then the best of rank ``rank``
    over the input channels (Eckart and Young 1936)."""
    o, window = kernel.shape[0], kernel[0, 0].numel()
    made, root = weighed(kernel.double(), gram)
    taps = made.flatten(2)  # [o, i, k]
    off = taps.square().sum((1, 2)) - taps[:, :, window // 2].square().sum(1)
    order = off.argsort(stable=True)
    count = round(share * o)
    few, many = order[:count].sort().values, order[count:].sort().values
    rows = torch.cat([taps[few, :, window // 2], taps[many].transpose(1, 2).flatten(0, 1)])
    squeeze, expand = lowrank.split(rows, rank)
    wide = expand[count:].view(len(many), window, rank).transpose(1, 2).reshape(len(many), rank, *kernel.shape[2:])
    squeeze = without_root(squeeze, root)
    dtype = kernel.dtype
    return Fire(squeeze.to(dtype), expand[:count].to(dtype), wide.to(dtype), few, many)


def of_fire(made: Fire) -> Tensor:
    """The kernel [o, i, *k] that it stands for."""
    inputs, space = made.squeeze.shape[1], made.wide.shape[2:]
    found = made.squeeze.new_zeros(len(made.few) + len(made.many), inputs, math.prod(space))
    found[made.few, :, math.prod(space) // 2] = made.point @ made.squeeze
    found[made.many] = torch.einsum("ork,ri->oik", made.wide.flatten(2), made.squeeze)
    return found.view(-1, inputs, *space)


def ghost(kernel: Tensor, count: int, size: int = 3, stride: tuple[int, ...] | None = None,
          gram: Tensor | None = None) -> Ghost:
    """Primary filters by greed, ``count`` of them: each next one is that which, with the best small filter for each
    output that it serves, leaves the least squared error of all kernels; borders of images are left out of account."""
    made = weighed(kernel.double(), gram)[0]
    error, filters = _approximations(made, size, stride or (1,) * (kernel.dim() - 2))
    left = made.flatten(1).square().sum(1)
    chosen: list[int] = []
    for _ in range(count):
        total = torch.minimum(left, error).sum(1)
        total[chosen] = torch.inf
        chosen.append(int(total.argmin()))
        left = torch.minimum(left, error[chosen[-1]])
    primary = torch.tensor(sorted(chosen))
    ghosts = torch.tensor([j for j in range(len(kernel)) if j not in set(chosen)], dtype=torch.long)
    base = error[primary][:, ghosts].argmin(0)
    cheap = filters[primary[base], ghosts].view(-1, 1, *[size] * (kernel.dim() - 2))
    lost = error[primary[base], ghosts].sum() / made.square().sum()
    return Ghost(primary, ghosts, base, cheap.to(kernel.dtype), float(lost))


def _approximations(kernel: Tensor, size: int, stride: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """error [o, o]: squared, of each kernel (second axis) by the best small filter on each other (first axis); the
    filters [o, o, size^axes]. A small filter sees outputs, which lie ``stride`` inputs apart."""
    o, axes = kernel.shape[0], kernel.dim() - 2
    reach = [s * (size // 2) for s in stride]
    around = [r for along in reversed(reach) for r in (along, along)]
    targets = pad(kernel, around).flatten(1)  # [o, i * K]
    offsets = list(itertools.product(range(-(size // 2), size // 2 + 1), repeat=axes))
    energy = targets.square().sum(1)
    error, filters = kernel.new_empty(o, o), kernel.new_empty(o, o, len(offsets))
    for p in range(o):
        moved = torch.stack([_moved(kernel[p], [t * s for t, s in zip(offset, stride, strict=True)], reach)
                             for offset in offsets]).flatten(1)  # [t, i * K]
        gram, cross = moved @ moved.T, moved @ targets.T
        gram += RIDGE * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(offsets), dtype=gram.dtype)
        filters[p] = torch.linalg.solve(gram, cross).T
        error[p] = (energy - (filters[p] * cross.T).sum(1)).clamp(min=0)
    return error, filters


def _moved(kernel: Tensor, by: list[int], reach: list[int]) -> Tensor:
    """A kernel [i, *k] with zeros around it, ``reach`` on each side, moved by so many places."""
    around = [n for b, r in zip(reversed(by), reversed(reach), strict=True) for n in (r + b, r - b)]
    return pad(kernel, around)


__all__ = ["Fire", "Ghost", "Shift", "fire", "ghost", "of_fire", "of_shift", "shift"]
