"""Public names that moved: the old spelling works for a version, and warns with the line to write instead."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(module: str, names: Mapping[str, str], write: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that live elsewhere now.

    names: old name -> where it is, as "featherweight.balance.Ladder". write: old name -> the line to write instead,
    where that is called otherwise. What is no such name is an AttributeError.
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].rpartition(".")
        new_line = (write or {}).get(name, names[name])
        warnings.warn(f"{module}.{name} is now {new_line}; the old name goes with version 0.3", DeprecationWarning,
                      stacklevel=2)
        return getattr(importlib.import_module(place), new)

    return getattr_


__all__ = ["moved"]
