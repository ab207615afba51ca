"""Labels on the elements of axes.

An *atom* is an integer that stands for one position of one axis of one stored tensor. A value in the graph carries, for
the axes that may be cut, the atom of every position; axes that are never cut (batch, space, sequence) carry none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Field:
    """Atoms over one or several axes of a value. ``dims`` rise; ``atoms`` has one axis for each of them.

    A view that splits an axis keeps one field over both new axes; a view that merges them again flattens it.
    """

    dims: tuple[int, ...]
    atoms: Ints


@dataclass(frozen=True)
class Labels:
    """Shape of a value and its fields, each axis in one of them at most.

    stored: it is computed from stored tensors alone (no input of the network reaches it).
    """

    shape: tuple[int, ...]
    fields: tuple[Field, ...] = ()
    stored: bool = False

    def field(self, dim: int) -> Field | None:
        """The field that covers axis ``dim``."""
        return next((f for f in self.fields if dim in f.dims), None)

    def moved(self, shape: Sequence[int], where: Callable[[int], int]) -> Labels:
        """The same fields at other axes: axis ``d`` becomes axis ``where(d)`` of a value of this shape."""
        fields = []
        for f in self.fields:
            new = [where(d) for d in f.dims]
            order = sorted(range(len(new)), key=new.__getitem__)
            fields.append(Field(tuple(new[i] for i in order), f.atoms.transpose(order)))
        return Labels(tuple(shape), tuple(fields), self.stored)


Value = Labels | list[Labels] | None


@dataclass(frozen=True)
class Frozen:
    """Atoms that must stay, and who says so."""

    atoms: Ints
    path: str
    reason: str


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one call for one sample: ``factor`` times the numbers of kept atoms of the ``axes``."""

    node: str
    factor: float
    axes: tuple[Ints, ...]


class AtomSets:
    """Sets of atoms, none of them empty, of which it is asked again and again how many are kept."""

    def __init__(self, sets: Sequence[Ints]) -> None:
        self._atoms = np.concatenate([s.ravel() for s in sets]) if sets else np.zeros(0, np.int64)
        self._starts = np.cumsum([0, *(s.size for s in sets)])[:-1]

    def count(self, kept: npt.NDArray[np.bool_]) -> list[int]:
        """How many of each set stay; ``kept`` [atoms] says which do."""
        if not len(self._starts):
            return []
        counts: list[int] = np.add.reduceat(kept[self._atoms], self._starts, dtype=np.int64).tolist()
        return counts


@dataclass(frozen=True)
class Shuffle:
    """Node ``last`` is node ``source`` with position ``order[p]`` of axis ``dim`` at ``p``; ``inner`` lie between."""

    source: str
    last: str
    dim: int
    order: Ints
    inner: tuple[str, ...]
