"""One option for each item, so that the sum of damages is least while the sum of costs stays within a budget.

The multiple-choice knapsack (Kellerer, Pferschy and Pisinger 2004, "Knapsack problems", chapter 11), solved exactly:
the relaxation of Lagrange gives a bound and a first choice, dynamic programming over undominated partial sums the rest,
with every partial sum left out whose bound is no better than the best choice known (Dyer, Riha and Walker 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Options = list[tuple[Floats, Floats]]
#: partial sums that are kept after an item; beyond, the choice may be off by no more than its ``gap``
HELD = 1 << 16
#: what sums of floats may be off by, of themselves
EXACT = 1e-12


@dataclass(frozen=True)
class Choice:
    """``picks[i]``: the option of item i. gap: no choice within the budget has a damage below damage - gap; 0 where
    it is certain to be the least."""

    picks: tuple[int, ...]
    damage: float
    cost: float
    gap: float = 0.0


def choose(damages: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float,
           held: int = HELD) -> Choice:
    """The option of every item with the least sum of ``damages[i][k]``, ``costs[i][k]`` summing to at most ``budget``.

    Of equal damages the cheaper; deterministic. held: partial sums kept at once, which bounds the time.
    Raises ValueError where nothing is within the budget, or a number is not finite.
    """
    options: Options = [(np.asarray(d, np.float64), np.asarray(c, np.float64))
                        for d, c in zip(damages, costs, strict=True)]
    if not all(len(d) == len(c) > 0 and np.isfinite(d).all() and np.isfinite(c).all() for d, c in options):
        raise ValueError("every item takes as many finite damages as costs, and at least one")
    least = sum(float(c.min()) for _, c in options)
    slack = EXACT * max(1.0, *(float(abs(c).sum()) for _, c in options)) if options else 0.0
    if least > budget + slack:
        raise ValueError(f"the cheapest options cost {least}, which is above the budget {budget}")
    budget += slack
    price, first = _relaxed(options, budget)
    exact, whole = _searched(options, budget, price, first, held)
    picks = exact if exact is not None else first
    damage, cost = _sums(options, picks)
    bound = sum(float((d + price * c).min()) for d, c in options) - price * budget
    return Choice(tuple(int(k) for k in picks), damage, cost, 0.0 if whole else max(damage - bound, 0.0))


def _sums(options: Options, picks: Ints) -> tuple[float, float]:
    return (sum(float(d[k]) for (d, _), k in zip(options, picks, strict=True)),
            sum(float(c[k]) for (_, c), k in zip(options, picks, strict=True)))


def _hull(damages: Floats, costs: Floats) -> list[int]:
    """Options on the lower convex hull of (cost, damage), from the cheapest to the least damage."""
    hull: list[int] = []
    for k in np.lexsort((damages, costs)):
        if hull and damages[k] >= damages[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            if (damages[a] - damages[b]) * (costs[k] - costs[b]) > (damages[b] - damages[k]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(int(k))
    return hull


def _relaxed(options: Options, budget: float) -> tuple[float, Ints]:
    """The price of a unit of cost at which the relaxation meets the budget, and a choice within the budget: steps along
    all hulls, those that save most damage for their cost first."""
    hulls = [_hull(d, c) for d, c in options]
    steps = sorted((-(d[a] - d[b]) / (c[b] - c[a]), i, j)
                   for i, ((d, c), hull) in enumerate(zip(options, hulls, strict=True))
                   for j, (a, b) in enumerate(pairwise(hull)))
    at = [0] * len(options)
    spent = sum(float(c[h[0]]) for (_, c), h in zip(options, hulls, strict=True))
    price: float | None = None
    for slope, i, j in steps:
        costs, hull = options[i][1], hulls[i]
        more = float(costs[hull[j + 1]] - costs[hull[at[i]]])
        if spent + more <= budget:
            at[i], spent = j + 1, spent + more
        elif price is None:
            price = -float(slope)
    return price or 0.0, np.array([h[j] for h, j in zip(hulls, at, strict=True)], np.int64)


def _searched(options: Options, budget: float, price: float, first: Ints, held: int) -> tuple[Ints | None, bool]:
    """The best choice below ``first``, None if there is none; and whether nothing was left out unseen."""
    known, known_cost = _sums(options, first)
    rest_cost = np.append(np.cumsum([c.min() for _, c in options][::-1])[::-1], 0.0)
    priced = np.append(np.cumsum([(d + price * c).min() for d, c in options][::-1])[::-1], 0.0)
    damage, cost = np.zeros(1), np.zeros(1)
    trace: list[tuple[Ints, Ints]] = []
    whole = True
    for i, (d, c) in enumerate(options):
        damages, costs = (damage[:, None] + d).ravel(), (cost[:, None] + c).ravel()
        bound = damages + price * costs + priced[i + 1] - price * budget
        close = EXACT * max(1.0, abs(known), price * abs(budget))
        kept = np.flatnonzero((costs + rest_cost[i + 1] <= budget) & (bound <= known + close))
        kept = kept[np.lexsort((damages[kept], costs[kept]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(damages[kept])[:-1]]) if len(kept) else damages[kept]
        kept = kept[damages[kept] < before]
        if len(kept) > held:
            whole = False
            kept = np.sort(kept[np.argsort(bound[kept], kind="stable")[:held]])
        if not len(kept):
            return None, whole
        trace.append((kept // len(d), kept % len(d)))
        damage, cost = damages[kept], costs[kept]
    best = int(np.lexsort((cost, damage))[0]) if options else 0
    if not options or (damage[best], cost[best]) >= (known, known_cost):
        return None, whole
    picks = np.zeros(len(options), np.int64)
    for i in range(len(options) - 1, -1, -1):
        above, option = trace[i]
        picks[i], best = option[best], int(above[best])
    return picks, whole


__all__ = ["Choice", "choose"]
