"""Lengths in few bytes."""

from __future__ import annotations

from featherweight.errors import FileError


def varint(number: int) -> bytes:
    """A natural number, 7 bits a byte, low first, the top bit set on all but the last."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes((number,))


def read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number at ``at`` and where the next thing starts. At most 9 bytes are read."""
    number = 0
    for i in range(9):
        if at + i >= len(data):
            break
        number |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return number, at + i + 1
    raise FileError("the archive is damaged: a length has no end")


__all__ = ["read_varint", "varint"]
