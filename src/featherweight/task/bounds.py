"""What a number that is given as an option may be; the options of the functions that read files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any

from featherweight.errors import TaskError


@dataclass(frozen=True)
class Numbers:
    """Finite numbers within bounds; True and False are none.

    like: one of them, for the line to write. whole: integers only. noun, unit: the words before and after the bounds.
    none: what None stands for; "" where None is refused.
    """

    like: float
    _: KW_ONLY
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    whole: bool = False
    noun: str = "a number"
    unit: str = ""
    none: str = ""

    def hold(self, value: Any) -> bool:
        """Whether ``value`` is one of them."""
        if value is None:
            return bool(self.none)
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        x: Any = value
        return ((isinstance(x, Integral) or math.isfinite(x))
                and (self.above is None or x > self.above) and (self.least is None or x >= self.least)
                and (self.below is None or x < self.below) and (self.most is None or x <= self.most))

    def __str__(self) -> str:
        noun = "an integer" if self.whole and self.noun == "a number" else self.noun
        named = {"above": self.above, "from": self.least, "below": self.below, "up to": self.most}
        bounds = " and ".join(f"{word} {bound:g}" for word, bound in named.items() if bound is not None)
        return (f"{noun} {bounds}".rstrip() + self.unit) + (f", or None for {self.none}" if self.none else "")

    def refusal(self, name: str, option: str, given: Any) -> str:
        """That ``given``, an option of what is called ``name``, is none of them."""
        return f"{name} was given {option}={given!r}; expected {self}, as in {name}({option}={self.like!r})"


COUNT = Numbers(8, least=1, whole=True)
SEED = Numbers(0, whole=True)
#: options of every function that reads files
DRAWN = {"batch": COUNT, "validation": Numbers(0.1, least=0, below=1), "test": Numbers(0.1, least=0, below=1),
         "seed": SEED}
NORM = {"mean": Numbers(0.5), "std": Numbers(0.25, above=0)}  #: what is taken off, and divided by


def check_options(name: str, table: Mapping[str, Numbers], **given: Any) -> None:
    """Raises TaskError where an option of the function called ``name`` is not as the table says."""
    for option, value in given.items():
        if not table[option].hold(value):
            raise TaskError(table[option].refusal(name, option, value))


def check_lists(name: str, table: Mapping[str, Numbers], **given: Any) -> None:
    """The same for options that are lists of such numbers."""
    for option, value in given.items():
        if not isinstance(value, Iterable) or not all(map(table[option].hold, value)):
            raise TaskError(f"{name} was given {option}={value!r}; expected a list, each {table[option]}, as in "
                            f"{name}({option}=[{table[option].like!r}])")


__all__ = ["COUNT", "DRAWN", "NORM", "SEED", "Numbers", "check_lists", "check_options"]
