"""The tensors of a tree of modules by dotted name: where each of them lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Part(nn.Module):
    """A bare container: it holds parameters and buffers under their original names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a part of a Network holds tensors only; call the Network itself")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: under ``leaf`` in a table ("_parameters" or "_buffers") of a module. owner: None is the root
    of the tree, which refers to its places and would never be freed at once if they referred to it."""

    owner: nn.Module | None
    table: str
    leaf: str

    def tensor(self, root: nn.Module) -> Tensor | None:
        found: Tensor | None = self._table(root).get(self.leaf)
        return found

    def put(self, root: nn.Module, tensor: Tensor) -> None:
        self._table(root)[self.leaf] = tensor

    def _table(self, root: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = (root if self.owner is None else self.owner).__dict__[self.table]
        return found


def places(root: nn.Module) -> dict[str, Place]:
    """Where every tensor lies, by dotted name: parameters first, each kind in the order of ``root.named_modules()``."""
    kinds: dict[str, dict[str, Place]] = {"_parameters": {}, "_buffers": {}}
    modules: list[tuple[str, nn.Module]] = [("", root)]
    while modules:
        prefix, module = modules.pop()
        for table, found in kinds.items():
            for leaf in module.__dict__[table]:
                found[prefix + leaf] = Place(None if module is root else module, table, leaf)
        modules += reversed([(f"{prefix}{name}.", m) for name, m in module._modules.items() if m is not None])
    return kinds["_parameters"] | kinds["_buffers"]


def holder(root: nn.Module, name: str, create: bool = False) -> tuple[nn.Module, str]:
    """The module that holds what has this dotted name, and its name there. create: missing modules are made."""
    *path, leaf = name.split(".")
    module = root
    for step in path:
        child = module._modules.get(step)
        if child is None:
            if not create:
                raise KeyError(f"no tensor named {name!r}")
            if step in module._parameters or step in module._buffers:
                raise KeyError(f"{name!r} lies under a tensor")
            child = module._modules[step] = Part()
        module = child
    return module, leaf


def remove(root: nn.Module, name: str) -> None:
    """Removes one name of a tensor; containers left empty go with it. Raises KeyError if there is none."""
    owner, leaf = holder(root, name)
    if owner._parameters.pop(leaf, None) is None and owner._buffers.pop(leaf, None) is None:
        raise KeyError(f"no tensor named {name!r}")
    owner._non_persistent_buffers_set.discard(leaf)
    parent = name.rpartition(".")[0]
    while parent:
        above, leaf = holder(root, parent)
        part = above._modules[leaf]
        if part is None or part._parameters or part._buffers or part._modules:
            return
        del above._modules[leaf]
        parent = parent.rpartition(".")[0]
