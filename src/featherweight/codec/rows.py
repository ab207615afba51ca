"""Symbols 0..255 of a matrix under contexts: how busy their row and column are, and what stands left of them.

A pruned layer is dense in some rows and columns and empty in others, and a kernel that is large in one place is so in
others, which a histogram of all symbols cannot say. The stream of ``count`` symbols is one byte of form and

    plain     (0) an order-0 stream (``entropy.py``)
    contexts  (1) varint columns; byte z, a symbol; bytes cap and group; a byte with a length and that many thresholds,
              twice: of busyness and of what stands left; varint length and a stream of each row's code, the same of the
              columns'; varint length and the deflated histograms of all contexts; varint length and the words of the
              range coder

A symbol's context is how many thresholds its row's code plus its column's reach, and how many the magnitudes left of it
in its group of columns reach (``left_of``). All columns of one place in their groups are coded at once, context by
context, so that a reader has what stands left of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import constriction
import numpy as np
from numpy.typing import NDArray

from featherweight.codec import entropy
from featherweight.codec.entropy import Symbols
from featherweight.codec.varints import read_varint, varint
from featherweight.errors import FileError

Integers = NDArray[np.integer]
_queue = constriction.stream.queue
PLAIN, CONTEXTS = 0, 1
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


def encode(symbols: Symbols, columns: int) -> bytes:
    """The shorter stream of ``symbols`` (uint8 [n]), which are the rows of a matrix with so many columns."""
    plain = bytes((PLAIN,)) + entropy.encode(symbols)
    if not 1 < columns < symbols.size or symbols.size % columns:
        return plain
    matrix = symbols.reshape(-1, columns)
    return min(plain, bytes((CONTEXTS,)) + written(matrix, chosen(matrix)), key=len)


def decode(stream: bytes, count: int) -> Symbols:
    """The ``count`` symbols that ``encode`` turned into ``stream``. Raises FileError for one that it did not write."""
    form = stream[0] if stream else -1
    if form == PLAIN:
        return entropy.decode(stream[1:], count)
    if form != CONTEXTS:
        raise FileError("a coded stream of a matrix has a form that this version does not know")
    return read(stream[1:], count).reshape(-1)


# ---- which contexts

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


# ---- the stream

def written(matrix: Symbols, contexts: Contexts) -> bytes:
    """The stream of form ``CONTEXTS`` of the symbols [rows, columns], without its first byte."""
    parts = [_sorted(matrix, contexts, phase) for phase in contexts.phases()]
    joint = np.zeros((contexts.count, 256), np.int64)
    for values, ends, _ in parts:
        for context, (start, end) in enumerate(pairwise(ends)):
            if start < end:
                joint[context] += np.bincount(values[start:end], minlength=256)
    levels = [_levels(counts) for counts in joint]
    coder, models = _queue.RangeEncoder(), [_model(own) for _, own in levels]
    for values, ends, _ in parts:
        for context, (start, end) in enumerate(pairwise(ends)):
            model = models[context]
            if start < end and model is not None:
                coder.encode(values[start:end].astype(np.int32) - levels[context][0], model)
    histograms = b"".join(bytes((first, first + max(len(own), 1) - 1)) + own.tobytes() for first, own in levels)
    head = varint(matrix.shape[1]) + bytes((contexts.z, contexts.cap, contexts.group))
    head += b"".join(bytes((len(t),)) + t.tobytes() for t in (contexts.busy, contexts.left))
    parts_after = (entropy.encode(contexts.row_codes), entropy.encode(contexts.column_codes),
                   entropy.deflate(histograms), coder.get_compressed().astype("<u4").tobytes())
    return head + b"".join(varint(len(part)) + part for part in parts_after)


def _sorted(matrix: Symbols, contexts: Contexts, phase: int) -> tuple[Symbols, list[int], NDArray[np.intp]]:
    """The symbols at a place of their groups in the order of the stream; where each context's end; their places."""
    step = max(contexts.group, 1)
    own = contexts.of(matrix, phase).reshape(-1)
    order = np.argsort(own, kind="stable")
    ends = [0, *np.cumsum(np.bincount(own, minlength=contexts.count)).tolist()]
    return matrix[:, phase::step].reshape(-1)[order], ends, order


def read(data: bytes, count: int) -> Symbols:
    """The symbols [rows, columns] that ``written`` made ``data`` of. Raises FileError for anything else."""
    contexts, at = _read_contexts(data, count)
    packed, at = _part(data, at)
    models = list(_read_models(packed, contexts.count))
    words, at = _part(data, at)
    if len(words) % 4 or at != len(data):
        raise FileError("a coded stream of a matrix does not end with a whole word")
    coder = _queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    found = np.zeros((len(contexts.row_codes), len(contexts.column_codes)), np.uint8)
    for phase in contexts.phases():
        part = found[:, phase::max(contexts.group, 1)]
        values, ends, order = _sorted(found, contexts, phase)
        for context, (start, end) in enumerate(pairwise(ends)):
            if start < end:
                first, model = models[context]
                values[start:end] = first if model is None else _decoded(coder, model, end - start, first)
        flat = np.empty(part.size, np.uint8)
        flat[order] = values
        part[:] = flat.reshape(part.shape)
    return found


def _read_contexts(data: bytes, count: int) -> tuple[Contexts, int]:
    columns, at = read_varint(data, 0)
    if not 0 < columns <= count or count % columns:
        raise FileError(f"a coded stream claims {columns} columns for {count} symbols")
    z, cap, group = data[at:at + 3].ljust(3, b"\xff")
    thresholds, at = [], at + 3
    for _ in range(2):
        size = data[at] if at < len(data) else 255
        thresholds.append(np.frombuffer(data[at + 1:at + 1 + size], np.uint8))
        at += 1 + size
    rows, at = _codes(data, at, count // columns)
    across, at = _codes(data, at, columns)
    found = Contexts(rows, across, z, cap, group, *thresholds)
    if not 0 < cap < 16 or group > 16 or at > len(data) or found.count > 255:
        raise FileError("a coded stream of a matrix has contexts that this version does not know")
    return found, at


def _codes(data: bytes, at: int, count: int) -> tuple[Symbols, int]:
    side, at = _part(data, at)
    codes = entropy.decode(side, count)
    if codes.max() >= CODES:
        raise FileError(f"a coded stream of a matrix has a code of {codes.max()}; expected up to {CODES - 1}")
    return codes, at


def _levels(counts: Integers) -> tuple[int, Symbols]:
    """The first symbol that occurs, and the levels from it to the last; none where one occurs, or none."""
    at = np.flatnonzero(counts)
    if len(at) < 2:
        return int(at[0]) if len(at) else 0, np.zeros(0, np.uint8)
    return int(at[0]), entropy.levels_of(counts[at[0]:at[-1] + 1])


def _model(levels: Symbols) -> object | None:
    return entropy.model_of(levels) if len(levels) else None


def _read_models(packed: bytes, count: int) -> Iterator[tuple[int, object | None]]:
    """(first symbol, model; None where it is the only one) of each context."""
    reader = zlib.decompressobj(-15)
    try:
        data = reader.decompress(packed, count * 258)
    except zlib.error as error:
        raise FileError(f"the histograms of a coded stream are damaged: {error}") from error
    at = 0
    for _ in range(count):
        first, last = data[at:at + 2].ljust(2, b"\0")
        size = last - first + 1 if last > first else 0
        levels = np.frombuffer(data[at + 2:at + 2 + size], np.uint8)
        at += 2 + size
        if at > len(data) or first > last or (size and not (levels[0] and levels[-1])):
            raise FileError("the histograms of a coded stream are damaged")
        yield first, _model(levels)
    if at != len(data):
        raise FileError("the histograms of a coded stream are damaged")


def _decoded(coder: object, model: object, count: int, first: int) -> Symbols:
    try:
        symbols: NDArray[np.int32] = coder.decode(model, count)  # type: ignore[attr-defined]
    except (AssertionError, ValueError, KeyError) as error:
        raise FileError(f"a coded stream is damaged: {error}") from error
    return (symbols + first).astype(np.uint8)


def _part(data: bytes, at: int) -> tuple[bytes, int]:
    """The bytes after their length, and where the next thing starts."""
    length, at = read_varint(data, at)
    if length > len(data) - at:
        raise FileError("a coded stream ends before a part of it does")
    return data[at:at + length], at + length
