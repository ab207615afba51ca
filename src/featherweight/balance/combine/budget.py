"""``Budget``: what a network may cost, and how much of its score may go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real

from featherweight.errors import RecipeError, TaskError
from featherweight.measure import Measurement
from featherweight.task import Task

BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
#: figure -> units of an absolute limit, each in the figure's own (seconds, bytes, multiply-accumulates)
UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "file_bytes": BYTES, "archive_bytes": BYTES, "memory": BYTES,
    "macs": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
}
#: figures that there may be limits of, ``score_drop`` beside them
FIGURES = tuple(UNITS)
_ABSOLUTE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
#: a line to write for each figure
LIKE = {"latency": '"2 ms"', "file_bytes": '"300 kB"', "archive_bytes": '"80 kB"', "memory": '"20 MB"',
        "macs": '"40 M"'}


@dataclass(frozen=True)
class Budget:
    """Limits that hold together; None: none.

    latency: of one sample in the deployed file. file_bytes: of the deployed file. archive_bytes: of the entropy-coded
    archive. macs: multiply-accumulates of one sample. memory: what the process that runs the file grows by. Each is a
    fraction of the original's, 0..1, also as "0.25x", or absolute with a unit: "2 ms", "300 kB", "40 M".
    score_drop: points of the task's score that may be lost, on the validation split.

    Raises RecipeError for limits that make no sense, as soon as it is made.

    Example:
        >>> budget = fw.Budget(latency=0.5, file_bytes="30 kB", score_drop=1.0)
        >>> budget.limits({"latency": 0.004, "file_bytes": 60_000})     # shares of an original that costs so much
        {'latency': 0.5, 'file_bytes': 0.5}
    """

    latency: float | str | None = None
    file_bytes: float | str | None = None
    archive_bytes: float | str | None = None
    macs: float | str | None = None
    memory: float | str | None = None
    score_drop: float | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, f.name) is None for f in fields(self)):
            raise RecipeError("a Budget was given no limit; expected one or several, as in "
                              "fw.Budget(latency=0.5, score_drop=1.0)")
        for name in FIGURES:
            if getattr(self, name) is not None:
                _read(name, getattr(self, name))
        drop = self.score_drop
        if drop is not None and (isinstance(drop, bool) or not isinstance(drop, Real) or not 0 <= drop < float("inf")):
            raise RecipeError(f"a Budget was given score_drop={drop!r}; expected points of the score from 0, as in "
                              "fw.Budget(score_drop=1.0)")

    def limits(self, original: Mapping[str, float]) -> dict[str, float]:
        """The limited figures as shares of what the ``original`` costs. Raises RecipeError for one that it was not
        measured in, as memory is on Linux alone."""
        for name in self.limited:
            if name not in original:
                raise RecipeError(f"a Budget was given {name}={getattr(self, name)!r}, which cannot be measured here; "
                                  f"leave it out: there are {', '.join(original)}")
        given = {name: _read(name, getattr(self, name)) for name in self.limited}
        return {name: number if share else number / original[name] for name, (number, share) in given.items()}

    @property
    def limited(self) -> tuple[str, ...]:
        """The figures that have a limit."""
        return tuple(name for name in FIGURES if getattr(self, name) is not None)


def _read(name: str, given: float | str) -> tuple[float, bool]:
    """A limit as a number, and whether it is a share of the original's."""
    wanted = (f"a Budget was given {name}={given!r}; expected a fraction 0..1 of the original's, as in "
              f"fw.Budget({name}=0.5), or a number with a unit, as in fw.Budget({name}={LIKE[name]})")
    if isinstance(given, Real) and not isinstance(given, bool):
        if not 0 < given <= 1:
            raise RecipeError(wanted)
        return float(given), True
    found = _ABSOLUTE.fullmatch(given) if isinstance(given, str) else None
    if found is None:
        raise RecipeError(wanted)
    number, unit = float(found[1]), found[2]
    if unit == "x" and 0 < number <= 1:
        return number, True
    if unit not in UNITS[name] or not 0 < number < float("inf"):
        raise RecipeError(f"{wanted}; units are {', '.join(u or 'none' for u in UNITS[name])}")
    return number * UNITS[name][unit], False


def check_scored(who: str, task: Task) -> None:
    """Raises TaskError where there is no score, and so nothing to weigh what is saved against."""
    if task.score is None:
        raise TaskError(f"{who} weighs what is saved against what is lost of the score, and the task has none; write "
                        "Task(score=fw.scores.top1, ...), or fw.Task.classification(train, validation)")


def lost(before: Measurement, after: Measurement) -> float:
    """Points of the score between two measurements. Raises TaskError where one has none: it is not taken for 0."""
    if before.score is None or after.score is None:
        raise TaskError(f"{(before if before.score is None else after).step} was not scored; write Task(score=..., "
                        "validation=...)")
    return before.score - after.score


__all__ = ["FIGURES", "Budget", "check_scored", "lost"]
