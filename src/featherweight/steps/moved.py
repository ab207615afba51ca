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


def moved(module: str, names: Mapping[str, str], write: Mapping[str, str] | None = None,
          since: str = "0.2") -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that live elsewhere now.

    names: old name -> where it is, as "featherweight.balance.Ladder". write: old name -> the line to write instead,
    where that is called otherwise. since: the minor version that moved them; the old names go two minor versions later.
    Getting a name that never was is an AttributeError.
    """
    major, minor = map(int, since.split("."))
    lines, goes = {**names, **(write or {})}, f"{major}.{minor + 2}"
    known = {name: OldName(place, lines[name], goes) for name, place in names.items()}
    MOVED.update({f"{module}.{name}": there for name, there in known.items()})

    def getattr_(name: str) -> Any:
        if name not in known:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        there = known[name]
        warnings.warn(f"{module}.{name} is now {there.line}; the old name goes with version {there.goes}",
                      DeprecationWarning, stacklevel=2)
        folder, _, new = there.place.rpartition(".")
        return getattr(importlib.import_module(folder), new)

    return getattr_


__all__ = ["MOVED", "OldName", "moved"]
