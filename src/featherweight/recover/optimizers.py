"""Optimizers by name, and their state as plain tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: name -> optimizer, given groups of parameters, the learning rate, the momentum (AdamW: its first beta)
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float, float], Optimizer]] = {
    "sgd": lambda groups, lr, momentum: torch.optim.SGD(groups, lr=lr, momentum=momentum),
    "adamw": lambda groups, lr, momentum: torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999)),
}


def groups(tensors: Iterable[Tensor], own: Iterable[Tensor], weight_decay: float,
           decay_vectors: bool) -> list[dict[str, Any]]:
    """Parameter groups: ``tensors`` of the network under weight decay (one-axis ones only if ``decay_vectors``), and
    the drivers' ``own``, which are never decayed."""
    decayed: list[Tensor] = []
    free = list(own)
    for tensor in tensors:
        (decayed if decay_vectors or tensor.dim() > 1 else free).append(tensor)
    found = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [g for g in found if g["params"]]


def pack(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors by "index/key", and what is no tensor by the same names."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}/{key}"] = value
    return tensors, numbers


def unpack(optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Puts back what ``pack`` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **numbers}.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
