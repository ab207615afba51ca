"""Options by path in a recipe's steps, "2.distill.weight", and what each may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from featherweight.errors import RecipeError, did_you_mean
from featherweight.steps import Step

#: a range that spans so many times its low end is searched by its logarithm
DECADE = 10
WRITE = 'write {"2.lr": (0.001, 0.1)} for a range, or {"2.schedule": ["cosine", "constant"]} for choices'


@dataclass(frozen=True)
class Range:
    """One option. path: number of the step, from 1, and names. low, high: its ends, integers where ``whole``; choices:
    instead, all that it may be."""

    path: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def of(cls, path: str, given: Any) -> Range:
        """From (low, high), or a list of choices. Raises RecipeError for anything else."""
        if isinstance(given, list) and given:
            return cls(path, choices=tuple(given))
        ends = given if isinstance(given, tuple) and len(given) == 2 else ()
        if not ends or any(isinstance(e, bool) or not isinstance(e, Real) for e in ends) or not ends[0] < ends[1]:
            raise RecipeError(f"tune was given {path!r}: {given!r}; {WRITE}")
        return cls(path, ends[0], ends[1], all(isinstance(e, Integral) for e in ends))

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one that may be asked for."""
        if self.choices:
            return value in self.choices
        return isinstance(value, Integral if self.whole else Real) and self.low <= value <= self.high  # type: ignore[operator]

    def suggested(self, trial: Any) -> Any:
        """What a trial of Optuna takes."""
        if self.choices:
            return trial.suggest_categorical(self.path, list(self.choices))
        if self.whole:
            return trial.suggest_int(self.path, int(self.low), int(self.high))
        return trial.suggest_float(self.path, self.low, self.high, log=self.high >= DECADE * self.low > 0)


def held(steps: Sequence[Step], path: str) -> Any:
    """The option at ``path``. Raises RecipeError where there is none."""
    value: Any = steps
    for part in _parts(path):
        value = _at(value, part, path)
    return value


def changed(steps: Sequence[Step], options: Mapping[str, Any]) -> tuple[Step, ...]:
    """The steps with other options, by path."""
    found: Any = tuple(steps)
    for path, value in options.items():
        found = _put(found, _parts(path), value, path)
    done: tuple[Step, ...] = found
    return done


def _parts(path: str) -> list[str]:
    number, *names = path.split(".")
    if not number.isdecimal() or number == "0" or not names:
        raise RecipeError(f"tune was given the option {path!r}; expected the number of a step, from 1, and the "
                          f"option's name: {WRITE}")
    return [str(int(number) - 1), *names]


def _at(value: Any, part: str, path: str) -> Any:
    if isinstance(value, tuple):
        if part.isdecimal() and int(part) < len(value):
            return value[int(part)]
        raise RecipeError(f"tune was given the option {path!r}, but there are {len(value)} there; {WRITE}")
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    if part not in names:
        raise RecipeError(f"tune was given the option {path!r}; {type(value).__name__} has no {part!r}: "
                          f"{did_you_mean(part, names)}")
    return getattr(value, part)


def _put(value: Any, parts: Sequence[str], new: Any, path: str) -> Any:
    if not parts:
        return new
    inner = _put(_at(value, parts[0], path), parts[1:], new, path)
    if isinstance(value, tuple):
        index = int(parts[0])
        return (*value[:index], inner, *value[index + 1:])
    return dataclasses.replace(value, **{parts[0]: inner})


__all__ = ["Range", "changed", "held"]
