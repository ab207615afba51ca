"""One option for each item under several budgets at once: the sum of damages is least, and no sum of costs exceeds its
budget.

The multidimensional multiple-choice knapsack (Kellerer, Pferschy and Pisinger 2004, "Knapsack problems", section
11.10), an integer programme that HiGHS solves by branch and bound over its linear relaxation (whose bound is that of
the Lagrangian relaxation); one budget alone is left to ``budget.choose``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.numerics.budget import EXACT, choose

Floats = npt.NDArray[np.float64]
Table = Sequence[Sequence[float]]
#: nodes of the search tree; beyond, the choice may be off by no more than its ``gap``
NODES = 20_000
#: what HiGHS lets a sum exceed its bound by, of the bound
TOLERANCE = 1e-6


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


__all__ = ["JointChoice", "choose_jointly", "reachable"]
