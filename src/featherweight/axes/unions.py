"""Connected components over arrays of atoms: which positions live and die together once all is said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featherweight.axes.labels import Ints


def solve(parent: Ints, pairs: Sequence[tuple[Ints, Ints]]) -> Ints:
    """Smallest atom of each connected component: every root hooks to its smallest neighbour, then paths are halved."""
    if not pairs:
        return parent
    a, b = (np.concatenate([p[i] for p in pairs]) for i in (0, 1))
    while True:
        ra, rb = parent[a], parent[b]
        differ = ra != rb
        if not differ.any():
            return parent
        a, b, ra, rb = a[differ], b[differ], ra[differ], rb[differ]
        np.minimum.at(parent, np.maximum(ra, rb), np.minimum(ra, rb))
        while True:
            above = parent[parent]
            if (above == parent).all():
                break
            parent = above


def resolve_grids(parent: Ints, grids: Sequence[Ints]) -> Ints:
    """What is kept of a field over several axes must be a block: it is cut along its longest varying axis, and all
    positions along the others go together."""
    for grid in grids:
        roots = parent[grid]
        varies = [i for i in range(grid.ndim) if not (roots == roots.take([0], axis=i)).all()]
        if len(varies) < 2:
            continue
        cut = max(varies, key=lambda i: (grid.shape[i], i))
        first = roots
        for axis in (i for i in range(grid.ndim) if i != cut):
            first = first.take([0], axis=axis)
        parent = solve(parent, [_distinct(roots.ravel(), np.broadcast_to(first, roots.shape).ravel(), len(parent))])
    return parent


def _distinct(a: Ints, b: Ints, count: int) -> tuple[Ints, Ints]:
    """The pairs of different atoms below ``count``, each once: a grid over space says the same at every place."""
    differ = a != b
    pairs = np.unique(a[differ] * count + b[differ])
    return pairs // count, pairs % count
