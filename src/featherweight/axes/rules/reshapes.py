"""Labels through a reshape, which splits axes and merges them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.fx import Node

from featherweight.axes.labels import Field, Labels
from featherweight.axes.trace import Trace, simplify

#: elements; labels larger than this are not followed
LIMIT = 1 << 24


def chunks(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest split of a reshape from shape ``a`` to shape ``b`` into runs of axes with equal products."""
    found, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        left, right, pa, pb = [], [], 1, 1
        if i < len(a):
            left, pa, i = [i], a[i], i + 1
        if j < len(b):
            right, pb, j = [j], b[j], j + 1
        while pa != pb:
            if pa < pb:
                left, pa, i = [*left, i], pa * a[i], i + 1
            else:
                right, pb, j = [*right, j], pb * b[j], j + 1
        found.append((left, right))
    return found


def reshape(trace: Trace, x: Labels, shape: tuple[int, ...], node: Node) -> Labels:
    """Labels after a reshape: element by element, then axes along which the atoms do not vary are let go."""
    parts = chunks(x.shape, shape)
    of = {d: i for i, (left, _) in enumerate(parts) for d in left}
    touched = [sorted({of[d] for d in f.dims}) for f in x.fields]
    fields = []
    for i, (f, mine) in enumerate(zip(x.fields, touched, strict=True)):  # of those merged into one, the longest goes on
        others = {c for j, (g, theirs) in enumerate(zip(x.fields, touched, strict=True)) for c in theirs
                  if (-g.atoms.size, j) < (-f.atoms.size, i)}
        before = [d for c in mine for d in parts[c][0]]
        after = [d for c in mine for d in parts[c][1]]
        if set(mine) & others:
            trace.freeze(f, node, "it merges two axes of channels")
            continue
        if np.prod([x.shape[d] for d in before]) > LIMIT:
            trace.freeze(f, node, "it merges too many elements to follow")
            continue
        atoms = f.atoms.reshape([x.shape[d] if d in f.dims else 1 for d in before])
        atoms = np.broadcast_to(atoms, [x.shape[d] for d in before]).reshape([shape[d] for d in after])
        simple = simplify(trace, Field(tuple(after), atoms), node)
        if simple is not None:
            fields.append(simple)
    return Labels(shape, tuple(fields), x.stored)
