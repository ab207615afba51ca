"""Codebooks of scalars under weights and a price on bits.

Every value is to cost least: importance * (value - entry)^2 + price * bits(entry), where an entry that a share p of the
values has takes -log2(p) bits. Entries and values settle in turns (entropy-constrained quantization: Chou, Lookabaugh
and Gray 1989; with importances: Choi et al. 2017, "Towards the limit of network quantization", eq. 7 and 13).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.numerics.kmeans import kmeans

#: numbers of a table [values, entries] that is held at once
HELD = 1 << 22
STARTS = ("linear", "density")


@dataclass(frozen=True)
class Coded:
    """codebook [k], ascending (after a held zero), in the dtype of the values; index: their shape, uint8. damage:
    the sum of importance * (value - entry)^2. bits: the sum of -log2 of the shares of the entries."""

    codebook: Tensor
    index: Tensor
    damage: float
    bits: float


def coded(values: Tensor, clusters: int, *, importance: Tensor | None = None, price: float = 0.0,
          start: str = "linear", hold_zero: bool = False, rounds: int = 40) -> Coded:
    """The codebook and index of ``values`` (any shape, finite), at most ``clusters`` entries, the cost least as found.

    importance: of each value, at least 0, in the shape of ``values``; None: 1. price: of one bit, in the unit of
    importance * value^2. start: entries evenly between the smallest and the largest value ("linear"), or so that each
    stands for as much importance ("density"). hold_zero: entry 0 is exactly 0.0 and every exact zero has it; where
    ``price`` is above 0, other values may take it too. Deterministic.
    """
    if importance is None and not price and start == "linear":
        return _measured(values, *kmeans(values, clusters, hold_zero=hold_zero))
    flat = values.detach().reshape(-1).double()
    h = torch.ones_like(flat) if importance is None else importance.detach().reshape(-1).double()
    held = (flat == 0) if hold_zero else torch.zeros_like(flat, dtype=torch.bool)
    free = flat[~held]
    if not len(free):
        return _measured(values, values.new_zeros(1), torch.zeros(values.shape, dtype=torch.uint8), importance)
    entries = _started(free, h[~held], clusters - hold_zero, start)
    if hold_zero:
        entries = torch.cat([entries.new_zeros(1), entries])
    lengths = torch.zeros_like(entries)
    index = torch.zeros_like(flat, dtype=torch.int64)
    for _ in range(rounds):
        before = index
        index = _cheapest(flat, h, entries, lengths, price, held)
        counts = torch.bincount(index, minlength=len(entries))
        used = counts > 0
        used[0] |= hold_zero
        index = (torch.cumsum(used, 0) - 1)[index]
        entries, counts = entries[used], counts[used]
        lengths = -torch.log2(counts.clamp_min(1).double() / len(flat))
        mass = torch.bincount(index, h, minlength=len(entries))
        means = torch.bincount(index, h * flat, minlength=len(entries)) / mass.clamp_min(1e-300)
        entries = torch.where(mass > 0, means, entries)
        if hold_zero:
            entries[0] = 0.0
        if torch.equal(index, before):
            break
    return packed(values, entries, index.view(values.shape), hold_zero, importance)


def packed(values: Tensor, entries: Tensor, index: Tensor, hold_zero: bool, importance: Tensor | None = None) -> Coded:
    """The code of ``values`` by ``index`` (int64, their shape) into ``entries``, ascending and without those that no
    value has; entry 0 stays where it is held."""
    used = torch.bincount(index.reshape(-1), minlength=len(entries)) > 0
    used[0] |= hold_zero
    ascending = int(hold_zero) + torch.argsort(entries[int(hold_zero):])
    order = torch.cat([torch.arange(int(hold_zero)), ascending])
    order = order[used[order]]
    place = torch.empty_like(used, dtype=torch.int64)
    place[order] = torch.arange(len(order))
    made = place[index].to(torch.uint8 if len(order) <= 256 else torch.int16)
    return _measured(values, entries[order].to(values.dtype), made, importance)


def _started(free: Tensor, importance: Tensor, clusters: int, start: str) -> Tensor:
    distinct: Tensor = torch.unique(free)
    if len(distinct) <= clusters:
        return distinct
    if start == "linear":
        return torch.linspace(float(distinct[0]), float(distinct[-1]), clusters, dtype=torch.float64)
    ordered, order = torch.sort(free)
    below = importance[order].cumsum(0)
    places = (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters * below[-1]
    found: Tensor = torch.unique(ordered[torch.searchsorted(below, places).clamp_max(len(free) - 1)])
    return found


def _cheapest(values: Tensor, importance: Tensor, entries: Tensor, lengths: Tensor, price: float,
              held: Tensor) -> Tensor:
    """Each value's entry of the least cost; entry 0 of those that are ``held``."""
    step = max(1, HELD // len(entries))
    parts = [(h[:, None] * (x[:, None] - entries).square() + price * lengths).argmin(1)
             for x, h in zip(torch.split(values, step), torch.split(importance, step), strict=True)]
    return torch.cat(parts).masked_fill(held, 0)


def _measured(values: Tensor, codebook: Tensor, index: Tensor, importance: Tensor | None = None) -> Coded:
    away = (codebook[index.long()].double() - values.detach().double()).square()
    damage = float((away if importance is None else importance.double() * away).sum())
    counts = torch.bincount(index.reshape(-1).long())
    counts = counts[counts > 0].double()
    return Coded(codebook, index, damage, float(-(counts * (counts / counts.sum()).log2()).sum()))


__all__ = ["STARTS", "Coded", "coded", "packed"]
