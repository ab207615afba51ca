"""One option for each item, so that the sum of damages is least while the sum of costs stays within a budget.

The multiple-choice knapsack (Kellerer, Pferschy and Pisinger 2004, "Knapsack problems", chapter 11), solved exactly:
the relaxation of Lagrange gives a bound and a first choice, dynamic programming over undominated partial sums the rest,
with every partial sum left out whose bound is no better than the best choice known (Dyer, Riha and Walker 1995).

Several budgets at once (section 11.10) are an integer programme that HiGHS solves by branch and bound over its linear
relaxation, whose bound is that of the relaxation of Lagrange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Options = list[tuple[Floats, Floats]]
Table = Sequence[Sequence[float]]
#: partial sums that are kept after an item; beyond, the choice may be off by no more than its ``gap``
HELD = 1 << 16
#: what sums of floats may be off by, of themselves
EXACT = 1e-12
#: nodes of the search tree under several budgets; beyond, the choice may be off by no more than its ``gap``
NODES = 20_000
#: what HiGHS lets a sum exceed its bound by, of the bound
TOLERANCE = 1e-6


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
    """The best choice below ``first``, None if there is none; and whether nothing was left out unseen.

    Options whose price alone takes them above ``first`` are left out beforehand (chapter 11.2); most items have one
    left then, and only the others are searched."""
    known, known_cost = _sums(options, first)
    close = EXACT * max(1.0, abs(known), price * abs(budget))
    over = [d + price * c - (d + price * c).min() for d, c in options]
    bound = sum(float((d + price * c).min()) for d, c in options) - price * budget
    left = [np.flatnonzero(o <= known - bound + close) for o in over]
    picks = np.array([mine[0] for mine in left], np.int64)
    open_items = [i for i, mine in enumerate(left) if len(mine) > 1]
    rest = [i for i, mine in enumerate(left) if len(mine) == 1]
    damage, cost = (np.array([total]) for total in _sums([options[i] for i in rest], picks[rest]))
    if not open_items and cost[0] > budget:
        return None, True
    found, whole = _summed([(options[i][0][left[i]], options[i][1][left[i]]) for i in open_items], damage, cost,
                           budget, price, known, held)
    if found is None:
        return None, whole
    for i, k in zip(open_items, found, strict=True):
        picks[i] = left[i][k]
    return (None if _sums(options, picks) >= (known, known_cost) else picks), whole


def _summed(options: Options, damage: Floats, cost: Floats, budget: float, price: float, known: float,
            held: int) -> tuple[list[int] | None, bool]:
    """The options of least damage beside a ``damage`` and a ``cost`` [1] that are spent, None where none promises to
    get below ``known``; and whether nothing was left out unseen."""
    rest_cost = np.append(np.cumsum([c.min() for _, c in options][::-1])[::-1], 0.0)
    priced = np.append(np.cumsum([(d + price * c).min() for d, c in options][::-1])[::-1], 0.0)
    close = EXACT * max(1.0, abs(known), price * abs(budget))
    trace: list[tuple[Ints, Ints]] = []
    whole = True
    for i, (d, c) in enumerate(options):
        damages, costs = (damage[:, None] + d).ravel(), (cost[:, None] + c).ravel()
        bound = damages + price * costs + priced[i + 1] - price * budget
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
    best = int(np.lexsort((cost, damage))[0])
    picks = [0] * len(options)
    for i in range(len(options) - 1, -1, -1):
        above, option = trace[i]
        picks[i], best = int(option[best]), int(above[best])
    return picks, whole


# ---- several budgets

@dataclass(frozen=True)
class JointChoice:
    """``picks[i]``: the option of item i. costs: one sum a budget. gap: no choice within the budgets has a damage below
    damage - gap; 0 where it is certain to be the least."""

    picks: tuple[int, ...]
    damage: float
    costs: tuple[float, ...]
    gap: float = 0.0


def choose_jointly(damages: Table, costs: Sequence[Table], budgets: Sequence[float], nodes: int = NODES) -> JointChoice:
    """The option of every item with the least sum of ``damages[i][k]``, where for every budget j the sum of
    ``costs[j][i][k]`` is at most ``budgets[j]``.

    Raises ValueError where nothing is within the budgets, or a number is not finite.
    """
    if len(costs) == 1:
        one = choose(damages, costs[0], budgets[0])
        return JointChoice(one.picks, one.damage, (one.cost,), one.gap)
    harm, prices = _flat(damages), [_flat(c) for c in costs]
    if not all(np.isfinite(a).all() and len(a) == len(harm) for a in (harm, *prices)) or not all(map(len, damages)):
        raise ValueError("every item takes as many finite damages as costs, and at least one")
    if not damages and min(budgets) >= 0:
        return JointChoice((), 0.0, tuple(0.0 for _ in budgets))
    scales = [max(abs(b), float(abs(p).sum()), 1e-300) for b, p in zip(budgets, prices, strict=True)]
    owner = np.repeat(np.arange(len(damages)), [len(d) for d in damages])

    def within(chosen: Floats) -> bool:
        return all(float(p @ chosen) <= b + EXACT * s for p, b, s in zip(prices, budgets, scales, strict=True))

    if not damages:
        raise ValueError(f"nothing to choose costs 0, which is above one of the budgets {list(budgets)}")
    found = first = _solved(harm, prices, scales, budgets, owner, nodes)
    if found.x is not None and not within(np.round(found.x)):  # by the solver's tolerance
        found = _solved(harm, prices, scales, [b - 2 * TOLERANCE * s for b, s in zip(budgets, scales, strict=True)],
                        owner, nodes)
    if found.x is None or not within(np.round(found.x)):
        raise ValueError(f"no choice was found within the budgets {list(budgets)}")
    chosen, scale = np.round(found.x), max(float(abs(harm).max()), 1e-300)
    damage = float(harm @ chosen)
    gap = damage - float(first.mip_dual_bound) * scale
    picks = tuple(int(np.flatnonzero(chosen[owner == i])[0]) for i in range(len(damages)))
    return JointChoice(picks, damage, tuple(float(p @ chosen) for p in prices), gap if gap > 1e-9 * scale else 0.0)


def reachable(costs: Sequence[Table], budgets: Sequence[float]) -> tuple[float, ...]:
    """The budgets, those raised that no choice meets: by as little as the sum of what each is raised by, of itself,
    allows."""
    if len(costs) == 1:
        return (max(budgets[0], sum(min(c) for c in costs[0])),)
    if not costs[0]:
        return tuple(max(b, 0.0) for b in budgets)
    prices = [_flat(c) for c in costs]
    scales = [max(abs(b), float(abs(p).max(initial=0.0)), 1e-300) for b, p in zip(budgets, prices, strict=True)]
    owner = np.repeat(np.arange(len(costs[0])), [len(c) for c in costs[0]])
    found = _solved(np.zeros(len(owner)), prices, scales, list(budgets), owner, NODES, raised=True)
    chosen = np.round(found.x[:len(owner)])
    return tuple(max(b, float(p @ chosen)) for p, b in zip(prices, budgets, strict=True))


def _flat(table: Table) -> Floats:
    found: Floats = np.concatenate([np.asarray(row, np.float64) for row in table]) if len(table) else np.zeros(0)
    return found


def _solved(harm: Floats, prices: Sequence[Floats], scales: Sequence[float], budgets: Sequence[float],
            owner: npt.NDArray[np.int64], nodes: int, raised: bool = False) -> Any:
    """HiGHS's answer; x holds one number an option, 1 for those taken, and after them by how much of its scale each
    budget is exceeded where ``raised`` allows that, at a price above all damages."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, hstack, vstack

    count, items = len(harm), int(owner.max(initial=-1)) + 1
    more = len(prices) if raised else 0
    sums = csr_array(np.stack([p / s for p, s in zip(prices, scales, strict=True)]))
    once = csr_array((np.ones(count), (owner, np.arange(count))), shape=(items, count))
    table = vstack([sums, once])
    if more:
        table = hstack([table, vstack([-csr_array(np.eye(more)), csr_array((items, more))])])
    high = np.concatenate([np.array([b / s for b, s in zip(budgets, scales, strict=True)]), np.ones(items)])
    low = np.concatenate([np.full(len(prices), -np.inf), np.ones(items)])
    goal = np.concatenate([harm / max(float(abs(harm).max(initial=0.0)), 1e-300), np.ones(more)])
    limits = Bounds(0, np.concatenate([np.ones(count), np.full(more, np.inf)]))
    return milp(goal, integrality=np.concatenate([np.ones(count), np.zeros(more)]), bounds=limits,
                constraints=LinearConstraint(table, low, high), options={"mip_rel_gap": 0.0, "node_limit": nodes})


__all__ = ["Choice", "JointChoice", "choose", "choose_jointly", "reachable"]
