"""Names of steps and objectives, the same in Python, TOML and stored states: "family.Class", and options to name."""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache
from types import ModuleType
from typing import Any

#: "mine.Step" -> class, of steps of one's own (``recipe.register``)
REGISTERED: dict[str, type] = {}
OURS = __name__.partition(".")[0]
#: the folders whose steps, objectives and plans come with the package
FAMILIES = ("prune", "factorize", "share", "quantize", "distill", "recover", "balance")


@cache
def families() -> dict[str, ModuleType]:
    """The families by name, loaded. Names are loaded when they are asked for, and what a family puts into a table (its
    plans, its candidates) is there when the family is: whoever looks something up by name loads them first."""
    return {name: importlib.import_module(f"{OURS}.{name}") for name in FAMILIES}


def kind_of(step: Any) -> str:
    """The kind of a step: "prune.Channels" of ours, wherever in its family's folder the class lies; what it was
    registered as; else its class's full name."""
    cls = type(step)
    package, _, inner = cls.__module__.partition(".")
    if package == OURS:
        return f"{inner.partition('.')[0]}.{cls.__name__}"
    return next((kind for kind, known in REGISTERED.items() if known is cls), f"{cls.__module__}.{cls.__qualname__}")


def options(step: Any) -> dict[str, Any]:
    """The options of a step that are not at their defaults."""
    found = {}
    for f in dataclasses.fields(step):
        value = getattr(step, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if f.init and (type(value) is not type(default) or value != default):
            found[f.name] = value
    return found


__all__ = ["FAMILIES", "OURS", "REGISTERED", "families", "kind_of", "options"]
