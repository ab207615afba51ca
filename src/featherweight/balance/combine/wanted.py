"""What is wanted of a search: limits, and a figure that is to be least within them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.balance.combine.trials import Trial

#: the figure that is not a share
DROP = "score_drop"
#: figures that differ each time they are measured, by this share or less
MEASURED, NOISE = ("latency", "memory"), 0.02


@dataclass(frozen=True)
class Wanted:
    """limits: figure -> share of the original's that may remain, and "score_drop" -> points. minimize: the figure that
    is to be least. points: how many of the score count as much as a tenth of a share, where combinations are compared
    that keep no limit. short: points that the short training of trials costs the original, and so any of them. left:
    what the whole training is taken to leave of what a trial lost beyond that."""

    limits: Mapping[str, float]
    minimize: str
    points: float
    short: float = 0.0
    left: float = 1.0

    def figure(self, trial: Trial, name: str) -> float:
        """What a trial costs, or the points that it would lose as it ships."""
        if name != DROP:
            return trial.shares.get(name, 1.0)
        return (trial.drop - self.short) * self.left if trial.probe else trial.drop

    def met(self, trial: Trial) -> bool:
        """Whether a trial keeps within all limits."""
        return self.rank(trial)[:2] == (False, 0.0)

    def beyond(self, figures: Mapping[str, npt.NDArray[np.float64]], shipped: bool = False) -> npt.NDArray[np.float64]:
        """By how much limits are passed, for arrays of figures: 0 where all are kept. What is measured keeps a little
        away from its limit, as it will be measured once more, unless it is ``shipped``."""
        missed: npt.NDArray[np.float64] = np.zeros(1)
        for name, limit in self.limits.items():
            limit = limit * (1 - NOISE) if name in MEASURED and not shipped else limit
            over = ((figures[name] - limit) / (10 * self.points) if name == DROP else np.log(figures[name] / limit))
            missed = missed + np.maximum(over, 0)
        return missed

    def order(self, figures: Mapping[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.intp]:
        """The places in arrays of figures, from what promises most on."""
        return np.lexsort((figures[self.minimize], np.round(self.beyond(figures), 6)))

    def rank(self, trial: Trial) -> tuple[bool, float, float]:
        """Trials in the order of their worth: the least is the best."""
        if trial.failed:
            return True, float("inf"), float("inf")
        figures = {name: np.array([self.figure(trial, name)]) for name in self.limits}
        return False, float(self.beyond(figures, trial.shipped)[0]), self.figure(trial, self.minimize)


__all__ = ["DROP", "Wanted"]
