"""Channel shuffles: a view that splits an axis, a permutation, and a view that makes it one axis again.

Step by step, such a chain allows only cuts that leave as many channels in every part. Taken together it is one
reordering of channels, after which any channels may go: the cut network picks the others by their positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
from torch.fx import Node

from featherweight.axes.labels import Field, Ints, Labels, Shuffle, Value
from featherweight.axes.rules.basics import first, operators, rule
from featherweight.axes.rules.views import permuted, reshaped, taken
from featherweight.axes.trace import Trace
from featherweight.network import Network
from featherweight.network.operators import schema_argument as argument

VIEWS = set(operators("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int"))
PERMUTATIONS = set(operators("permute", "transpose.int", "swapaxes", "swapdims"))
COPIES = set(operators("contiguous", "clone", "alias", "detach"))
LONGEST = 12  #: calls in a chain


def shuffles(network: Network, trace: Trace) -> Iterator[Shuffle]:
    """All chains of views and permutations that give back the shape they were given, one axis reordered."""
    for node in network.graph.nodes:
        if node.target not in VIEWS:
            continue
        chain = [node]
        while len(chain) < LONGEST:
            before = chain[-1].args[0]
            if not isinstance(before, Node) or before.name not in trace.shapes:
                break
            if trace.shape(before) == trace.shape(node):
                found = _order(trace, before, chain[::-1])
                if found is not None:
                    yield Shuffle(before.name, node.name, *found, tuple(n.name for n in chain[1:]))
                break
            if before.target not in VIEWS | PERMUTATIONS | COPIES or len(before.users) > 1:
                break
            chain.append(before)


def _order(trace: Trace, source: Node, chain: list[Node]) -> tuple[int, Ints] | None:
    """The axis that a chain reorders, and how; None if it is none or several."""
    if not any(n.target in PERMUTATIONS for n in chain):
        return None
    shape, moved = trace.shape(source), {}
    for dim, size in enumerate(shape):
        scratch = _scratch(trace)
        scratch.values[source.name] = Labels(shape, (Field((dim,), np.arange(size)),) if size > 1 else ())
        for node in chain:
            step = reshaped if node.target in VIEWS else permuted if node.target in PERMUTATIONS else first
            scratch.values[node.name] = step(scratch, node) if step is not first else scratch.of(node.args[0])
        last = scratch.of(chain[-1])
        fields = last.fields if last is not None else ()
        if size > 1 and (len(fields) != 1 or fields[0].dims != (dim,)):
            return None
        if size > 1 and not np.array_equal(fields[0].atoms, np.arange(size)):
            moved[dim] = fields[0].atoms
    return next(iter(moved.items())) if len(moved) == 1 else None


def _scratch(trace: Trace) -> Trace:
    other = copy.copy(trace)
    other.values, other.pairs, other.frozen, other.grids = {}, [], [], []
    return other


def reordered(trace: Trace, shuffle: Shuffle, node: Node) -> Value:
    """The labels after a chain."""
    x = trace.values[shuffle.source]
    assert isinstance(x, Labels)
    return taken(trace, x, shuffle.dim, shuffle.order, x.shape, node)


@rule("channel_shuffle", "native_channel_shuffle")
def shuffled(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    return taken(trace, x, 1, channel_order(node, x), x.shape, node)


def channel_order(node: Node, x: Labels) -> Ints:
    """[channels]: which channel stands at each place after ``channel_shuffle``."""
    found: Ints = np.arange(x.shape[1]).reshape(int(argument(node, "groups")), -1).T.ravel()
    return found
