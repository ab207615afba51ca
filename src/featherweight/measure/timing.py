"""Latency: the median over rounds in which all contestants run, in a new order every round."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: a call this long (seconds) needs no untimed call before it to warm the caches
LONG_CALL = 0.02


@dataclass(frozen=True)
class Latency:
    """Seconds per call: median and quartiles over ``rounds``; what ran, on how many threads, at which batch size, and
    what it computes float operators in ("f32", "bf16"; "" if not known).

    Example:
        >>> timed = fw.measure.interleave({"network": lambda: network(images)}, rounds=5)
        >>> timed["network"].q1_s <= timed["network"].median_s <= timed["network"].q3_s
        True
    """

    median_s: float
    q1_s: float
    q3_s: float
    rounds: int
    threads: int = 1
    batch: int = 1
    runtime: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    precision: str = ""


def interleave(calls: Mapping[str, Callable[[], Any]], *, rounds: int | None = None, seconds: float = 2.0,
               warmup: int = 3, seed: int = 0, threads: int = 1, batch: int = 1, runtime: str = "",
               versions: Mapping[str, str] | None = None, precision: str = "") -> dict[str, Latency]:
    """Times every call, side by side: a noisy minute hits all of them, and no one always comes first.

    rounds: how often each is timed; None takes as many rounds as fit into ``seconds`` (of the whole), at least 11.
    warmup: untimed calls of each before the first round. A short call also runs once untimed right before each timed
    one, so that it is timed with its own data in the caches, as in a loop.
    threads, batch, runtime, versions, precision: what the calls run on; they are only written down.

    Example:
        >>> small = fw.prune.Channels(macs=0.5).plan(network, task).apply(network)
        >>> timed = fw.measure.interleave({"before": lambda: network(images), "after": lambda: small(images)}, rounds=5)
        >>> list(timed), timed["after"].rounds
        (['before', 'after'], 5)
    """
    shuffle = random.Random(seed)
    order = list(calls)
    long = {}
    for name in order:
        for _ in range(max(warmup, 1)):
            began = time.perf_counter()
            calls[name]()
            long[name] = time.perf_counter() - began > LONG_CALL
    taken: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        done = 0
        while (done < rounds) if rounds is not None else (done < 11 or time.perf_counter() < end):
            shuffle.shuffle(order)
            for name in order:
                call = calls[name]
                if not long[name]:
                    call()
                began = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - began)
            done += 1
    finally:
        if collecting:
            gc.enable()
    result = {}
    for name in calls:
        q1, median, q3 = (float(q) for q in np.quantile(taken[name], [0.25, 0.5, 0.75]))
        result[name] = Latency(median, q1, q3, len(taken[name]), threads, batch, runtime, dict(versions or {}),
                               precision)
    return result
