"""The clock of a search."""

from __future__ import annotations

import time

#: shares of all the time that are kept at most: for several pieces of work, and for one
SEVERAL, ONE = 0.5, 0.75


class Watch:
    """The time that a search may take, some of which can be kept for what is to come last."""

    def __init__(self, minutes: float | None) -> None:
        self._began, self._seconds = time.monotonic(), float("inf") if minutes is None else 60 * minutes
        self._kept = 0.0

    def keep(self, each: float, count: int) -> None:
        """Keeps the time of ``count`` pieces of work, ``each`` of so many seconds: half of all at most, but that of one
        up to three quarters."""
        self._kept = max(min(count * each, SEVERAL * self._seconds), min(each, ONE * self._seconds))

    @property
    def spent(self) -> float:
        """The share that is spent of what is not kept: 0..1 and beyond; 0 where there is no limit."""
        return (time.monotonic() - self._began) / (self._seconds - self._kept)

    @property
    def left(self) -> float:
        """Seconds that are left of all."""
        return self._seconds - (time.monotonic() - self._began)


__all__ = ["Watch"]
