"""Which context a symbol of a matrix falls into, and which contexts serve a matrix best.

``rows`` says how symbols are coded under them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featherweight.codec import entropy
from featherweight.codec.entropy import Symbols

TRIED = 1 << 16  #: symbols by which contexts are chosen
CODES = 32  #: of rows and of columns
LEFT = (2, 1, 1)  #: weights of the magnitudes one, two and three columns to the left
PER_SYMBOL, PER_CONTEXT = 0.8, 6  #: bytes of a histogram, about
#: what is tried: (contexts by rows and columns, codes to an octave), then (group, cap, contexts by what stands left)
BUSY = ((2, 1), (4, 1), (8, 2), (16, 2))
BESIDE = ((9, 1, 3), (9, 4, 5), (8, 1, 3), (8, 4, 5))


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

    def of(self, symbols: Symbols, phase: int) -> Symbols:
        """The contexts of the columns at this place of their groups; ``symbols`` [r, c] hold those left of them."""
        step = max(self.group, 1)
        reached = np.searchsorted(self.busy, np.arange(2 * CODES), side="right").astype(np.uint8)
        found: Symbols = reached[self.row_codes[:, None] + self.column_codes[None, phase::step]]
        if self.group:
            found *= len(self.left) + 2
        if phase:
            found += self._reached_left(symbols, phase, found.shape[1])
        return found

    def _reached_left(self, symbols: Symbols, phase: int, width: int) -> Symbols:
        """1 + how many thresholds the magnitudes left of the columns at ``phase`` reach."""
        magnitudes = np.minimum(np.abs(np.arange(256) - self.z), self.cap).astype(np.uint8)
        total, have = np.zeros((len(symbols), width), np.uint8), sum(LEFT[:phase])
        for away, weight in enumerate(LEFT[:phase], 1):
            total += weight * magnitudes[symbols[:, phase - away::self.group][:, :width]]
        values = (np.arange(4 * 15 + 1) * 4 + have // 2) // have
        return (1 + np.searchsorted(self.left, values, side="right")).astype(np.uint8)[total]


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
    for group, cap, contexts in BESIDE:
        for start in {0, min(tried)[1]}:
            beside = _beside(tried[start][2], matrix[some], some, group, cap, contexts)
            cost = _cost(beside, matrix[some], some, share)
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


def _beside(found: Contexts, some: Symbols, taken: slice, group: int, cap: int, contexts: int) -> Contexts:
    """Contexts that also look left, with about as many symbols to each class of what stands there."""
    every = np.arange(1, 4 * cap + 1, dtype=np.uint8)
    asked = Contexts(found.row_codes[taken], found.column_codes, found.z, cap, group, every[:0], every)
    counts = sum(np.bincount(asked.of(some, phase).reshape(-1), minlength=4 * cap + 2)
                 for phase in asked.phases() if phase)
    cuts = _cuts(np.asarray(counts, np.float64)[1:], contexts) if some.shape[1] > 1 else every[:0]
    return Contexts(found.row_codes, found.column_codes, found.z, cap, group, found.busy, cuts)


def _cuts(counts: NDArray[np.float64], parts: int) -> Symbols:
    """Values 1.. at which ``counts`` of 0, 1, .. are cut into so many parts of about the same sum; fewer where one
    value is more than a part."""
    middle = (np.cumsum(counts) - counts / 2) / max(counts.sum(), 1.0)
    return (np.flatnonzero(np.diff(np.floor(middle * parts))) + 1).astype(np.uint8)


def _cost(contexts: Contexts, some: Symbols, taken: slice, share: float) -> float:
    """Bytes of a whole matrix of which ``some`` rows are a ``share``, about."""
    here = Contexts(contexts.row_codes[taken], contexts.column_codes, contexts.z, contexts.cap, contexts.group,
                    contexts.busy, contexts.left)
    joint = np.zeros((contexts.count, 256), np.int64)
    step = max(contexts.group, 1)
    for phase in contexts.phases():
        pairs = here.of(some, phase).astype(np.intp) << 8 | some[:, phase::step]
        joint += np.bincount(pairs.reshape(-1), minlength=joint.size).reshape(joint.shape)
    totals = joint.sum(1)
    bits = (totals * np.log2(np.maximum(totals, 1))).sum() - (joint * np.log2(np.maximum(joint, 1))).sum()
    side = sum(entropy.entropy_bytes(c) + 10 for c in (contexts.row_codes, contexts.column_codes))
    return float(bits / 8 / share + side + PER_SYMBOL * (joint > 0).sum() + PER_CONTEXT * (totals > 0).sum())


__all__ = ["CODES", "Contexts", "chosen"]
