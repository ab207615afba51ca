"""Recurrent layers' arguments, checked as ``torch.nn``'s modules check them: the kernels below trust them.

The operators take an input [n, t, i] (or [t, n, i]), states [layers * directions, n, h], and for every layer and
direction the weights [gates * h, i], [gates * h, h] and their biases; an LSTM with projections has states [.., p],
weights [gates * h, p] and one more, [p, h].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import InputError

aten = torch.ops.aten
#: operator -> gates of a cell
GATES: dict[Any, int] = {aten.lstm.input: 4, aten.gru.input: 3, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}


def checked(target: Any) -> Callable[..., Any]:
    """A call's target; a recurrent layer's checks its arguments first, and raises InputError where they do not fit."""
    return functools.partial(_call, target) if target in GATES else target


def _call(target: Any, given: Tensor, states: Any, weights: Sequence[Tensor], has_biases: bool, layers: int,
          dropout: float, train: bool, bidirectional: bool, batch_first: bool) -> Any:
    tensors = [*(states if isinstance(states, (list, tuple)) else [states]), *weights]
    found = [tuple(t.shape) for t in tensors]
    wanted = _shapes(target, given, tensors, bool(has_biases), layers, 1 + bool(bidirectional), bool(batch_first))
    if found != wanted:
        raise InputError(f"{target} is given states and weights {found}; for an input {list(given.shape)} it takes "
                         f"{wanted}")
    if any(t.dtype is not given.dtype for t in tensors):
        raise InputError(f"{target} is given states and weights of {sorted({str(t.dtype) for t in tensors})} and an "
                         f"input of {given.dtype}; all have to be of one number type")
    run = results if given.device.type == "meta" else target
    return run(given, states, weights, has_biases, layers, dropout, train, bidirectional, batch_first)


def results(given: Tensor, states: Any, weights: Sequence[Tensor], has_biases: bool, layers: int, dropout: float,
            train: bool, bidirectional: bool, batch_first: bool) -> tuple[Tensor, ...]:
    """What a recurrent layer gives, as tensors whose numbers are no matter: in one step, however long the input is."""
    last = list(states) if isinstance(states, (list, tuple)) else [states]
    first, second = (given.shape[1], given.shape[0]) if batch_first else given.shape[:2]
    outputs = given.new_empty((first, second, last[0].shape[-1] * (1 + bool(bidirectional))))
    return (outputs.transpose(0, 1) if batch_first else outputs, *(torch.empty_like(state) for state in last))


def _shapes(target: Any, given: Tensor, tensors: Sequence[Tensor], biases: bool, layers: int, directions: int,
            batch_first: bool) -> list[tuple[int, ...]]:
    """The shapes that states and weights must have; their own sizes say how wide the layer is."""
    gates, several = GATES[target], 2 if target is aten.lstm.input else 1
    if given.dim() != 3 or len(tensors) <= several or not 0 < layers <= len(tensors):
        return []
    width, inner = _last(tensors[0]), _last(tensors[several - 1])  # of what a layer gives, of its cells
    batch = given.shape[0 if batch_first else 1]
    states = [(layers * directions, batch, width), (layers * directions, batch, inner)][:several]
    found: list[tuple[int, ...]] = list(states)
    for layer in range(layers):
        read = directions * width if layer else _last(given)
        one = [(gates * inner, read), (gates * inner, width), *[(gates * inner,)] * (2 * biases)]
        found += [*one, *[(width, inner)] * (width != inner)] * directions
    return found


def _last(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() else 0


__all__ = ["GATES", "checked", "results"]
