"""A figure of combinations of several reductions, predicted from those that were measured.

An axis is one kind of reduction, a position how far it goes: 0 is none. The prediction is the sum of one curve an axis,
piecewise linear through the points at which that axis alone was measured, plus what this sum missed at measured
combinations nearby: a kernel average (Nadaraya 1964; Watson 1964) with a prior of zero, so that far from all
measurements the sum stands alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: distance of positions at which a measurement counts by exp(-1/2)
WIDTH = 0.35
#: weight of the prior of zero, beside 1 of a measurement at the place itself
PRIOR = 0.05


@dataclass(frozen=True)
class Surrogate:
    """curves: for each axis positions, from 0 on and rising, and values, 0 at 0. places, missed: where it was measured,
    [m, axes], and what the curves missed there, [m]. rising: beyond its last point no curve falls."""

    curves: tuple[tuple[Floats, Floats], ...]
    places: Floats
    missed: Floats
    rising: bool = False

    def at(self, positions: Floats) -> Floats:
        """The predictions at ``positions`` [n, axes]: [n]."""
        total = sum((_along(curve, positions[:, axis], self.rising) for axis, curve in enumerate(self.curves)),
                    start=np.zeros(len(positions)))
        if not len(self.places):
            return total
        apart = ((positions[:, None] - self.places[None]) ** 2).sum(2)
        all_there = ((self.places[None] == 0) | (positions[:, None] != 0)).all(2)
        near = np.exp(-apart / (2 * WIDTH**2)) * all_there
        found: Floats = total + near @ self.missed / (near.sum(1) + PRIOR)
        return found


def fit(positions: Floats, values: Floats, rising: bool = False) -> Surrogate:
    """The surrogate of ``values`` [m], measured at ``positions`` [m, axes]; without any reduction the value is 0."""
    moved = (positions != 0).sum(1)
    curves = []
    for axis in range(positions.shape[1]):
        alone = (moved == 1) & (positions[:, axis] != 0)
        places, first = np.unique(positions[alone, axis], return_index=True)
        curves.append((np.concatenate(([0.0], places)), np.concatenate(([0.0], values[alone][first]))))
    sums = Surrogate(tuple(curves), np.zeros((0, positions.shape[1])), np.zeros(0), rising)
    return Surrogate(sums.curves, positions, np.where(moved > 1, values - sums.at(positions), 0.0), rising)


def _along(curve: tuple[Floats, Floats], positions: Floats, rising: bool) -> Floats:
    """A curve at ``positions``; beyond its last point it goes on as between the last two, or level if it must not
    fall."""
    places, values = curve
    found: Floats = np.interp(positions, places, values)
    if len(places) > 1:
        slope = (values[-1] - values[-2]) / (places[-1] - places[-2])
        slope = max(slope, 0.0) if rising else slope
        found = found + np.maximum(positions - places[-1], 0) * slope
    return found


__all__ = ["Surrogate", "fit"]
