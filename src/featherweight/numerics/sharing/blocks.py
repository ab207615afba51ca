"""k-means of vectors: the codebook of a weight cut into blocks (Gong et al. 2014; Stock et al. 2020, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

#: numbers of a table [vectors, entries] that is held at once
HELD = 1 << 22
ROUNDS = 30  #: of assigning and averaging at most


def block_codes(vectors: Tensor, entries: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codebook [k, d] and index [n] of ``vectors`` [n, d], at most ``entries``: the sum of importance * (value -
    entry)^2 is least as found.

    importance: of every number, [n, d], at least 0; None: 1. Entries start far from each other (k-means++: Arthur and
    Vassilvitskii 2007, with a generator of its own) and move by Lloyd's rule; one that no vector has begins again at
    the vector of the largest error. The cost never rises. Deterministic.
    """
    x = vectors.detach().double()
    h = torch.ones_like(x) if importance is None else importance.detach().double()
    table = _started(x, h, entries)
    index, before = torch.zeros(len(x), dtype=torch.int64, device=x.device), None
    for _ in range(ROUNDS):
        index, cost = _nearest(x, h, table)
        unused = (torch.bincount(index, minlength=len(table)) == 0).nonzero()[:, 0]
        worst = cost.topk(len(unused)).indices
        index[worst[cost[worst] > 0]] = unused[cost[worst] > 0]
        if before is not None and torch.equal(index, before):
            break
        before = index
        mass = torch.zeros_like(table).index_add_(0, index, h)
        sums = torch.zeros_like(table).index_add_(0, index, h * x)
        table = torch.where(mass > 0, sums / mass.clamp_min(1e-300), table)
    used, index = torch.unique(index, return_inverse=True)
    return table[used].to(vectors.dtype), index


def _started(x: Tensor, h: Tensor, entries: int) -> Tensor:
    """Vectors far from each other: each drawn by its cost under those before it."""
    generator = torch.Generator().manual_seed(0)
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen, cost = [first], (h * (x - x[first]).square()).sum(1)
    for _ in range(min(entries, len(x)) - 1):
        total = cost.cumsum(0)
        if not float(total[-1]):
            break
        drawn = torch.rand(1, generator=generator, dtype=torch.float64).to(x.device) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, drawn)), len(x) - 1))
        cost = torch.minimum(cost, (h * (x - x[chosen[-1]]).square()).sum(1))
    return x[chosen].clone()


def _nearest(x: Tensor, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The entry of the least cost for every vector, and these costs."""
    step, found, costs = max(1, HELD // len(table)), [], []
    for part, own in zip(torch.split(x, step), torch.split(h, step), strict=True):
        away = own @ table.square().T - 2 * (own * part) @ table.T
        least, index = away.min(1)
        found.append(index)
        costs.append((least + (own * part.square()).sum(1)).clamp_min(0))
    return torch.cat(found), torch.cat(costs)


__all__ = ["block_codes"]
