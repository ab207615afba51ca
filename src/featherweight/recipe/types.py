"""The classes of a network's outputs, which a file names and the job has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from featherweight.network import Network, trees


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
