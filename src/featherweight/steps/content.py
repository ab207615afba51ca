"""What a function, a module or any other object does, as one digest: whether a stored result is of this one is known by
it.

Functions count with their code, defaults, what they close over, and the globals that they name; modules with their
tensors, plain attributes and code; objects of the user's own classes with their attributes and code; files by name and
length. What belongs to an installed package is known by its name, and by its length where it has one.

Lists, dicts and attributes may change while a job runs (a counter, a log): of those that one function or object holds,
what they held when they were first looked at in this process counts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from featherweight.network import Network
from featherweight.network.file.digest import digest
from featherweight.steps.kinds import OURS

#: function or object -> the ids of what it holds that may change, with each itself and its first digest
_FIRST: WeakKeyDictionary[Any, dict[int, tuple[Any, bytes]]] = WeakKeyDictionary()
#: folders of installed packages
INSTALLED = ("site-packages", "dist-packages")
#: where a data set of Hugging Face says what it holds
HUGGING_FACE = "_fingerprint"
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def content(given: Any) -> str:
    """SHA-256 (hex) of what ``given`` is and does, the same in another process."""
    return _Walk(given).digest(given).hex()


class _Walk:
    """One object gone through. owner: what holds all the rest."""

    def __init__(self, owner: Any) -> None:
        self.inside: set[int] = set()
        self.done: dict[int, tuple[Any, bytes]] = {}  # with the objects, as a number may be given to another later
        try:
            self.first = _FIRST.setdefault(owner, {})
        except TypeError:  # it can neither be referred to weakly nor be a key
            self.first = {}

    def digest(self, value: Any) -> bytes:
        key, how = id(value), next(how for kinds, how in FORMS if isinstance(value, kinds))
        if key in self.done:
            return self.done[key][1]
        if key in self.inside:  # it holds itself
            return b"again"
        self.inside.add(key)
        found = how(self, value)
        self.inside.discard(key)
        if not isinstance(value, (*PLAIN, tuple)):
            self.done[key] = value, found
        return found

    def all(self, kind: str, values: Iterable[Any]) -> bytes:
        total = hashlib.sha256(kind.encode())
        for value in values:
            total.update(self.digest(value))
        return total.digest()

    def held(self, value: Any, parts: Callable[[], bytes]) -> bytes:
        """The digest of something that may change while a job runs."""
        if id(value) not in self.first:
            self.first[id(value)] = value, parts()
        return self.first[id(value)][1]

    # ---- values
    def plain(self, value: Any) -> bytes:
        return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).digest()

    def tensor(self, value: Tensor) -> bytes:
        flat = value.detach().cpu().contiguous().reshape(-1)
        total = hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        return total.digest()

    def array(self, value: np.ndarray[Any, Any]) -> bytes:
        if value.dtype.hasobject:
            return self.all(f"{value.shape}", value.reshape(-1).tolist())
        total = hashlib.sha256(f"{value.dtype}{value.shape}".encode())
        total.update(np.ascontiguousarray(value).tobytes())
        return total.digest()

    def file(self, value: Path) -> bytes:
        return self.plain(f"{value} {value.stat().st_size if value.is_file() else ''}")

    def row(self, value: tuple[Any, ...] | range) -> bytes:
        return self.all("row", value)

    def list(self, value: Any) -> bytes:
        return self.held(value, lambda: self.all("list", value))

    def set(self, value: Any) -> bytes:
        return self.held(value, lambda: self.all("set", sorted(map(self.digest, value))))

    def mapping(self, value: Mapping[Any, Any]) -> bytes:
        return self.held(value, lambda: self.all("mapping", itertools.chain(*value.items())))

    # ---- code
    def partial(self, value: functools.partial[Any]) -> bytes:
        return self.all("partial", (value.func, value.args, tuple(sorted(value.keywords.items()))))

    def method(self, value: types.MethodType) -> bytes:
        return self.all("method", (value.__func__, value.__self__))

    def function(self, value: types.FunctionType) -> bytes:
        cells = tuple(cell.cell_contents for cell in value.__closure__ or () if _holds(cell))
        given = value.__defaults__, tuple(sorted((value.__kwdefaults__ or {}).items())), cells
        if not _own(value.__module__):
            return self.all(f"{value.__module__}.{value.__qualname__}", given)
        named = {name: value.__globals__[name] for name in sorted(_names(value.__code__)) if name in value.__globals__}
        return self.all("function", (value.__code__, *given, tuple(named.items())))

    def code(self, value: types.CodeType) -> bytes:
        return self.all("code", (value.co_code, value.co_names, value.co_consts))

    def kind(self, value: type) -> bytes:
        name = f"{value.__module__}.{value.__qualname__}"
        if not _own(value.__module__):
            return self.plain(name)
        plain = {key: part for key, part in vars(value).items() if not key.startswith("__") or callable(part)}
        return self.all(name, (value.__bases__, tuple(
            (key, getattr(part, "__func__", getattr(part, "fget", part))) for key, part in sorted(plain.items())
            if isinstance(part, (*PLAIN, tuple, types.FunctionType, staticmethod, classmethod, property)))))

    # ---- objects
    def network(self, value: Network) -> bytes:
        return bytes.fromhex(digest(value))

    def module(self, value: nn.Module) -> bytes:
        parts = [(name, type(part), tuple((k, v) for k, v in vars(part).items()
                                          if isinstance(v, (*PLAIN, tuple)) and k != "training"))
                 for name, part in value.named_modules()]
        return self.all(repr(value), (tuple(parts), tuple(value.state_dict().items())))

    def data(self, value: DataLoader[Any]) -> bytes:
        return self.all("data", (value.batch_size, value.drop_last, value.dataset))

    def tensors(self, value: TensorDataset) -> bytes:
        return self.all("tensors", value.tensors)

    def part(self, value: Subset[Any]) -> bytes:
        return self.all("part", (tuple(value.indices), value.dataset))

    def parts(self, value: ConcatDataset[Any]) -> bytes:
        return self.all("parts", value.datasets)

    def any(self, value: Any) -> bytes:
        cls = type(value)
        if isinstance(getattr(value, "__wrapped__", None), types.FunctionType):  # as ``functools.cache`` leaves it
            return self.digest(value.__wrapped__)
        if dataclasses.is_dataclass(value):
            fields = tuple((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return self.all("fields", (cls, fields))
        if _own(cls.__module__) and hasattr(value, "__dict__"):
            return self.all("object", (cls, vars(value)))
        return self.known(value)

    def known(self, value: Any) -> bytes:
        """By name alone, and by length."""
        try:
            length = len(value)
        except Exception:  # whatever an object that has none raises
            length = None
        return self.plain((getattr(value, "__qualname__", type(value).__qualname__), length,
                           getattr(value, HUGGING_FACE, None)))


#: kinds of values -> how each is gone through; the first that fits
FORMS: tuple[tuple[Any, Callable[[_Walk, Any], bytes]], ...] = (
    (PLAIN, _Walk.plain), (Tensor, _Walk.tensor), (np.ndarray, _Walk.array), (Path, _Walk.file),
    ((tuple, range), _Walk.row), (list, _Walk.list), ((set, frozenset), _Walk.set),
    (type(os.environ), _Walk.known), (Mapping, _Walk.mapping),
    (functools.partial, _Walk.partial), (types.MethodType, _Walk.method), (types.FunctionType, _Walk.function),
    (types.CodeType, _Walk.code), (type, _Walk.kind), (Network, _Walk.network), (nn.Module, _Walk.module),
    (DataLoader, _Walk.data), (TensorDataset, _Walk.tensors), (Subset, _Walk.part), (ConcatDataset, _Walk.parts),
    (object, _Walk.any))


def _own(module: str | None) -> bool:
    """Whether code of this module is the user's, and not an installed package's."""
    root = str(module).partition(".")[0]
    if root in {*sys.stdlib_module_names, OURS} - {"__main__"}:
        return False
    file = getattr(sys.modules.get(str(module)), "__file__", None) or ""
    return not any(folder in Path(file).parts for folder in INSTALLED)


def _names(code: types.CodeType) -> set[str]:
    """Names that the code, and the code within it, may look up."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _holds(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is bound later
        return False
    return True


__all__ = ["content"]
