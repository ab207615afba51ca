"""What those who choose a ``Quantize`` have in common: the split they judge on, and the step they choose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.quantize.step import Quantize
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.task import Batch, Task, move


def plain(step: Quantize, **changes: Any) -> Quantize:
    """The ``Quantize`` with the options of ``step``, which may have more of them, and with ``changes``."""
    return Quantize(**{f.name: getattr(step, f.name) for f in fields(Quantize)} | changes)


def data(network: Network, task: Task, split: str, batches: int | None) -> Iterator[Batch]:
    """A pass over a split, on the network's device."""
    device = device_of(network)
    return ((move(x, device), move(y, device)) for x, y in task.batches(split, batches))


def scored(network: Network, task: Task, split: str, batches: int | None) -> float:
    """The task's score of ``network``, which is in evaluation mode; minus infinity where it is not a number.

    What the split draws at random it draws alike each time."""
    task.require("score")
    assert task.score is not None
    with generators_kept(), torch.no_grad():
        seed_all(seed_from("quantize", split))
        found = float(task.score(network, data(network, task, split, batches)))
    return -math.inf if math.isnan(found) else found


__all__ = ["data", "plain", "scored"]
