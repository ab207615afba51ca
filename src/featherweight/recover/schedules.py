"""How the learning rate goes: pure functions of the progress, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

ONECYCLE_RISE = 0.3  #: share of the steps that a one-cycle schedule rises, where no warmup is given
ONECYCLE_START = 1 / 25  #: its first learning rate, as a share of the largest
ONECYCLE_END = 1e-4  #: its last one, as a share of the first


def cosine(progress: float, warmup: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, eq. 5), after a linear warmup."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def onecycle(progress: float, warmup: float) -> float:
    """Up from 1/25 to 1, then down to 1/25e4, both along half a cosine (Smith and Topin 2018). ``warmup`` is the
    share of the rise, 0.3 where it is 0. The momentum stays as it is."""
    rise = warmup or ONECYCLE_RISE
    if progress < rise:
        low, share = ONECYCLE_START, 1 - progress / rise
    else:
        low, share = ONECYCLE_START * ONECYCLE_END, (progress - rise) / (1 - rise)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))


def constant(progress: float, warmup: float) -> float:
    """1 after a linear warmup."""
    return progress / warmup if progress < warmup else 1.0


#: name -> factor on the learning rate, given the progress in [0, 1) and the share of warmup in [0, 1)
SCHEDULES: dict[str, Callable[[float, float], float]] = {"cosine": cosine, "onecycle": onecycle, "constant": constant}
