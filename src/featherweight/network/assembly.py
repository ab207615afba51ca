"""Assembly: a model captured in parts. The parts are Networks; what is between them stays the user's Python."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.network.file.file import save_parts
from featherweight.network.network import Network


class Assembly(nn.Module):
    """``model`` with its largest capturable children replaced in place by ``parts`` (module path -> Network).

    ``notes`` says why the whole could not be captured and which children stay Python, with the reason. Every part can
    be compressed and exported by itself; ``replace(path, network)`` puts the result back.

    Example:
        >>> class Sometimes(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.part = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.part(x) if x.sum() > 0 else x
        >>> assembly = fw.capture(Sometimes(), torch.ones(2, 4))
        >>> list(assembly.parts)
        ['part']
        >>> part = assembly.parts["part"]
        >>> assembly.replace("part", fw.quantize.Quantize(activations=None).plan(part, fw.Task()).apply(part))
    """

    def __init__(self, model: nn.Module, parts: dict[str, Network], notes: list[str]) -> None:
        super().__init__()
        self.model = model
        self.parts = dict(parts)
        self.notes = list(notes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def replace(self, path: str, network: Network) -> None:
        """Puts ``network`` in the place of the part at ``path``."""
        if path not in self.parts:
            raise KeyError(f"no part at {path!r}; the parts are {', '.join(self.parts)}")
        put(self.model, path, network)
        self.parts[path] = network

    def save(self, path: str | Path) -> int:
        """Writes parts and remaining tensors as one file; read it with ``load(path, into=model)``."""
        parts = {name: network.snapshot() for name, network in self.parts.items()}
        return save_parts(parts, outside(self.model, self.parts.values()), self.notes, path)


#: attributes of a child that its network takes over
PLAIN = (bool, int, float, str, tuple, torch.dtype)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the child of ``model`` at a dotted path, wherever else in the model that same child stands too."""
    parent, _, leaf = path.rpartition(".")
    try:
        old = model.get_submodule(parent)._modules[leaf]
    except (AttributeError, KeyError) as error:
        raise KeyError(f"the model has no module at {path!r}") from error
    for name, value in vars(old).items():  # the Python around it may ask for its sizes
        if isinstance(value, PLAIN) and not name.startswith("_") and not hasattr(module, name):
            setattr(module, name, value)
    for holder in list(model.modules()):
        for name, child in list(holder._modules.items()):
            if child is old:
                holder._modules[name] = module


def outside(model: nn.Module, parts: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The state of ``model`` without what lies in the parts (under whatever path they stand)."""
    held = list(parts)
    inside = tuple(f"{path}." for path, module in model.named_modules(remove_duplicate=False)
                   if any(module is part for part in held))
    return {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
