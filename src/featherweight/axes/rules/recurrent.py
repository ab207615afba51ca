"""How labels pass recurrent layers: a hidden unit goes with its gates, its columns and its state."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from featherweight.axes.labels import Cost, Field, Ints, Labels, Value
from featherweight.axes.rules.basics import rule, unknown
from featherweight.axes.trace import Trace
from featherweight.network.operators import schema_argument as argument

#: rows of a weight per hidden unit: input, forget, cell and output gate; reset, update and new gate; one
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def gates_of(node: Node) -> int:
    """Rows of a recurrent call's weights per hidden unit."""
    return GATES[str(node.target).removeprefix("aten.").partition(".")[0]]


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent(trace: Trace, node: Node) -> Value:
    """Layer by layer, direction by direction. A unit whose weights are zero stays at zero, if it starts there."""
    x = trace.of(argument(node, "input"))
    given, biases = list(argument(node, "params")), bool(argument(node, "has_biases"))
    layers, ways = int(argument(node, "num_layers")), 1 + bool(argument(node, "bidirectional"))
    per = 4 if biases else 2
    per += len(given) == layers * ways * (per + 1)  # a projection has one tensor more
    if x is None or len(given) != layers * ways * per or any(trace.canonical(p) is None for p in given):
        return unknown(trace, node)
    gates = gates_of(node)
    plain = trace.plain(node)
    assert isinstance(plain, list)
    steps = int(np.prod(plain[0].shape[:-1]))
    read = trace.axis(x, len(x.shape) - 1, node)
    units: list[Ints | None] = []
    inner: list[Ints | None] = []
    for layer in range(layers):
        made: list[Ints | None] = []
        for way in range(ways):
            at = (layer * ways + way) * per
            unit, given_on = _cell(trace, node, given[at:at + per], (read, gates, steps))
            inner.append(unit)
            made.append(given_on)
        units += made
        known = [m for m in made if m is not None]
        read = np.concatenate(known) if len(known) == ways else None
    _states(trace, node, (units, inner))
    out = Labels(plain[0].shape, (Field((len(plain[0].shape) - 1,), read),) if read is not None else ())
    return [out, *(_state(p.shape, own) for p, own in zip(plain[1:], (units, inner), strict=False))]


def _cell(trace: Trace, node: Node, params: list[Any],
          given: tuple[Ints | None, int, int]) -> tuple[Ints | None, Ints | None]:
    """Ties the tensors of one layer in one direction; gives its hidden units, and what of them it gives: themselves,
    or what a matrix makes of them."""
    read, gates, steps = given
    values = [trace.of(p) for p in params]
    units, made = None, _projected(trace, node, params, steps)
    for i, (p, v) in enumerate(zip(params, values, strict=True)):
        if made is not None and i == len(params) - 1:
            trace.tie(units, made[1], node, "it reads an axis that is never cut")
            continue
        assert v is not None
        trace.role(p, "weight" if i < 2 else "bias", node, out=0 if i < 2 else None)
        rows = trace.axis(v, 0, node)
        if rows is None or rows.size == gates:
            for atoms in (rows, read if i == 0 else None, trace.axis(v, 1, node) if i < 2 else None):
                trace.freeze(atoms, node, "one hidden unit")
            continue
        own = trace.unite_along(rows.reshape(gates, -1), 0)
        if units is None:
            units = own
        trace.unite(units, own)
        if i < 2:
            columns = trace.axis(v, 1, node)
            fed = units if made is None else made[0]
            trace.tie(read if i == 0 else fed, columns, node, "it reads an axis that is never cut")
            labelled = tuple(a for a in (rows, columns) if a is not None)
            factor = np.prod(v.shape) / np.prod([a.size for a in labelled])
            trace.costs.append(Cost(node.name, float(factor * steps / trace.batch), labelled))
    return units, units if made is None else made[0]


def _projected(trace: Trace, node: Node, params: list[Any],
               steps: int) -> tuple[Ints | None, Ints | None] | None:
    """The rows and columns of the matrix that an LSTM multiplies its units with (``proj_size``); None without one."""
    if len(params) % 2 == 0:
        return None
    matrix = trace.of(params[-1])
    assert matrix is not None
    trace.role(params[-1], "weight", node, out=0)
    rows, columns = trace.axis(matrix, 0, node), trace.axis(matrix, 1, node)
    known = tuple(a for a in (rows, columns) if a is not None)
    factor = np.prod(matrix.shape) / np.prod([a.size for a in known])
    trace.costs.append(Cost(node.name, float(factor * steps / trace.batch), known))
    return rows, columns


def _states(trace: Trace, node: Node, made: tuple[list[Ints | None], list[Ints | None]]) -> None:
    """All layers' first states [layers * ways, sample, unit] lie in one tensor: unit i goes from all layers at once.
    made: what the layers give, and their hidden units, which the second state is of."""
    start = argument(node, "hx")
    for state, units in zip(start if isinstance(start, (list, tuple)) else [start], made, strict=False):
        x = trace.of(state)
        atoms = trace.axis(x, len(x.shape) - 1, node) if x is not None else None
        if x is not None:
            trace.untouchable(x, range(len(x.shape) - 1), node, "layers and samples")
        for own in units:
            trace.tie(own, atoms, node, "its first state is never cut")


def _state(shape: tuple[int, ...], units: list[Ints | None]) -> Labels:
    """The last states, laid out like the first ones."""
    return Labels(shape, (Field((len(shape) - 1,), units[0]),) if units[0] is not None else ())


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
def filled(trace: Trace, node: Node) -> Value:
    """One number everywhere: axes of fixed length follow whatever they meet."""
    shape = trace.shape(node)
    if "like" in str(node.target):
        x = trace.of(node.args[0])
        return Labels(shape, x.fields if x is not None else ())
    sizes = argument(node, "size")
    fields = tuple(Field((d,), trace.fresh(s)) for d, s in enumerate(shape) if isinstance(sizes[d], int) and s > 1)
    return Labels(shape, fields)
