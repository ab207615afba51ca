"""``load``: a network, or a model in parts, from its ``.fw`` file."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from featherweight.errors import FileError
from featherweight.network.assembly import Assembly, outside, put
from featherweight.network.file.file import Parts, read
from featherweight.network.network import Network
from featherweight.network.snapshot import Snapshot


def load(path: str | Path, into: nn.Module | None = None,
         types: Mapping[str, type] | None = None, operators: Collection[str] = ()) -> Network | Assembly:
    """Reads what ``save`` wrote.

    into: for a model saved in parts, a fresh instance of its class; its parts are replaced and its tensors set. Parts
        give the classes that its own modules know by name, where its Python asks for their attributes.
    types: classes (by qualified name) that named outputs are rebuilt as; without, they come back as dicts.
    operators: names of operators that the graph may call although capturing rarely gives them, such as
    "aten.diff.default": trust the file's author before you name one. The error of a load without says which.

    Raises FileError for anything that is not such a file: truncated, damaged, of another kind, or hostile. Every call
    of the graph is tried by its shapes before any is computed.

    Example:
        >>> size = network.save("network.fw")
        >>> torch.equal(fw.load("network.fw")(images), network(images))
        True
    """
    if not isinstance(path, (str, os.PathLike)):
        raise FileError(f"load was given {path!r}; expected the path of a saved network: fw.load(\"network.fw\")")
    if into is not None:
        types = {**_classes(into), **(types or {})}
    found = read(path, types, [operators] if isinstance(operators, str) else operators)
    if isinstance(found, Snapshot):
        if into is not None:
            raise FileError(f"{path} holds a whole network, no class is needed: write fw.load({str(path)!r})")
        return network_of(found)
    if into is None:
        raise FileError(f"{path} holds a model in parts ({', '.join(found.parts)[:200]}): write "
                        f"fw.load({str(path)!r}, into=YourModel())")
    return _assemble(into, found)


def _classes(model: nn.Module) -> dict[str, type]:
    """Qualified name -> class, of all classes with fields that the code of ``model``'s modules can name: those of the
    files that define them, and those that their ``forward`` closes over. Nothing is imported."""
    found: list[Any] = []
    for cls in {base for module in model.modules() for base in type(module).__mro__ if base is not object}:
        if not cls.__module__.startswith("torch."):
            found += vars(sys.modules[cls.__module__]).values() if cls.__module__ in sys.modules else ()
            forward = inspect.unwrap(vars(cls)["forward"]) if callable(vars(cls).get("forward")) else None
            cells = getattr(forward, "__closure__", None) or ()
            found += [cell.cell_contents for cell in cells if not _is_empty(cell)]
    return {f"{c.__module__}.{c.__qualname__}": c for c in found if isinstance(c, type) and (
        dataclasses.is_dataclass(c) or hasattr(c, "_fields") or issubclass(c, Mapping))}


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def network_of(snapshot: Snapshot) -> Network:
    """The network of a snapshot that came from a file. Raises FileError where its names do not fit together."""
    try:
        return Network.of(snapshot)
    except Exception as error:
        raise FileError(f"the graph is malformed: {type(error).__name__}: {str(error)[:200]}") from error


def _assemble(into: nn.Module, found: Parts) -> Assembly:
    name = type(into).__name__
    parts = {path: network_of(snapshot) for path, snapshot in found.parts.items()}
    for path, part in parts.items():
        try:
            put(into, path, part)
        except KeyError as error:
            raise FileError(f"the file holds a part at {path[:80]!r}, but {name} has no module there; pass a fresh "
                            "instance of the class that was captured") from error
    rest: Mapping[str, Tensor] = found.outside
    wanted = outside(into, parts.values())
    wrong = sorted(k for k in wanted.keys() ^ rest.keys() if k not in wanted or k not in rest)
    wrong += [k for k in wanted.keys() & rest.keys() if wanted[k].shape != rest[k].shape]
    if wrong:
        raise FileError(f"{name} does not fit the file, which was written from another class: {wrong[0]!r} is missing, "
                        f"too much or of another shape ({len(wrong)} such)")
    into.load_state_dict(dict(rest), strict=False)
    return Assembly(into.eval(), parts, found.notes)


__all__ = ["load", "network_of"]
