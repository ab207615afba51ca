"""How much a channel matters: one number per channel of every axis group, higher = keep."""

from __future__ import annotations

from featherweight.prune.channels.scores.data import activation, fisher, taylor
from featherweight.prune.channels.scores.reconstruction import reconstruction
from featherweight.prune.channels.scores.weights import Score, Scores, bn, fpgm, norm, random


def normalised(scores: Scores) -> Scores:
    """Every group divided by its mean, so that channels of different groups can be ranked together.

    This is the normalizer of DepGraph (Fang et al. 2023, section 3.4).
    """
    return [s / max(float(s.mean()), 1e-30) for s in scores]


#: scores whose groups can be compared as they are: changes of one loss, or of the same outputs
COMPARABLE = {"random", "taylor", "fisher"}
#: scores that are errors: ranked over all groups, a channel's counts by the cost that it saves
ERRORS = {"taylor", "fisher", "reconstruction"}
#: name -> score; add one of your own under a new name
SCORES: dict[str, Score] = {
    "random": random, "l1": norm(1), "l2": norm(2), "fpgm": fpgm, "bn": bn,
    "taylor": taylor, "fisher": fisher, "activation": activation, "reconstruction": reconstruction}
#: name -> what of the task a score reads
NEEDS: dict[str, tuple[str, ...]] = {
    "taylor": ("calibration", "loss"), "fisher": ("calibration",), "activation": ("calibration",),
    "reconstruction": ("calibration",)}

__all__ = ["COMPARABLE", "ERRORS", "NEEDS", "SCORES", "Score", "Scores", "normalised"]
