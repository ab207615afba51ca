"""Names of steps and objectives, the same in Python, TOML and stored states: "family.Class", and options to name."""

from __future__ import annotations

import dataclasses
from typing import Any

#: "mine.Step" -> class, of steps of one's own (``recipe.register``)
REGISTERED: dict[str, type] = {}
OURS = __name__.partition(".")[0]


def kind_of(step: Any) -> str:
    """The kind of a step: "prune.Channels" of ours, wherever in its family's folder the class lies; what it was
    registered as; else its class's full name."""
    cls = type(step)
    package, _, inner = cls.__module__.partition(".")
    if package == OURS:
        return f"{inner.partition('.')[0]}.{cls.__name__}"
    return next((kind for kind, known in REGISTERED.items() if known is cls), f"{cls.__module__}.{cls.__qualname__}")


def options(step: Any, complete: bool = False) -> dict[str, Any]:
    """The options of a step that are not at their defaults; all of them where it is to be ``complete``."""
    found = {}
    for f in dataclasses.fields(step):
        value = getattr(step, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if f.init and (complete or type(value) is not type(default) or value != default):
            found[f.name] = value
    return found


__all__ = ["REGISTERED", "kind_of", "options"]
