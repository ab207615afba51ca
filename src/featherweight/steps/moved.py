"""Public names that moved: the old spelling works for two minor versions, and warns with the line to write instead."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OldName:
    """place: where the name is now, "featherweight.balance.Ladder". line: what to write instead. goes: the version
    without the old name."""

    place: str
    line: str
    goes: str


#: old names in full, of the modules that were imported so far
MOVED: dict[str, OldName] = {}


def gone(since: str) -> str:
    """The version without a name that moved in version ``since``: two minor ones later."""
    major, minor = map(int, since.split("."))
    return f"{major}.{minor + 2}"


def tell(name: str, line: str, since: str = "0.2") -> None:
    """Warns whoever called the caller that ``name`` has another spelling since a version: ``line`` is to be written."""
    warnings.warn(f"{name} is now {line}; the old name goes with version {gone(since)}", DeprecationWarning,
                  stacklevel=3)


def moved(module: str, names: Mapping[str, str], write: Mapping[str, str] | None = None,
          since: str = "0.2") -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that live elsewhere now.

    names: old name -> where it is, as "featherweight.balance.Ladder". write: old name -> the line to write instead,
    where that is called otherwise. since: the minor version that moved them; the old names go two minor versions later.
    Getting a name that never was is an AttributeError.
    """
    lines = {**names, **(write or {})}
    known = {name: OldName(place, lines[name], gone(since)) for name, place in names.items()}
    MOVED.update({f"{module}.{name}": there for name, there in known.items()})

    def getattr_(name: str) -> Any:
        if name not in known:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        there = known[name]
        tell(f"{module}.{name}", there.line, since)
        folder, _, new = there.place.rpartition(".")
        return getattr(importlib.import_module(folder), new)

    return getattr_


__all__ = ["MOVED", "OldName", "gone", "moved", "tell"]
