"""Checks of options: what an option may be is said once, as a table, and a refusal is worded alike for every step.

A refusal is a RecipeError that says what was given, what was expected, and the line to write.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from featherweight.errors import RecipeError
from featherweight.task.bounds import COUNT, SEED, Numbers

#: splits that a choice may be made on
CHOICE_SPLITS = ("validation", "calibration", "train")

#: what remains of something, as a fraction of it; None where another target is given
REMAINS = Numbers(0.5, above=0, most=1, noun="the fraction that remains,", none="another target")
BATCH_LIMIT = Numbers(4, least=1, whole=True, none="all")


def check_number(name: str, option: str, given: Any, wanted: Numbers) -> None:
    """Raises RecipeError where ``given``, the ``option`` of the step called ``name``, is none of the ``wanted``."""
    if not wanted.hold(given):
        raise RecipeError(wanted.refusal(name, option, given))


def check_numbers(step: Any, table: Mapping[str, Numbers]) -> None:
    """The same for every option of ``step`` that the table names."""
    for option, wanted in table.items():
        check_number(type(step).__name__, option, getattr(step, option), wanted)


def check_known(name: str, option: str, given: Any, known: Collection[str], write: str = "") -> None:
    """Raises RecipeError where an option is none of the names ``known``; ``write`` is the line to write where
    ``option="name"`` is not."""
    if isinstance(given, str) and given in known:
        return
    close = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    line = write or f'{option}="{(close or list(known))[0]}"'
    raise RecipeError(f"{name} has no {option} {given!r}; {meant}expected one of {', '.join(map(repr, known))}; write "
                      f"{line}")


def check_split(name: str, split: str) -> None:
    """Raises RecipeError for a split on which nothing may be chosen."""
    if split == "test":
        raise RecipeError(f'{name} was given split="test", which chooses nothing; write split="validation"')
    check_known(name, "split", split, CHOICE_SPLITS)


def check_batches(name: str, batches: int | None) -> None:
    """Raises RecipeError for a bound on the batches read that is no integer from 1, nor None for all."""
    check_number(name, "batches", batches, BATCH_LIMIT)


def check_one(step: Any, options: Collection[str], write: str) -> None:
    """Raises RecipeError where not exactly one of these options was given."""
    given = [option for option in options if getattr(step, option) is not None]
    if len(given) != 1:
        raise RecipeError(f"{type(step).__name__} was given {' and '.join(given) or 'none'} of {', '.join(options)}; "
                          f"expected one of them: write {write}")


def check_times(step: Any) -> None:
    """Raises RecipeError where ``times`` is no folder's name, or stands without a ``latency``."""
    if step.times is not None and (not isinstance(step.times, str) or step.latency is None):
        name = type(step).__name__
        raise RecipeError(f"{name} was given times={step.times!r} and latency={step.latency}; expected the folder of a "
                          f'device beside a latency, as in {name}(latency=0.5, times="device")')


def check_pace(step: Any) -> None:
    """Raises RecipeError where ``begin``, ``end`` and ``frequency`` are no shares of a training in their order."""
    begin, end, frequency = given = step.begin, step.end, step.frequency
    numbers = not any(isinstance(g, bool) or not isinstance(g, Real) for g in given)
    if not (numbers and 0 <= begin < end <= 1 and 0 < frequency < math.inf):
        name = type(step).__name__
        raise RecipeError(f"{name} was given begin={begin}, end={end}, frequency={frequency}; expected "
                          f"0 <= begin < end <= 1, frequency above 0, as in {name}(begin=0.0, end=0.75)")


__all__ = ["BATCH_LIMIT", "CHOICE_SPLITS", "COUNT", "REMAINS", "SEED", "Numbers", "check_batches", "check_known",
           "check_number", "check_numbers", "check_one", "check_pace", "check_split", "check_times"]
