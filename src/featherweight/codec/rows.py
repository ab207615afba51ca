"""Symbols 0..255 of a matrix under models that know its rows and columns, exact both ways.

A pruned layer is dense in some rows and columns and empty in others, which a histogram of all symbols cannot say. The
stream of ``count`` symbols is one byte of form (0 plain, 1 mask, 2 classes; + 16: the matrix is stored by columns) and

    plain    an order-0 stream (``entropy.py``)
    mask     byte z, the symbol that most are; varint columns; varint length and a stream of each row's level, which is
             how many of its symbols are not z (as ``entropy.count_of`` tells counts from levels); varint length and the
             words of the range coder, a bit for each symbol: 1 where it is not z, under the chances of ``chances``;
             then an order-0 stream of the symbols that are not z, in order
    classes  varint columns; varint length and a stream of each row's class, 0 to 15; then for every class that occurs,
             in order: varint length, and an order-0 stream of the symbols in its rows

The chances adapt: how often a column was not z in the rows above, and its neighbours were, times the row's own share.
Only sums, products and quotients of integers and IEEE doubles are taken, in a fixed order, so all machines agree.
"""

from __future__ import annotations

from collections.abc import Iterator

import constriction
import numpy as np
from numpy.typing import NDArray

from featherweight.codec import entropy
from featherweight.codec.entropy import Symbols
from featherweight.codec.varints import read_varint, varint
from featherweight.errors import FileError

Floats = NDArray[np.float64]
_queue = constriction.stream.queue
_bits = constriction.stream.model.Bernoulli(perfect=False)
PLAIN, MASK, CLASSES, TURNED = 0, 1, 2, 16
BAND = 256  #: symbols at least that are coded under the same column counts
TRIED = 1 << 17
#: what is tried: (form, classes)
FORMS = tuple((form | turned, k) for turned in (0, TURNED) for form, k in ((MASK, 0), (CLASSES, 2), (CLASSES, 4),
                                                                         (CLASSES, 8)))
NEAR, BESIDE, OWN = 3, 2.0, 1.5  #: columns on each side; how much the average, and these, weigh against a column's own
ONE = 1 << 16  #: chances are multiples of 1 / ONE


def encode(symbols: Symbols, columns: int) -> bytes:
    """The shortest stream of ``symbols`` (uint8 [n]), which are the rows of a matrix with so many columns.

    Of many symbols, the form is chosen by the first ``TRIED`` of them.
    """
    plain = bytes((PLAIN,)) + entropy.encode(symbols)
    if not 1 < columns < symbols.size or symbols.size % columns:
        return plain
    matrix = symbols.reshape(-1, columns)
    first = matrix[:max(2, TRIED // columns)]
    form = min(FORMS, key=lambda form: len(_formed(first, *form)))
    return min(plain, _formed(matrix, *form), key=len)


def _formed(matrix: Symbols, form: int, classes: int) -> bytes:
    """The stream of a matrix in a form, with so many classes of rows where the form has any."""
    seen = np.ascontiguousarray(matrix.T) if form & TURNED else matrix
    return bytes((form,)) + (classed(seen, min(classes, len(seen))) if form & CLASSES else masked(seen))


def decode(stream: bytes, count: int) -> Symbols:
    """The ``count`` symbols that ``encode`` turned into ``stream``. Raises FileError for one that it did not write."""
    form, turned = (stream[0] & 15, stream[0] & TURNED) if stream else (-1, 0)
    if form == PLAIN:
        return entropy.decode(stream[1:], count)
    if form not in (MASK, CLASSES) or stream[0] >= 2 * TURNED:
        raise FileError("a coded stream of a matrix has a form that this version does not know")
    matrix = (_read_masked if form == MASK else _read_classed)(stream[1:], count)
    return np.ascontiguousarray(matrix.T if turned else matrix).reshape(-1)


def chances(shares: Floats, seen: NDArray[np.int64], expected: float, kept: NDArray[np.int64]) -> Floats:
    """[b, columns]: the chance of each symbol of some rows not to be z.

    shares [b]: of the rows' symbols that are not z. seen [columns]: how many were not z in the rows above; expected:
    the sum of these rows' shares. kept [b]: how many of each row are not z. A column's factor on the odds is how often
    it was not z against what was expected; columns beside it, and the average of all, count as if seen before.
    """
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(seen)])
    at = np.arange(seen.size)
    low, high = np.maximum(at - NEAR, 0), np.minimum(at + NEAR + 1, seen.size)
    beside = (sums[high] - sums[low] + BESIDE) / ((high - low) * expected + BESIDE)
    factor = (seen + OWN * beside) / (expected + OWN)
    odds = (shares / (1.0 - shares))[:, None] * factor[None]
    whole = (odds / (1.0 + odds) * ONE).astype(np.int64) + 1
    scale = kept * ONE / whole.sum(1)
    found: Floats = np.minimum(np.maximum((whole * scale[:, None]).astype(np.int64), 2), ONE - 2) / ONE
    return found


def _bands(levels: NDArray[np.uint8], columns: int) -> Iterator[tuple[slice, Floats, NDArray[np.int64], float]]:
    """(rows, their shares, their counts, the sum of the shares above) band by band; empty rows are in none of them."""
    kept = np.minimum(entropy.count_of(levels), columns)
    shares = (2.0 * kept + 1.0) / (2.0 * columns + 2.0)
    step, above = max(1, BAND // columns), 0.0
    for start in range(0, len(levels), step):
        rows = slice(start, min(start + step, len(levels)))
        yield rows, shares[rows], kept[rows], above
        for share in shares[rows]:
            above += float(share)


def masked(matrix: Symbols) -> bytes:
    """Form 1 of the symbols [rows, columns], without its first byte."""
    z = int(np.bincount(matrix.reshape(-1), minlength=256).argmax())
    mask = matrix != z
    levels = entropy.levels_of(mask.sum(1))
    coder, seen = _queue.RangeEncoder(), np.zeros(matrix.shape[1], np.int64)
    for rows, shares, kept, above in _bands(levels, matrix.shape[1]):
        some = kept > 0
        if some.any():
            chance = chances(shares[some], seen, above, kept[some])
            coder.encode(mask[rows][some].astype(np.int32).reshape(-1), _bits, chance.reshape(-1))
        seen += mask[rows].sum(0)
    words = coder.get_compressed().astype("<u4").tobytes()
    side = entropy.encode(levels)
    return b"".join((bytes((z,)), varint(matrix.shape[1]), varint(len(side)), side, varint(len(words)), words,
                     entropy.encode(matrix[mask])))


def _read_masked(data: bytes, count: int) -> Symbols:
    z, (columns, at) = data[0] if data else 0, read_varint(data, 1)
    rows_count = _rows(columns, count)
    side, at = _part(data, at)
    words, at = _part(data, at)
    if len(words) % 4:
        raise FileError("a coded stream ends inside a word")
    levels = entropy.decode(side, rows_count)
    mask, seen = np.zeros((rows_count, columns), bool), np.zeros(columns, np.int64)
    try:
        coder = _queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
        for rows, shares, kept, above in _bands(levels, columns):
            some = kept > 0
            if some.any():
                chance = chances(shares[some], seen, above, kept[some])
                mask[rows][some] = coder.decode(_bits, chance.reshape(-1)).reshape(chance.shape) == 1
            seen += mask[rows].sum(0)
    except (AssertionError, ValueError, KeyError) as error:
        raise FileError(f"a coded stream is damaged: {error}") from error
    found = np.full(mask.shape, z, np.uint8)
    found[mask] = entropy.decode(data[at:], int(mask.sum()))
    return found


def classed(matrix: Symbols, classes: int) -> bytes:
    """Form 2, without its first byte: rows in classes of equal size by how far their symbols are from the mean."""
    wide = matrix.astype(np.float64)
    order = np.argsort(np.abs(wide - wide.mean()).mean(1), kind="stable")
    of = np.empty(len(matrix), np.uint8)
    of[order] = np.arange(len(matrix)) * classes // len(matrix)
    side = entropy.encode(of)
    parts = [entropy.encode(matrix[of == c]) for c in np.unique(of)]
    return varint(matrix.shape[1]) + varint(len(side)) + side + b"".join(varint(len(p)) + p for p in parts)


def _read_classed(data: bytes, count: int) -> Symbols:
    columns, at = read_varint(data, 0)
    rows_count = _rows(columns, count)
    side, at = _part(data, at)
    of = entropy.decode(side, rows_count)
    if of.max() > 15:
        raise FileError("a coded stream of a matrix has more than 16 classes of rows")
    found = np.empty((rows_count, columns), np.uint8)
    for c in np.unique(of):
        part, at = _part(data, at)
        rows = of == c
        found[rows] = entropy.decode(part, int(rows.sum()) * columns).reshape(-1, columns)
    if at != len(data):
        raise FileError("a coded stream of a matrix has bytes left over")
    return found


def _rows(columns: int, count: int) -> int:
    if not 0 < columns <= count or count % columns:
        raise FileError(f"a coded stream claims {columns} columns for {count} symbols")
    return count // columns


def _part(data: bytes, at: int) -> tuple[bytes, int]:
    """The bytes after their length, and where the next thing starts."""
    length, at = read_varint(data, at)
    if length > len(data) - at:
        raise FileError("a coded stream ends before a part of it does")
    return data[at:at + length], at + length
