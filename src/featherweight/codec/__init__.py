"""Entropy coding and the archive: bytes in, bytes out, exact both ways."""

from featherweight.codec.archive import archive_bytes, pack, unpack
from featherweight.codec.tensors import read_tensor

__all__ = ["archive_bytes", "pack", "read_tensor", "unpack"]
