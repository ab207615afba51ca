"""The tensors of a tree of modules by dotted name, and which names are those of one tensor."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class Part(nn.Module):
    """A bare container: it holds parameters and buffers under their original names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a part of a Network holds tensors only; call the Network itself")

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        other = memo[id(self)] = Part()
        copy_tensors(self, other, memo)
        return other


def copy_tensors(root: nn.Module, other: nn.Module, memo: dict[int, Any]) -> None:
    """Gives ``other`` copies of all parts, parameters and buffers of ``root``; ``copy.deepcopy`` of a module copies two
    dozen tables of hooks as well, which costs more than the tensors. memo: that of ``copy.deepcopy``, by which ties
    stay ties."""
    for table in ("_modules", "_parameters", "_buffers"):
        getattr(other, table).update((name, copy.deepcopy(held, memo)) for name, held in getattr(root, table).items())
    other._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
    other.training = root.training


def named(root: nn.Module) -> dict[str, Tensor]:
    """Every tensor by dotted name, tied ones under each name: parameters first, each kind in the order of
    ``root.named_modules()``."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    modules: list[tuple[str, nn.Module]] = [("", root)]
    while modules:
        prefix, module = modules.pop()
        parameters.update((prefix + leaf, t) for leaf, t in module._parameters.items() if t is not None)
        buffers.update((prefix + leaf, t) for leaf, t in module._buffers.items() if t is not None)
        modules += reversed([(f"{prefix}{name}.", m) for name, m in module._modules.items() if m is not None])
    return parameters | buffers


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


def lookup(root: nn.Module, name: str) -> Tensor:
    """The tensor of this dotted name. Raises KeyError if there is none."""
    owner, leaf = holder(root, name)
    for table in (owner._parameters, owner._buffers):
        if table.get(leaf) is not None:
            return table[leaf]  # type: ignore[return-value]
    raise KeyError(f"no tensor named {name!r}")


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


class Ties:
    """The names of every tensor, looked for once. It holds no tensor: what it says is checked against who asks."""

    def __init__(self) -> None:
        self._names: dict[int, list[str]] = {}

    def names(self, root: nn.Module, name: str) -> list[str]:
        """All names of the tensor ``name``. Raises KeyError if there is none."""
        tensor = lookup(root, name)
        if not self._holds(root, name, tensor):
            self._names = {}
            for known, other in named(root).items():
                self._names.setdefault(id(other), []).append(known)
        return list(self._names[id(tensor)])

    def moved(self, old: Tensor, new: Tensor) -> None:
        """``new`` has the names that ``old`` had."""
        self._names[id(new)] = self._names.pop(id(old))

    def came(self, tensor: Tensor) -> None:
        """A tensor has one name more; it may be its first."""
        if id(tensor) in self._names:
            self._names = {}

    def gone(self, name: str, tensor: Tensor) -> None:
        """A tensor has one name less; its place in memory may soon be another's."""
        names = self._names.get(id(tensor), [])
        if name in names:
            names.remove(name)
        if not names:
            self._names.pop(id(tensor), None)

    def _holds(self, root: nn.Module, name: str, tensor: Tensor) -> bool:
        names = self._names.get(id(tensor), [])
        try:
            return name in names and all(lookup(root, n) is tensor for n in names)
        except KeyError:
            return False
