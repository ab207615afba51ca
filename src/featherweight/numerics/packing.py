"""Integers of a few bits, laid end to end in bytes.

Number k of b bits takes the bits b*k .. b*k + b - 1, low first, of a row of bytes whose own bits are counted low first;
the last byte is filled up with zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def packed_length(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(numbers: Bytes, bits: int) -> Bytes:
    """``numbers`` (each below 2^bits, any shape, read in memory order) as [packed_length] bytes; bits: 1..8."""
    flat = np.ascontiguousarray(numbers, np.uint8).reshape(-1, 1)
    return np.packbits(np.unpackbits(flat, axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The ``count`` numbers that ``pack`` made ``packed`` of."""
    single = np.unpackbits(np.ascontiguousarray(packed, np.uint8), count=count * bits, bitorder="little")
    return np.packbits(single.reshape(count, bits), axis=1, bitorder="little").reshape(count)


__all__ = ["pack", "packed_length", "unpack"]
