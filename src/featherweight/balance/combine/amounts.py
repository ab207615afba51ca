"""What amounts of families came to: combinations that count the same, and amounts that did nothing beside others."""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.balance.combine.axes import Picks
from featherweight.balance.combine.trials import Trial

#: shares that are counted, not measured
COUNTED = ("file_bytes", "archive_bytes", "macs")
#: shares that differ by less, as a share, are the same
SAME = 0.002


def families(picks: Picks) -> frozenset[int]:
    """The axes that a combination takes something of."""
    return frozenset(axis for axis, pick in enumerate(picks) if pick)


def without(picks: Picks, axis: int) -> Picks:
    """A combination with nothing of one axis."""
    return (*picks[:axis], 0, *picks[axis + 1:])


def voids(made: Mapping[Picks, Trial]) -> dict[tuple[int, Picks], int]:
    """An axis, and what stands beside it -> the largest amount of that axis that did nothing there."""
    found: dict[tuple[int, Picks], int] = {}
    for picks, trial in made.items():
        for axis in families(picks):
            others = without(picks, axis)
            if others in made and same(trial, made[others]):
                found[axis, others] = max(found.get((axis, others), 0), picks[axis])
    return found


def same(trial: Trial, other: Trial) -> bool:
    """Whether two trials count the same; archives of trained weights differ a little."""
    both = [(trial.shares[name], other.shares[name]) for name in COUNTED
            if name in trial.shares and name in other.shares]
    return bool(both) and all(abs(now / then - 1) < SAME for now, then in both)


def as_small(trial: Trial, before: Trial) -> bool:
    """Whether a trial that changed something counts what ``before`` does."""
    changed = trial.drop != 0 or any(trial.shares.get(name, 1.0) != 1.0 for name in COUNTED)
    return changed and same(trial, before)


__all__ = ["as_small", "families", "voids", "without"]
