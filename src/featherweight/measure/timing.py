"""Latency: the median over rounds in which all contestants run, in a new order every round."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: a call this long (seconds) needs no untimed call before it to warm the caches
LONG_CALL = 0.02
#: a difference up to this share is no difference: equal files at other places in memory differ by as much
ALIKE = 0.03
#: how far the bounds of a median's interval lie from the middle, in deviations of a fair coin's counts (99.9 %)
SURE = 3.3
#: share of the time spent waiting for a processor above which a timing is called disturbed
DISTURBED = 0.1


@dataclass(frozen=True)
class Latency:
    """Seconds per call: median and quartiles over ``rounds``; what ran, on how many threads, at which batch size, and
    what it computes float operators in ("f32", "bf16"; "" if not known).

    waiting: share of the timing that this process was ready to run but had no processor, because others had it; None
    where the system does not say.

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
    waiting: float | None = None


@dataclass(frozen=True)
class Ratio:
    """Seconds of another file divided by seconds of this one, pair by pair in the same rounds: above 1, this one is
    faster.

    median: of the ratios. low, high: their quartiles, or the interval that holds the true median with 99.9 % where that
    is wider (few rounds).

    Example:
        >>> fw.measure.Ratio(1.5, 1.4, 1.6).verdict, fw.measure.Ratio(1.5, 0.9, 2.2).verdict
        ('faster', '')
    """

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """"faster" or "slower" where the bounds leave no doubt, else ""."""
        return "faster" if self.low > 1 + ALIKE else "slower" if self.high < 1 / (1 + ALIKE) else ""


def paired(other: Sequence[float], this: Sequence[float]) -> Ratio:
    """The ratio of two files' seconds in the same rounds.

    The median's interval is the distribution-free one between order statistics (David and Nagaraja, Order Statistics,
    section 7.1).

    Example:
        >>> fw.measure.paired([2.0] * 20, [1.0] * 20)
        Ratio(median=2.0, low=2.0, high=2.0)
    """
    ratios = np.sort(np.asarray(other, dtype=np.float64) / np.asarray(this, dtype=np.float64))
    count = len(ratios)
    rank = max(0, int(np.floor(count / 2 - SURE * np.sqrt(count) / 2)))
    q1, median, q3 = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return Ratio(median, min(q1, float(ratios[rank])), max(q3, float(ratios[count - 1 - rank])))


@dataclass(frozen=True)
class Timed:
    """What rounds gave: name -> the Latency, and name -> the seconds of every round in their order.

    Example:
        >>> timed = fw.measure.side_by_side({"a": lambda: network(images), "b": lambda: network(images)}, rounds=5)
        >>> timed.latencies["a"].rounds, timed.ratio("a", "b").median > 0
        (5, True)
    """

    latencies: Mapping[str, Latency]
    seconds: Mapping[str, Sequence[float]]

    def ratio(self, other: str, this: str) -> Ratio:
        """Seconds of ``other`` divided by those of ``this``, in the same rounds."""
        return paired(self.seconds[other], self.seconds[this])


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
    return dict(side_by_side(calls, rounds=rounds, seconds=seconds, warmup=warmup, seed=seed, threads=threads,
                             batch=batch, runtime=runtime, versions=versions, precision=precision).latencies)


def side_by_side(calls: Mapping[str, Callable[[], Any]], *, rounds: int | None = None, seconds: float = 2.0,
                 warmup: int = 3, seed: int = 0, threads: int = 1, batch: int = 1, runtime: str = "",
                 versions: Mapping[str, str] | None = None, precision: str = "",
                 progress: Callable[[float], None] | None = None) -> Timed:
    """As ``interleave``, with the seconds of every round, from which ratios are taken.

    progress: called after every round with the share that is done.

    Example:
        >>> timed = fw.measure.side_by_side({"network": lambda: network(images)}, rounds=5)
        >>> len(timed.seconds["network"])
        5
    """
    shuffle, order = random.Random(seed), list(calls)
    long = {name: _warm(calls[name], warmup) for name in order}
    taken: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        waited, start, done = waited_s(), time.perf_counter(), 0
        while (done < rounds) if rounds is not None else (done < 11 or time.perf_counter() < start + seconds):
            shuffle.shuffle(order)
            for name in order:
                if not long[name]:
                    calls[name]()
                began = time.perf_counter()
                calls[name]()
                taken[name].append(time.perf_counter() - began)
            done += 1
            if progress is not None:
                progress(done / rounds if rounds is not None else
                         min(done / 11, (time.perf_counter() - start) / max(seconds, 1e-9), 1.0))
        now, lasted = waited_s(), time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    waiting = None if waited is None or now is None or lasted <= 0 else min(1.0, (now - waited) / lasted)
    found = {}
    for name in calls:
        q1, median, q3 = (float(q) for q in np.quantile(taken[name], [0.25, 0.5, 0.75]))
        found[name] = Latency(median, q1, q3, len(taken[name]), threads, batch, runtime, dict(versions or {}),
                              precision, waiting)
    return Timed(found, taken)


def _warm(call: Callable[[], Any], times: int) -> bool:
    """Calls without timing; whether the last one was long."""
    lasted = 0.0
    for _ in range(max(times, 1)):
        began = time.perf_counter()
        call()
        lasted = time.perf_counter() - began
    return lasted > LONG_CALL


def waited_s() -> float | None:
    """Seconds that this process's main thread was ready to run but had no processor, since it began; None where the
    system does not say (it is Linux's ``/proc/self/schedstat``)."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


__all__ = ["ALIKE", "DISTURBED", "Latency", "Ratio", "Timed", "interleave", "paired", "side_by_side"]
