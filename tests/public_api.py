"""The public surface as text: every public name with its signature, fields and methods.   python tests/public_api.py

``public_api.txt`` beside this file holds what was meant; ``make api`` writes it anew. Public are the names in the
``__all__`` of ``featherweight`` and of the folders and files right below it; of a file without one, what it defines.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import pkgutil
from collections.abc import Container, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import featherweight as fw

FILE = Path(__file__).with_suffix(".txt")
OURS = fw.__name__
#: parts of the package that are no library: the command's own, and small files that nobody is told of
INSIDE = {"cli", "demo", "files", "processes", "seeds"}


def modules() -> list[ModuleType]:
    """``featherweight`` itself, then the public folders and files by name."""
    names = [m.name for m in pkgutil.iter_modules(fw.__path__) if m.name not in INSIDE]
    found = [fw, *(importlib.import_module(f"{OURS}.{name}") for name in names), fw.scores]
    return [m for m in found if names_of(m)]


def names_of(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is None and not hasattr(module, "__path__"):
        listed = [n for n, v in vars(module).items() if not n.startswith("_")
                  and getattr(v, "__module__", None) == module.__name__]
    return sorted(listed or ())


def names() -> Iterator[tuple[str, Any]]:
    """(full name, what it is) of every public class and function, each once under the name that comes first."""
    seen: set[int] = set()
    for module in modules():
        for name in names_of(module):
            value = getattr(module, name)
            if callable(value) and id(value) not in seen:
                seen.add(id(value))
                yield f"{module.__name__}.{name}", value


def text() -> str:
    """Every public name in a line; below a class its fields and methods, indented."""
    public = {value: full for full, value in names()}
    lines: list[str] = []
    for module in modules():
        lines += ["", f"# {module.__name__}"]
        for name in names_of(module):
            value, full = getattr(module, name), f"{module.__name__}.{name}"
            if isinstance(value, ModuleType):
                lines.append(f"{full}: module {value.__name__}")
            elif not callable(value):
                lines.append(f"{full}: {type(value).__name__}")
            elif public[value] != full:
                lines.append(f"{full} = {public[value]}")
            elif inspect.isclass(value):
                bases = ", ".join(base.__name__ for base in value.__bases__)
                lines += [f"class {full}({bases})", *(f"    {line}" for line in members(value, public))]
            else:
                lines.append(f"{full}{signature(value)}")
    return "\n".join(lines).strip() + "\n"


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {Raw.of(field.default) if callable(field.default) else repr(field.default)}"
    return "" if field.default_factory is dataclasses.MISSING else f" = {Raw.of(field.default_factory)}()"


def members(cls: type, public: Container[Any] = ()) -> Iterator[str]:
    """Fields with defaults, or how it is made; then public methods and properties, except those of ``public`` bases."""
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    if issubclass(cls, enum.Enum):
        yield from (f"{m.name} = {m.value!r}" for m in cls)
    elif fields:
        yield from (f"{f.name}: {f.type}{default(f)}" for f in fields.values())
    elif "__init__" in vars(cls) and not getattr(cls, "_is_protocol", False):
        yield f"__init__{signature(vars(cls)['__init__'])}"
    own = [c for c in cls.__mro__ if c.__module__.startswith(OURS) and (c is cls or c not in public)]
    for name in sorted({n for c in own for n in vars(c) if not n.startswith("_") or n == "__call__"} - {*fields}):
        value = next(vars(c)[name] for c in own if name in vars(c))
        if isinstance(value, property):
            yield f"property {name}{signature(value.fget)}"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{type(value).__name__} {name}{signature(value.__func__)}"
        elif inspect.isfunction(value):
            yield f"{name}{signature(value)}"


def signature(function: Any) -> str:
    """As it stands in the source."""
    given = inspect.signature(function)
    plain = [p.replace(annotation=Raw.of(p.annotation), default=shown(p.default)) for p in given.parameters.values()]
    return str(given.replace(parameters=plain, return_annotation=Raw.of(given.return_annotation)))


def shown(value: Any) -> Any:
    """A default as it is shown: functions and classes by name, objects by their class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return Raw(f"{type(value).__name__}(...)")
    return Raw.of(value) if callable(value) else value


class Raw(str):
    """A text that prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    @staticmethod
    def of(given: Any) -> Any:
        """An annotation as it was written; of a default, a function or class by its name; what is missing, as it is."""
        if given is inspect.Signature.empty:
            return given
        if isinstance(given, str):
            return Raw(given)
        return Raw(getattr(given, "__qualname__", None) or repr(given))


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
