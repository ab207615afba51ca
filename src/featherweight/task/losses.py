"""Losses of the common kinds of task, on whatever a model gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.task.scores import main_output, numbers, tokens


def cross_entropy(output: Any, target: Any, **options: Any) -> Tensor:
    """Of the logits in an output, [n, classes, ...], and targets [n, ...]."""
    return functional.cross_entropy(main_output(output), torch.as_tensor(target), **options)


def squared_error(output: Any, target: Any) -> Tensor:
    """Mean squared difference."""
    given, wanted = numbers(output, target)
    return functional.mse_loss(given, wanted)


def token_loss(output: Any, target: Any, shift: bool = True, ignore: int = -100) -> Tensor:
    """Cross entropy of tokens."""
    logits, wanted = tokens(output, target, shift)
    return functional.cross_entropy(logits.flatten(0, 1), wanted.to(logits.device).flatten(), ignore_index=ignore)


__all__ = ["cross_entropy", "squared_error", "token_loss"]
