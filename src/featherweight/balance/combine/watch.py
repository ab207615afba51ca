"""The clock of a search."""

from __future__ import annotations

import time


class Watch:
    """The time that a search may take, some of which can be kept for what is to come last."""

    def __init__(self, minutes: float | None) -> None:
        self._began, self._seconds = time.monotonic(), float("inf") if minutes is None else 60 * minutes
        self._kept = 0.0

    def keep(self, seconds: float) -> None:
        """Keeps so many seconds of all, half of them at most."""
        self._kept = min(seconds, self._seconds / 2)

    @property
    def spent(self) -> float:
        """The share that is spent of what is not kept: 0..1 and beyond; 0 where there is no limit."""
        return (time.monotonic() - self._began) / (self._seconds - self._kept)

    @property
    def left(self) -> float:
        """Seconds that are left of all."""
        return self._seconds - (time.monotonic() - self._began)


__all__ = ["Watch"]
