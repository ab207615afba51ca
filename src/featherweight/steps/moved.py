"""Public names that moved: the old spelling works for a version, and warns with the line to write instead."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that live elsewhere now.

    names: old name -> where it is, as "featherweight.balance.Ladder". What is no such name is an AttributeError.
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].rpartition(".")
        warnings.warn(f"{module}.{name} is now {names[name]}; the old name goes with version 0.3", DeprecationWarning,
                      stacklevel=2)
        return getattr(importlib.import_module(place), new)

    return getattr_


__all__ = ["moved"]
