"""Range coding of symbols 0..255 under one histogram: within a few bytes of the order-0 entropy, exact both ways.

A stream is
    first, last   the smallest and the largest symbol; where they are equal, nothing follows
    model         one byte of form (0 plain, 1 deflated with its length before it), then a level for every symbol from
                  first to last: its count, exact below 16 and with a 4 bit mantissa above (0 = it does not occur)
    words         the range coder's output, 32 bit little-endian (constriction's queue coder, Bamler 2022)
The number of symbols is not in it: who stores the stream knows. No symbols give no bytes. A count that is off by at
most 1/16 costs less than 0.001 bit a symbol (its square over two, in nats), and a model at most 259 bytes.
"""

from __future__ import annotations

import zlib
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from featherweight.errors import FileError

Symbols = NDArray[np.uint8]
_queue = constriction.stream.queue
_Categorical = constriction.stream.model.Categorical


def entropy_bytes(symbols: Symbols) -> float:
    """Length in bytes of the best code that knows the histogram of ``symbols`` and takes no account of their order."""
    counts = np.bincount(symbols.reshape(-1), minlength=1)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8 if counts.size else 0.0


def encode(symbols: Symbols) -> bytes:
    """The stream of ``symbols`` (uint8, any shape, read in memory order)."""
    flat = np.ascontiguousarray(symbols, dtype=np.uint8).reshape(-1)
    if not flat.size:
        return b""
    counts = np.bincount(flat)
    first, last = int(np.flatnonzero(counts)[0]), counts.size - 1
    if first == last:
        return bytes((first, last))
    levels = levels_of(counts[first:])
    short = deflate(levels.tobytes())
    model = b"\x00" + levels.tobytes() if len(short) + 1 >= levels.size else bytes((1, len(short))) + short
    coder = _queue.RangeEncoder()
    coder.encode((flat - first).astype(np.int32), model_of(levels))
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return bytes((first, last)) + model + words


def decode(stream: bytes, count: int) -> Symbols:
    """The ``count`` symbols that ``encode`` turned into ``stream``. Raises FileError for one that it did not write.

    Takes 4 bytes of memory for a symbol while it works.
    """
    if count == 0 and not stream:
        return np.zeros(0, np.uint8)
    if count <= 0 or len(stream) < 2 or stream[0] > stream[1]:
        raise FileError(f"a coded stream of {len(stream)} bytes does not hold {count} symbols")
    first, last = stream[0], stream[1]
    if first == last:
        if len(stream) != 2:
            raise FileError("a coded stream of one symbol has bytes left over")
        return np.full(count, first, np.uint8)
    levels, words = _read_levels(stream[2:], last - first + 1)
    if len(words) % 4:
        raise FileError("a coded stream ends inside a word")
    try:
        coder = _queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
        symbols: NDArray[np.int32] = coder.decode(model_of(levels), count)
    except (AssertionError, ValueError, KeyError) as error:
        raise FileError(f"a coded stream is damaged: {error}") from error
    return (symbols + first).astype(np.uint8)


def _read_levels(data: bytes, size: int) -> tuple[NDArray[np.uint8], bytes]:
    """The histogram at the start of ``data``, and what follows it."""
    if not data or data[0] > 1:
        raise FileError("a coded stream has no histogram")
    if data[0] == 0:
        plain, rest = data[1:1 + size], data[1 + size:]
    else:
        end = 2 + (data[1] if len(data) > 1 else 0)
        reader = zlib.decompressobj(-15)
        try:
            plain = reader.decompress(data[2:end], size)
        except zlib.error as error:
            raise FileError(f"the histogram of a coded stream is damaged: {error}") from error
        rest = data[end:]
    levels = np.frombuffer(plain, np.uint8)
    if levels.size != size or levels[0] == 0 or levels[-1] == 0:
        raise FileError("the histogram of a coded stream is damaged")
    return levels, rest


def deflate(data: bytes) -> bytes:
    """A raw deflate stream (RFC 1951)."""
    writer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return writer.compress(data) + writer.flush()


def levels_of(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Counts as levels: below 16 themselves, above by exponent and mantissa, to the nearest."""
    table = count_of(np.arange(256))
    above = np.minimum(np.searchsorted(table, counts), 255)
    below = np.maximum(above - 1, 0)
    level = np.where(counts - table[below] < table[above] - counts, below, above)
    return np.where(counts > 0, np.maximum(level, 1), 0).astype(np.uint8)


def count_of(levels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The count that a level stands for: l below 16, else (8 + l mod 8) * 2^(l // 8 - 1)."""
    wide = levels.astype(np.int64)
    return np.where(wide < 16, wide, (8 + wide % 8) << np.maximum(wide // 8 - 1, 0))


def model_of(levels: NDArray[np.uint8]) -> object:
    """constriction's table for these counts; ``perfect=False`` needs no logarithms, so it is the same everywhere."""
    return _Categorical(count_of(levels).astype(np.float64), perfect=False)
