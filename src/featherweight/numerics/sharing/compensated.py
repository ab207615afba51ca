"""Codebook indices column after column: the weights that are not decided yet make up for those that are.

The sweep of optimal brain surgery (``numerics/obs``; GPTQ: Frantar et al. 2023, algorithm 1), in which a weight takes
the entry of the least squared error of the outputs plus price of its bits: rate-constrained rounding as CERWU has it
(2025), by the lengths that an order-0 coder gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.numerics.obs import Decide, Rule, damped, sweep

SWEEPS = 3  #: the lengths of the entries are those of the sweep before
DAMP = 0.01  #: share of the mean diagonal that is added to the second moments


def compensated(aim: Tensor, gram: Tensor, entries: Tensor, index: Tensor, price: float,
                held: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Entries [k] and index [g, o, i] (int64) whose outputs come near those of ``aim`` [g, o, i].

    gram: [g, i, i], float64, the second moments of the inputs (about their means where a bias makes up for these).
    entries: [k]; index: [g, o, i], where the entries' shares of a code come from at first. price: of one bit, in the
    unit of aim^2 * gram. held: bool [g, o, i], weights that have entry 0, which is 0.0 and stays so; None: none has.
    Deterministic; columns with the largest inputs are decided first.
    """
    columns = gram.diagonal(dim1=-2, dim2=-1).mean(0).sort(descending=True, stable=True).indices
    turned_aim, turned_gram = aim[..., columns], gram[:, columns][:, :, columns]
    turned_held = None if held is None else held[..., columns]
    for _ in range(SWEEPS):
        counts = torch.bincount(index.reshape(-1), minlength=len(entries)).double()
        lengths = -torch.log2(counts.clamp_min(0.5) / counts.sum())
        found = torch.zeros_like(index)
        sweep(turned_aim, turned_gram, _cheapest(entries, price * lengths, turned_held, found), damp=DAMP)
        index = torch.empty_like(found)
        index[..., columns] = found
    return best_entries(aim, damped(gram, DAMP), entries, index, held is not None), index


def _cheapest(entries: Tensor, prices: Tensor, held: Tensor | None, found: Tensor) -> Decide:
    """Decides for the entry of the least cost; writes its place into ``found``, which is in the order of the sweep."""

    def decide(first: int, weights: Tensor, spread: Tensor) -> Rule:
        def rule(column: int, values: Tensor) -> Tensor:
            away = (values[..., None] - entries) / spread[..., column, None, None]
            chosen = (away.square() + prices).argmin(-1)
            if held is not None:
                chosen = chosen.masked_fill(held[..., first + column], 0)
            found[..., first + column] = chosen
            return entries[chosen]

        return rule

    return decide


def best_entries(aim: Tensor, gram: Tensor, entries: Tensor, index: Tensor, hold_zero: bool) -> Tensor:
    """The entries [k] of the least error tr((aim - E) gram (aim - E)^T), E = entries[index]; those that no weight has,
    and entry 0 where it is held, stay as they are.

    The normal equations: with M_a [g, o, i] = 1 where the index is a, the sum over b of <M_a gram, M_b> e_b is
    <aim gram, M_a>.
    """
    count, flat = len(entries), index.reshape(-1)
    wanted = torch.bincount(flat, (aim @ gram).reshape(-1), minlength=count)
    system = torch.stack([torch.bincount(flat, ((index == a).to(gram) @ gram).reshape(-1), minlength=count)
                          for a in range(count)])
    free = torch.bincount(flat, minlength=count) > 0
    free[0] &= not hold_zero
    at = free.nonzero()[:, 0]
    if not len(at):
        return entries
    square = damped(system[at][:, at], 1e-9)
    found = entries.clone()
    found[at] = torch.linalg.solve(square, wanted[at])
    return found


__all__ = ["best_entries", "compensated"]
