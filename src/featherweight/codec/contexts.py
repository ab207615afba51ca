"""Which context a symbol of a matrix falls into, and which contexts serve a matrix best.

``rows`` says how symbols are coded under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featherweight.codec import entropy
from featherweight.codec.entropy import Symbols

TRIED = 1 << 16  #: symbols by which contexts are chosen
CODES = 32  #: of rows and of columns
LEFT = (2, 1, 1)  #: weights of the magnitudes one, two and three columns to the left
PER_SYMBOL, PER_CONTEXT = 0.8, 6  #: bytes of a histogram, about
#: what is tried: (contexts by rows and columns, codes to an octave), then (cap, contexts by what stands left)
BUSY = ((2, 1), (4, 1), (8, 2), (16, 2))
BESIDE = ((1, 3), (4, 5))
GROUPS = (9, 8)  #: of columns; the first that divides their number, else the last


@dataclass(frozen=True)
class Contexts:
    """What a reader knows of a matrix before its symbols: codes of rows and of columns, z, cap and group of
    magnitudes, and thresholds of both."""

    row_codes: Symbols
    column_codes: Symbols
    z: int
    cap: int
    group: int
    busy: Symbols
    left: Symbols

    @property
    def count(self) -> int:
        """Contexts that there may be."""
        return (len(self.busy) + 1) * (len(self.left) + 2 if self.group else 1)

    def phases(self) -> range:
        """Places of a column in its group that occur."""
        return range(min(max(self.group, 1), len(self.column_codes)))

    def of(self, symbols: Symbols, phase: int, left: Symbols | None = None) -> Symbols:
        """The contexts of the columns at this place of their groups; ``symbols`` [r, c] hold those left of them. left:
        what stands left of them, if that is known (``stands_left``)."""
        step = max(self.group, 1)
        reached = np.searchsorted(self.busy, np.arange(2 * CODES), side="right").astype(np.uint8)
        found: Symbols = reached[self.row_codes[:, None] + self.column_codes[None, phase::step]]
        if self.group:
            found *= len(self.left) + 2
        if phase:
            given = stands_left(symbols, self.z, self.cap, self.group, phase) if left is None else left
            over = np.searchsorted(self.left, np.arange(4 * 15 + 1), side="right")
            found += (1 + over).astype(np.uint8)[given]
        return found


def stands_left(symbols: Symbols, z: int, cap: int, group: int, phase: int) -> Symbols:
    """Four times the weighted mean of the magnitudes left of the columns at ``phase`` of their groups, 0..60."""
    magnitudes = np.minimum(np.abs(np.arange(256) - z), cap).astype(np.uint8)
    width, have = len(range(phase, symbols.shape[1], group)), sum(LEFT[:phase])
    total = np.zeros((len(symbols), width), np.uint8)
    for away, weight in enumerate(LEFT[:phase], 1):
        total += weight * magnitudes[symbols[:, phase - away::group][:, :width]]
    values = (np.arange(4 * 15 + 1) * 4 + have // 2) // have
    return np.minimum(values, 255).astype(np.uint8)[total]


def chosen(matrix: Symbols) -> Contexts:
    """The contexts under which some rows of a matrix take the fewest bytes, of those that are tried."""
    counts = np.bincount(matrix.reshape(-1), minlength=256)
    z = int(counts.argmax())
    symbols = np.arange(256, dtype=np.float32)
    weights = (symbols != z).astype(np.float32) if counts[z] > 0.3 * matrix.size else np.abs(
        symbols - np.float32((counts * symbols).sum() / matrix.size))
    busy = weights[matrix]
    some = slice(None, None, max(1, matrix.size // TRIED))
    share = len(matrix[some]) / len(matrix)
    tried = [(_cost(c, matrix[some], some, share), n, c) for n, c in enumerate(
        _by_busyness(busy, contexts, octave, z) for contexts, octave in BUSY)]
    least, _, best = min(tried)
    group = next((g for g in GROUPS if not matrix.shape[1] % g), GROUPS[-1])
    for cap, contexts in BESIDE:
        left = [stands_left(matrix[some], z, cap, group, p) if p else None for p in range(min(group, matrix.shape[1]))]
        for start in sorted({0, min(tried)[1]}):
            beside = _beside(tried[start][2], left, group, cap, contexts)
            cost = _cost(beside, matrix[some], some, share, left)
            if cost < least:
                least, best = cost, beside
    return best


def _by_busyness(busy: NDArray[np.float32], contexts: int, octave: int, z: int) -> Contexts:
    """Contexts with about as many symbols each, by the means of rows and of columns."""
    mean = max(float(busy.mean(dtype=np.float64)), 1e-9)
    codes = []
    for axis in (1, 0):
        means = (busy.sum(axis, dtype=np.float64) / mean + 2) / (busy.shape[axis] + 2)
        logs = np.round(octave * np.log2(np.maximum(means, 2.0 ** -16)))
        codes.append(np.clip(logs - logs.max() + CODES - 1, 0, CODES - 1).astype(np.uint8))
    low = [int(c.min()) for c in codes]
    rows, columns = (c - np.uint8(least) for c, least in zip(codes, low, strict=True))
    of_sums = np.convolve(np.bincount(rows).astype(np.float64), np.bincount(columns).astype(np.float64))
    return Contexts(rows, columns, z, 1, 0, _cuts(of_sums, contexts), np.zeros(0, np.uint8))


def _beside(found: Contexts, left: Sequence[Symbols | None], group: int, cap: int, contexts: int) -> Contexts:
    """Contexts that also look left, with about as many symbols to each class of what stands there. left: that, of the
    columns at each place of their groups but the first."""
    counts = sum((np.bincount(own.reshape(-1), minlength=4 * cap + 1) for own in left if own is not None),
                 np.zeros(4 * cap + 1, np.int64))
    cuts = _cuts(np.asarray(counts, np.float64), contexts) if counts.any() else np.zeros(0, np.uint8)
    return Contexts(found.row_codes, found.column_codes, found.z, cap, group, found.busy, cuts)


def _cuts(counts: NDArray[np.float64], parts: int) -> Symbols:
    """Values 1.. at which ``counts`` of 0, 1, .. are cut into so many parts of about the same sum; fewer where one
    value is more than a part."""
    middle = (np.cumsum(counts) - counts / 2) / max(counts.sum(), 1.0)
    return (np.flatnonzero(np.diff(np.floor(middle * parts))) + 1).astype(np.uint8)


def _cost(contexts: Contexts, some: Symbols, taken: slice, share: float,
          left: Sequence[Symbols | None] | None = None) -> float:
    """Bytes of a whole matrix of which ``some`` rows are a ``share``, about."""
    here = Contexts(contexts.row_codes[taken], contexts.column_codes, contexts.z, contexts.cap, contexts.group,
                    contexts.busy, contexts.left)
    size, step = int(some.max()) + 1, max(contexts.group, 1)
    parts = [(here.of(some, phase, None if left is None else left[phase]) * np.intp(size) + some[:, phase::step])
             .reshape(-1) for phase in contexts.phases()]
    joint = np.bincount(np.concatenate(parts), minlength=contexts.count * size).reshape(contexts.count, size)
    totals, there = joint.sum(1), joint[joint > 0]
    bits = (totals * np.log2(np.maximum(totals, 1))).sum() - (there * np.log2(there)).sum()
    side = sum(entropy.entropy_bytes(c) + 10 for c in (contexts.row_codes, contexts.column_codes))
    return float(bits / 8 / share + side + PER_SYMBOL * there.size + PER_CONTEXT * (totals > 0).sum())


__all__ = ["CODES", "Contexts", "chosen"]
