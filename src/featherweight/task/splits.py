"""One set of samples as train, validation and test splits: by a seed, or as it came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.task.batches import Batch

SPLITS = ("train", "validation", "test")


def parted(count: int, validation: float, test: float, seed: int) -> dict[str, Tensor]:
    """The numbers of the samples of each split, drawn with ``seed``; validation, test: their shares. Raises TaskError
    where a split that is asked for, or the training, would be empty."""
    if not (0 < validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise TaskError(f"validation={validation}, test={test}; expected shares that leave some samples to train on: "
                        "validation=0.1, test=0.1")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    ends = round(count * test), round(count * (test + validation))
    found = {"test": order[:ends[0]], "validation": order[ends[0]:ends[1]], "train": order[ends[1]:]}
    empty = [name for name, own in found.items() if not len(own) and (name != "test" or test)]
    if empty:
        raise TaskError(f"{count} samples are too few for validation={validation}, test={test}: {empty[0]} would be "
                        "empty")
    return {name: own for name, own in found.items() if len(own)}


def passes(index: Tensor, batch: int, make: Callable[[Sequence[int]], Batch], shuffled: bool) -> Callable[
        [], Iterator[Batch]]:
    """A split: a function that starts a pass over these samples, in another order each time where ``shuffled``."""
    def started() -> Iterator[Batch]:
        order = index[torch.randperm(len(index))] if shuffled else index
        for start in range(0, len(order), batch):
            yield make(order[start:start + batch].tolist())
    return started


__all__ = ["SPLITS", "parted", "passes"]
