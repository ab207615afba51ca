"""The short training that trials get, and what it says of the whole one."""

from __future__ import annotations

import dataclasses
import math

from featherweight.balance.combine.budget import lost
from featherweight.balance.combine.trials import Trials
from featherweight.errors import RecipeError
from featherweight.recover import Train

#: share of a training's epochs that a trial gets
PROBE = 0.1
#: what ten times the epochs are taken to leave of what is lost, before a whole training was seen: little, so that one
#: is made, which tells
LEFT = 0.25


def short(training: Train | None) -> Train | None:
    """The training of trials: a tenth of the epochs, one at least where there is one. The learning rate falls with the
    square root of their share, as few steps do not make good what a high rate breaks."""
    if training is None or not training.epochs:
        return training
    epochs = max(1, round(PROBE * training.epochs))
    return dataclasses.replace(training, epochs=epochs, lr=training.lr * (epochs / training.epochs) ** 0.5)


def left_by(training: Train | None) -> float:
    """What the whole training is taken to leave of what a trial lost beyond the original with the short training: the
    less, the longer it is beside that; all where the two are the same."""
    probe = short(training)
    if training is None or probe is None or not training.epochs:
        return 1.0
    return float(LEFT ** math.log10(training.epochs / probe.epochs))


def of_training(trials: Trials, training: Train) -> tuple[float, float]:
    """Points of the score that the short training costs the original, 0 where it gains some, and about how many seconds
    the whole training takes. Raises RecipeError where the original cannot be trained."""
    probe = short(training)
    assert probe is not None
    after = trials.ready("nothing, shortly trained", (probe,))
    if after.measured is None:
        raise RecipeError(f"search was given a training that the network itself does not stand: {after.failed}; try it "
                          "by itself first: fw.compress(network, task, fw.Recipe([recover]))")
    return max(lost(trials.start(), after.measured), 0.0), after.seconds * training.epochs / max(probe.epochs, 1)


__all__ = ["PROBE", "left_by", "of_training", "short"]
