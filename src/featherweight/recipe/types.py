"""What a file only names and the job has: the classes of a network's outputs, operators beyond the written table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from featherweight.network import Network, load, trees
from featherweight.network.file.allowed import beyond, target_name


def reloaded(file: Path, original: Network) -> Network:
    """A network that a step made of ``original`` and left in a file."""
    operators = beyond(target_name(n.target) for n in original.calls())
    return load(file, types=named_types(original), operators=operators)  # type: ignore[return-value]


def named_types(network: Network) -> dict[str, type]:
    """The classes (by qualified name) that the network's outputs are made of, for ``load``."""
    spec, found = network.signature.out_spec, {}

    def visit(value: Any) -> None:
        if isinstance(value, int):
            return
        found[f"{type(value).__module__}.{type(value).__qualname__}"] = type(value)
        if dataclasses.is_dataclass(value):
            items: Iterable[Any] = [getattr(value, f.name) for f in dataclasses.fields(value)]
        else:
            items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
        for item in items:
            visit(item)

    visit(trees.unflatten(range(spec.num_leaves), spec))
    return found
