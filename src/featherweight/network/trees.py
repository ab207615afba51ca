"""Nested inputs and outputs: flattened to a list of leaves, rebuilt as the types they came in, described in JSON."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from featherweight.errors import FileError

Spec = pytree.TreeSpec
DEPTH = 64  #: containers within one another that a file may describe


def flatten(value: Any) -> tuple[list[Any], Spec]:
    """The leaves of a nest in order, and the nest without them."""
    return pytree.tree_flatten(value)


def unflatten(leaves: Iterable[Any], spec: Spec) -> Any:
    """The nest that ``flatten`` took apart, with these leaves."""
    return pytree.tree_unflatten(list(leaves), spec)


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of a nest."""
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor) and v.is_floating_point()]


def register_dataclasses(value: Any) -> None:
    """Makes the dataclasses found in ``value`` known to torch's pytrees, so that a graph may return them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            register_dataclasses(getattr(value, f.name))
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
    elif isinstance(value, Mapping):
        for item in value.values():
            register_dataclasses(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            register_dataclasses(item)


def to_json(spec: Spec) -> Any:
    """The shape of a nest as JSON: ``{"kind", "items"}`` for every container, a number for every leaf.

    Kinds: tuple, list, dict, ordereddict, and "named:NAME" for every other type that has fields (named tuples,
    dataclasses, mappings such as transformers' outputs), written by its qualified name.
    """

    def describe(value: Any) -> Any:
        if isinstance(value, int):
            return value
        if type(value) in (tuple, list):
            return {"kind": type(value).__name__, "items": [describe(v) for v in value]}
        if type(value) in (dict, OrderedDict):
            return {"kind": type(value).__name__.lower(), "items": [[k, describe(v)] for k, v in value.items()]}
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if dataclasses.is_dataclass(value):
            pairs = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        elif isinstance(value, Mapping):
            pairs = list(value.items())
        elif hasattr(value, "_fields"):
            pairs = list(zip(value._fields, value, strict=True))
        else:
            raise FileError(f"an output of type {name} cannot be written; return tensors, tuples, lists, dicts or "
                            "dataclasses")
        return {"kind": f"named:{name}", "items": [[k, describe(v)] for k, v in pairs if v is not None]}

    return describe(unflatten(range(spec.num_leaves), spec))


def from_json(value: Any, types: Mapping[str, type] | None = None) -> Spec:
    """Rebuilds what ``to_json`` wrote. A file never names code to import: a named type becomes a dict unless the
    caller passes the type itself in ``types`` (qualified name -> class)."""
    known = types or {}

    def build(value: Any, depth: int = 0) -> Any:
        if depth > DEPTH:
            raise FileError(f"a nest of inputs or outputs is more than {DEPTH} containers deep")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("items"), list):
            raise FileError(f"a nest of inputs or outputs is described by {str(value)[:80]!r}; expected kind and items")
        kind, items = value.get("kind"), value["items"]
        if kind in ("tuple", "list"):
            built = [build(item, depth + 1) for item in items]
            return tuple(built) if kind == "tuple" else built
        if not all(isinstance(i, list) and len(i) == 2 and isinstance(i[0], (str, int, bool)) for i in items):
            raise FileError(f"the fields of a {str(kind)[:80]!r} are no list of pairs (name, value)")
        pairs = [(k, build(v, depth + 1)) for k, v in items]
        if kind == "ordereddict":
            return OrderedDict(pairs)
        if kind == "dict":
            return dict(pairs)
        if isinstance(kind, str) and kind.startswith("named:"):
            cls = known.get(kind.removeprefix("named:"))
            return dict(pairs) if cls is None else cls(**dict(pairs))
        raise FileError(f"unknown kind of nest {str(kind)[:80]!r}; expected tuple, list, dict, ordereddict, named:...")

    nest = build(value)
    register_dataclasses(nest)
    leaves, spec = flatten(nest)
    if sorted(leaves) != list(range(len(leaves))) or leaves != sorted(leaves):
        raise FileError("a nest of inputs or outputs numbers its leaves wrongly")
    return spec
