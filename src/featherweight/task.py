"""What a network is for: how to feed it, train it, calibrate it and score it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import TaskError

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Batch = tuple[Inputs, Any]
Predict = Callable[..., Any]
Split = Callable[[], Iterable[Batch]]
SPLITS = ("train", "calibration", "validation", "test")


def call(predict: Predict, inputs: Inputs) -> Any:
    """Calls ``predict`` with the inputs of one batch: a tensor alone, a tuple as positions, a mapping as keywords."""
    if isinstance(inputs, Tensor):
        return predict(inputs)
    if isinstance(inputs, Mapping):
        return predict(**inputs)
    return predict(*inputs)


def batch_size(inputs: Inputs) -> int:
    """Number of samples in one batch: the length of the first tensor's first axis."""
    if isinstance(inputs, Tensor):
        return int(inputs.shape[0])
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next(int(v.shape[0]) for v in values if isinstance(v, Tensor))


def move(value: Any, device: torch.device | str) -> Any:
    """The same nest of tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: move(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    return value


@dataclass(frozen=True)
class Task:
    """Data and judgement. The four splits are kept apart by who may read them.

    Each split is a function that starts a fresh pass over batches ``(inputs, target)``; ``inputs`` is a tensor, a tuple
    or a dict. ``train`` feeds Fits (reshuffle inside the function if wanted), ``calibration`` feeds plans (ranges,
    scores), ``validation`` measures every step and guides choices, ``test`` is read once, by the final measurement.

    loss: ``loss(output, target)`` -> scalar tensor.
    score: ``score(predict, batches)`` -> float, higher is better; ``predict`` is the Network or the deployed file.
    """

    train: Split | None = None
    calibration: Split | None = None
    validation: Split | None = None
    test: Split | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    score: Callable[[Predict, Iterable[Batch]], float] | None = None
    score_name: str = "score"

    def has(self, split: str) -> bool:
        return getattr(self, split) is not None

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        """A fresh pass over ``split``, at most ``limit`` batches of it."""
        if split not in SPLITS:
            raise TaskError(f"no split named {split!r}; expected one of {', '.join(SPLITS)}")
        start: Split | None = getattr(self, split)
        if start is None:
            raise TaskError(
                f"this needs the task's {split} split and none was given; write Task({split}=lambda: my_loader, ...)"
            )
        for index, batch in enumerate(start()):
            if limit is not None and index >= limit:
                return
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise TaskError(
                    f"the {split} split gave {type(batch).__name__}; expected pairs (inputs, target), "
                    "target None where there is none"
                )
            yield batch[0], batch[1]

    def require(self, *names: str) -> None:
        """Raises a TaskError naming the first of ``names`` (splits, "loss", "score") that was not given."""
        for name in names:
            if getattr(self, name) is None:
                raise TaskError(f"this needs the task's {name} and none was given; write Task({name}=..., ...)")
