"""Text as a few bytes: deflated after the words that a network's description usually holds (``words.txt``).

A graph of ten calls is described in two to five thousand letters that most networks share; against a network of a few
thousand bytes that would be a large part. The words are part of the format: the file never changes.
"""

from __future__ import annotations

import zlib
from importlib.resources import files

from featherweight.errors import FileError

WORDS = (files(__package__) / "words.txt").read_bytes()


def write(text: bytes) -> bytes:
    """A raw deflate stream (RFC 1951) of ``text`` whose window starts with ``WORDS``."""
    writer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    return writer.compress(text) + writer.flush()


def read(stream: bytes, length: int) -> bytes:
    """The text that ``write`` made ``stream`` of; at most ``length`` bytes and one are made. FileError for another."""
    reader = zlib.decompressobj(-15, WORDS)
    try:
        text = reader.decompress(stream, length + 1)
    except zlib.error as error:
        raise FileError(f"the archive is damaged: {error}") from error
    if not reader.eof or len(text) != length or reader.unused_data:
        raise FileError("the archive is damaged: a text does not end where it claims to")
    return text


__all__ = ["WORDS", "read", "write"]
