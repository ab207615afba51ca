"""Symbols 0..255 of a matrix under contexts: how busy their row and column are, and what stands left of them.

A pruned layer is dense in some rows and columns and empty in others, and a kernel that is large in one place is so in
others, which a histogram of all symbols cannot say. The stream of ``count`` symbols is one byte of form and

    plain     (0) an order-0 stream (``entropy.py``)
    contexts  (1) varint columns; byte z, a symbol; bytes cap and group; a byte with a length and that many thresholds,
              twice: of busyness and of what stands left; varint length and a stream of each row's code, the same of the
              columns'; varint length and the deflated histograms of all contexts; varint length and the words of the
              range coder

A symbol's context is how many thresholds its row's code plus its column's reach, and how many the magnitudes left of it
in its group of columns reach (``Contexts.of``). All columns of one place in their groups are coded at once, context by
context, so that a reader has what stands left of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import pairwise

import constriction
import numpy as np
from numpy.typing import NDArray

from featherweight.codec import entropy
from featherweight.codec.contexts import CODES, Contexts, chosen
from featherweight.codec.entropy import Symbols
from featherweight.codec.varints import read_varint, varint
from featherweight.errors import FileError

_queue = constriction.stream.queue
PLAIN, CONTEXTS = 0, 1


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


# ---- the stream

def written(matrix: Symbols, contexts: Contexts) -> bytes:
    """The stream of form ``CONTEXTS`` of the symbols [rows, columns], without its first byte."""
    parts = [_sorted(matrix, contexts, phase)[:2] for phase in contexts.phases()]  # not their places, which are large
    joint = np.zeros((contexts.count, 256), np.int64)
    for values, ends in parts:
        for context, (start, end) in enumerate(pairwise(ends)):
            if start < end:
                joint[context] += np.bincount(values[start:end], minlength=256)
    levels = [_levels(counts) for counts in joint]
    coder, models = _queue.RangeEncoder(), [_model(own) for _, own in levels]
    for values, ends in parts:
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


def _levels(counts: NDArray[np.int64]) -> tuple[int, Symbols]:
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
