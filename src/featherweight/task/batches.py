"""Batches: inputs and targets, how a network is called with them, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Batch = tuple[Inputs, Any]
Predict = Callable[..., Any]


def call(predict: Predict, inputs: Inputs) -> Any:
    """Calls ``predict`` with the inputs of one batch: a tensor alone, a tuple as positions, a mapping as keywords.

    Example:
        >>> fw.task.call(network, images).shape
        torch.Size([32, 4])
        >>> fw.task.call(lambda a, b: a + b, (1, 2)), fw.task.call(lambda a, b: a + b, {"b": 2, "a": 1})
        (3, 3)
    """
    if isinstance(inputs, Tensor):
        return predict(inputs)
    if isinstance(inputs, Mapping):
        return predict(**inputs)
    return predict(*inputs)


def batch_size(inputs: Inputs) -> int:
    """Number of samples in one batch: the length of the first tensor's first axis.

    Example:
        >>> fw.task.batch_size({"image": torch.zeros(8, 3, 32, 32)})
        8
    """
    if isinstance(inputs, Tensor):
        return int(inputs.shape[0])
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next(int(v.shape[0]) for v in values if isinstance(v, Tensor))


def move(value: Any, device: torch.device | str) -> Any:
    """The same nest of tensors on ``device``.

    Example:
        >>> fw.task.move({"image": images, "ids": [1, 2]}, "cpu")["ids"]
        [1, 2]
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: move(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    return value


__all__ = ["Batch", "Inputs", "Predict", "batch_size", "call", "move"]
