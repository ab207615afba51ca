"""Free sizes proved: the captured graph is held against the model on other sizes, and its limits are written down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.errors import CaptureError
from featherweight.network import trees
from featherweight.network.capture.export import Attempt
from featherweight.network.capture.run import difference, run
from featherweight.network.capture.sizes.admissible import Sizes, pattern
from featherweight.network.capture.sizes.asked import resized
from featherweight.network.edit import WEIGHTED, constant_nodes, origins
from featherweight.network.network import Network
from featherweight.network.program import resolve
from featherweight.network.signature import FreeAxis, Input

aten = torch.ops.aten
LONGEST = 1 << 14  #: positions up to which the ends of tables are looked for
MOST = 1 << 24  #: elements of a value that is computed to look for them
#: operators that read a table (their first argument) at the positions in another
LOOKUPS: dict[Any, int] = {aten.embedding.default: 1, aten.index_select.default: 2, aten.index.Tensor: 1}
#: what is too much work to be done for a look at positions
HEAVY = {*WEIGHTED, aten.matmul.default, aten.bmm.default, aten.scaled_dot_product_attention.default}


@dataclass(frozen=True)
class Proof:
    """A model and its captured graph on the examples of an attempt, resized."""

    model: nn.Module
    network: Network
    attempt: Attempt
    tolerance: float

    def call(self, sizes: Sizes, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves, spec = trees.flatten((self.attempt.args, self.attempt.kwargs))
        args, kwargs = trees.unflatten(resized(leaves, list(sizes.places), size), spec)
        return args, kwargs

    def apart(self, sizes: Sizes, size: int) -> float | None:
        """How far the graph is from the model at a size; None where the model does not run."""
        args, kwargs = self.call(sizes, size)
        try:
            expected = run(self.model, args, kwargs)
        except Exception:
            return None
        return difference(expected, self.network, args, kwargs)

    def holds(self, sizes: Sizes, size: int) -> bool:
        apart = self.apart(sizes, size)
        return apart is not None and apart <= self.tolerance


def prove(proof: Proof, several: list[Sizes]) -> None:
    """Writes the limits of free sizes into the network's signature. Raises CaptureError where the graph is wrong at a
    size that no limit excludes, or where the sizes that fit follow no pattern."""
    names = _names(proof.attempt, several)
    axes: dict[int, list[FreeAxis]] = {}
    limits: dict[int, list[tuple[int, int, int | None]]] = {}
    lowest: list[int] = []
    for name, sizes in zip(names, several, strict=True):
        least, most = _ends(proof, sizes)
        lowest.append(least)
        allowed = sizes.allowed.copy()
        allowed[:least] = False
        if most is not None:
            allowed[most + 1:] = False
        found = pattern(allowed)
        if found is None:
            raise CaptureError(f"the sizes of {name!r} that the model takes follow no pattern")
        for leaf, axis in sizes.places:
            axes.setdefault(leaf, []).append(FreeAxis(axis, name, sizes.example, *found))
            if least > 1 or most is not None:
                limits.setdefault(leaf, []).append((axis, least, most))
    _check_together(proof, several, lowest)
    _write(proof.network, axes, limits)


def _write(network: Network, axes: dict[int, list[FreeAxis]], limits: dict[int, list[tuple[int, int, int | None]]]
           ) -> None:
    signature = network.signature
    leaves = [i for i in range(signature.in_spec.num_leaves) if i not in signature.constants]

    def settled(given: Input, leaf: int) -> Input:
        own = {free.axis for free in axes.get(leaf, ())}
        kept = tuple(limit for limit in given.limits if limit[0] not in own)
        return replace(given, axes=tuple(axes.get(leaf, ())), limits=(*kept, *limits.get(leaf, ())))

    inputs = tuple(settled(i, leaf) for i, leaf in zip(signature.inputs, leaves, strict=True))
    network.signature = replace(signature, inputs=inputs)


def _check_together(proof: Proof, several: list[Sizes], sizes: list[int]) -> None:
    """Raises CaptureError where graph and model differ with all free sizes at their least."""
    leaves, spec = trees.flatten((proof.attempt.args, proof.attempt.kwargs))
    for one, size in zip(several, sizes, strict=True):
        leaves = resized(leaves, list(one.places), size)
    args, kwargs = trees.unflatten(leaves, spec)
    try:
        expected = run(proof.model, args, kwargs)
    except Exception:
        return  # the model refuses them by itself
    apart = difference(expected, proof.network, args, kwargs)
    if len(several) > 1 and not apart <= proof.tolerance:
        raise CaptureError(f"with all free sizes at their least ({sizes}) the captured graph gives other outputs than "
                           f"the model (relative difference {apart:.2e})")


def _names(attempt: Attempt, several: list[Sizes]) -> list[str]:
    """The user's names, else "size_1" by the place of the axis."""
    names: list[str] = []
    for sizes in several:
        given = next((n for leaf, axis in sizes.places if (n := attempt.names[leaf].get(axis))), "")
        first = given or f"size_{sizes.places[0][1]}"
        count = sum(n == first or n.startswith(f"{first}_") for n in names)
        names.append(first if given or not count else f"{first}_{count + 1}")
    return names


def _ends(proof: Proof, sizes: Sizes) -> tuple[int, int | None]:
    """The least and the greatest size at which graph and model agree; None where nothing ends them."""
    table = _table_end(proof, sizes)
    if table is not None:
        sizes.allowed[table + 1:] = False
    ends = np.flatnonzero(sizes.allowed)
    least = _least(proof, sizes)
    above = sizes.nearest(sizes.example + max(1, sizes.example // 2), 1)
    above = int(ends[-1]) if above is None else above
    apart = proof.apart(sizes, above) if above > sizes.example else 0.0
    if apart is None:
        return least, _bisected(proof, sizes, sizes.example, above)
    if apart > proof.tolerance:
        raise CaptureError(f"at {above} along axis {sizes.places[0][1]} the captured graph gives other outputs than "
                           f"the model (relative difference {apart:.2e}): the model decides by its inputs' sizes")
    return least, None if sizes.end and table is None else int(ends[-1])


def _least(proof: Proof, sizes: Sizes) -> int:
    lowest = int(np.flatnonzero(sizes.allowed)[0])
    if proof.holds(sizes, lowest):
        return lowest
    certain = np.flatnonzero(sizes.certain & sizes.allowed)
    surest = int(certain[0]) if len(certain) else sizes.example
    if proof.holds(sizes, surest):
        return surest
    return _bisected(proof, sizes, sizes.example, surest)


def _bisected(proof: Proof, sizes: Sizes, good: int, bad: int) -> int:
    """The allowed size nearest to ``bad`` at which graph and model agree, from one at which they do."""
    known = [n for n in range(min(good, bad), max(good, bad) + 1) if sizes.allowed[n]]
    known = known if good < bad else known[::-1]
    low, high = 0, len(known) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if proof.holds(sizes, known[middle]) else (low, middle)
    return known[low]


# ---- tables
def _table_end(proof: Proof, sizes: Sizes) -> int | None:
    """The greatest size at which no table is read beyond its end, at positions that follow from the inputs without
    layers between; None if there is none up to LONGEST."""
    reads = list(_reads(proof.network))
    if not reads:
        return None
    good, bad = sizes.example, 0
    while not bad and good < LONGEST:
        larger = sizes.nearest(min(2 * good, len(sizes.allowed) - 1), -1)
        if larger is None or larger <= good:
            return None
        inside = _inside(proof, sizes, reads, larger)
        if inside is None:
            return None
        good, bad = (larger, 0) if inside else (good, larger)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if _inside(proof, sizes, reads, middle) else (good, middle)
    return good if bad else None


def _reads(network: Network) -> Iterator[tuple[Node, Node, set[Node]]]:
    """(table, positions, what these are computed from)."""
    constant = constant_nodes(network)
    for call in network.calls(*LOOKUPS):
        table, positions = call.args[0], call.args[LOOKUPS[call.target]]
        positions = positions[0] if isinstance(positions, (list, tuple)) and len(positions) == 1 else positions
        if isinstance(table, Node) and isinstance(positions, Node) and table in constant and positions not in constant:
            behind = origins(positions)
            if not any(n.target in HEAVY for n in behind):
                yield table, positions, behind


def _inside(proof: Proof, sizes: Sizes, reads: list[tuple[Node, Node, set[Node]]], size: int) -> bool | None:
    """Whether all positions lie in their tables at a size; None where it is too much to compute."""
    network = proof.network
    args, kwargs = proof.call(sizes, size)
    waiting = iter(network.signature.leaves(args, kwargs))
    needed = set().union(*(behind | {table} for table, _, behind in reads), *(origins(t) for t, _, _ in reads))
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in network.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(waiting)
            elif node in needed and node.op == "get_attr":
                values[node] = network.tensor(str(node.target))
            elif node in needed and node.op == "call_function":
                try:
                    values[node] = node.target(*(resolve(a, values.__getitem__) for a in node.args),
                                               **{k: resolve(v, values.__getitem__) for k, v in node.kwargs.items()})
                except (RuntimeError, IndexError, ValueError):
                    return False
                if isinstance(values[node], Tensor) and values[node].numel() > MOST:
                    return None
    return all(_fits(values[positions], len(values[table])) for table, positions, _ in reads)


def _fits(positions: Tensor, rows: int) -> bool:
    if positions.dtype is torch.bool or not positions.numel():
        return True
    return bool(positions.max() < rows) and bool(positions.min() >= -rows)


__all__ = ["Proof", "prove"]
