"""Plain recurrent layers (tanh, ReLU) as ONNX's RNN, of any length; the exporter has LSTM and GRU itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

aten = torch.ops.aten


def _recurrent(activation: str, given: Any, states: Any, weights: Sequence[Any], has_biases: bool, layers: int,
               dropout: float, train: bool, bidirectional: bool, batch_first: bool) -> Any:
    """``given`` [t, n, i] (or [n, t, i]), ``states`` [layers * directions, n, h]; ONNX gives [t, directions, n, h]."""
    from onnxscript.onnx_opset import opset18 as op

    directions, each = 1 + bidirectional, 2 + 2 * has_biases
    x = op.Transpose(given, perm=[1, 0, 2]) if batch_first else given
    last = []
    for layer in range(layers):
        parts = [weights[each * i: each * (i + 1)] for i in range(directions * layer, directions * (layer + 1))]
        w, r = (_stacked(op, [part[index] for part in parts]) for index in (0, 1))
        b = _stacked(op, [op.Concat(part[2], part[3], axis=0) for part in parts]) if has_biases else None
        start = op.Slice(states, _numbers(op, directions * layer), _numbers(op, directions * (layer + 1)),
                         _numbers(op, 0))
        y, end = op.RNN(x, w, r, b, None, start, activations=[activation] * directions,
                        direction="bidirectional" if bidirectional else "forward",
                        hidden_size=int(weights[1].shape[0]))
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
        last.append(end)
    ends = op.Concat(*last, axis=0) if len(last) > 1 else last[0]
    return (op.Transpose(x, perm=[1, 0, 2]) if batch_first else x), ends


def _numbers(op: Any, *numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


def _stacked(op: Any, tensors: Sequence[Any]) -> Any:
    """One tensor with an axis of directions in front."""
    return op.Concat(*(op.Unsqueeze(t, _numbers(op, 0)) for t in tensors), axis=0)


#: operator -> what the exporter writes for it
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    aten.rnn_tanh.input: partial(_recurrent, "Tanh"), aten.rnn_relu.input: partial(_recurrent, "Relu"),
}

__all__ = ["TRANSLATIONS"]
