"""The training batches of one epoch: reproducible, the same after a resume, each process its own share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from featherweight.errors import TaskError
from featherweight.seeds import seed_all
from featherweight.task import SPLITS, Batch, Task, batch_size, move


def epoch(task: Task, seed: int, skip: int, limit: int | None, rank: int, world: int,
          drop_single: bool) -> Iterator[Batch]:
    """This process's batches of one pass over the train split: ``rank::world``, a last incomplete round left out.

    The pass draws from generators seeded with ``seed`` and kept apart from those of the training itself, so the first
    ``skip`` rounds can be drawn and thrown away and all that follows is as it was. ``drop_single``: a batch of one
    sample is left out if there were larger ones, since one sample has no batch variance.
    """
    seed_all(seed)
    state = torch.get_rng_state()
    stream = _usable(task, limit, drop_single)
    for index in range(1 << 62):
        outside = torch.get_rng_state()
        torch.set_rng_state(state)
        batches = list(islice(stream, world))
        state = torch.get_rng_state()
        torch.set_rng_state(outside)
        if len(batches) < world:
            return
        if index >= skip:
            yield batches[rank]


def _usable(task: Task, limit: int | None, drop_single: bool) -> Iterator[Batch]:
    largest = 0
    for inputs, target in task.batches("train", limit):
        size = batch_size(inputs)
        largest = max(largest, size)
        if not (drop_single and size == 1 and largest > 1):
            yield inputs, target


def rounds(task: Task, seed: int, limit: int | None, world: int, drop_single: bool) -> int:
    """Optimizer steps in one epoch: told by ``len()`` of the pass where it has one, else counted."""
    seed_all(seed)
    try:
        count = len(task.start("train"))  # type: ignore[arg-type]
    except TypeError:
        count = sum(1 for _ in _usable(task, limit, drop_single))
    count = min(count, limit) if limit is not None else count
    if count < world:
        raise TaskError(f"the train split gave {count} batches for {world} process(es); expected at least one each: "
                        "check Task(train=...), it must start a fresh pass at every call")
    return count // world


def on_device(task: Task, device: torch.device) -> Task:
    """The same task with batches that lie on ``device``."""
    if device.type == "cpu":
        return task

    def moved(split: str) -> Any:
        return lambda: OnDevice(task.start(split), device)

    return dataclasses.replace(task, **{s: moved(s) for s in SPLITS if task.has(s)})


class OnDevice:
    """A pass over batches, each moved to a device; it has a length if the pass has."""

    def __init__(self, batches: Any, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Any:
        return (move(batch, self.device) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)
