"""Entropy coding and the archive: bytes in, bytes out, exact both ways."""

from featherweight.codec.archive import archive_bytes, pack, unpack

__all__ = ["archive_bytes", "pack", "unpack"]
