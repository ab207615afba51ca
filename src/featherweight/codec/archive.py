"""The ``.fwz`` archive: a safetensors or ONNX file made small by entropy coding; the very same bytes come back.

FORMAT.md states every byte. The writer takes the shortest method for each block; small tensors of one width that lie
together share a block. Versions 1, which lacks the methods that know the rows of a matrix, and 2, which lacks checksums
of blocks and other files than safetensors, are read as well.

The reader adds up what the blocks claim before it decodes one, refuses a sum that is not the claimed length or passes
the limit, and holds one block in memory at a time. Of a safetensors file it decodes no tensor before the header says
that the tensors end where the file ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featherweight.codec.blocks import BLOCK, FIRST, METHODS, WHOLE, WIDTHS, decode, encode
from featherweight.codec.layout import OTHER, SAFETENSORS, Section, place, sections
from featherweight.codec.varints import read_varint, varint
from featherweight.errors import FileError
from featherweight.files import written_whole

if TYPE_CHECKING:  # reading an archive needs no torch
    from featherweight.network import Network

MAGIC = b"\x93FWZ\r\n\x1a"
VERSION, OLDEST = 3, 1
CHECKED = 3  #: the first version whose blocks have checksums, and which holds files of other kinds
PIECE = BLOCK // 2  #: numbers of a block that is written: what choosing contexts takes of memory grows with it
DIGEST = 8  #: bytes of the checksum of the file inside; 32 before that version
LIMIT, RATIO = 64 << 20, 256  #: an archive may claim LIMIT bytes and RATIO times its own length, unless told otherwise


@dataclass(frozen=True)
class StoredBlock:
    """One block of an archive: ``count`` numbers of ``width`` bytes by ``method``. Its head begins at ``begin``, its
    payload lies at start..end; checksum: CRC-32 of both, None before version 3."""

    method: int
    count: int
    width: int
    begin: int
    start: int
    end: int
    checksum: int | None

    def bytes_of(self, archive: bytes) -> bytes:
        """The decoded bytes. FileError where they are damaged."""
        if self.checksum not in (None, zlib.crc32(archive[self.begin:self.end])):
            raise FileError(f"the archive is damaged: the block at byte {self.begin} does not match its checksum")
        return decode(self.method, archive[self.start:self.end], self.count, self.width).tobytes()


@dataclass(frozen=True)
class Head:
    """What stands before the blocks. kind: of the file inside, of ``length`` bytes and this checksum; at: where the
    blocks begin."""

    version: int
    digest: bytes
    kind: int
    length: int
    at: int


def pack(network_path: str | Path, archive_path: str | Path) -> int:
    """Writes the archive of a ``.fw``, any safetensors, or an ONNX file, whole or not at all; gives its bytes' number.

    What was written is decoded once before it is put in place. Raises FileError where ``network_path`` is none.

    Example:
        >>> size = network.save("network.fw")
        >>> fw.codec.pack("network.fw", "network.fwz") < size
        True
    """
    with _opened(network_path) as file:
        length = os.fstat(file.fileno()).st_size
        kind, found = sections(file, length, Path(network_path))
        body = bytearray(_digest(kind, file)[:DIGEST] + bytes((kind,)) + varint(length))
        for section in found:
            step = _step(section)
            for at in range(section.start, section.end, step):
                numbers = np.frombuffer(_piece(file, at, min(section.end, at + step)), f"<u{section.width}")
                body += _stored(numbers, section)
    archive = MAGIC + bytes((VERSION,)) + hashlib.sha256(body).digest() + body
    for _ in _unpacked(archive, str(archive_path), length):
        pass
    _write(archive_path, iter((archive,)))
    return len(archive)


def _digest(kind: int, file: BufferedReader) -> bytes:
    """SHA-256 of the kind and a whole file."""
    digest = hashlib.sha256(bytes((kind,)))
    file.seek(0)
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.digest()


def _stored(numbers: NDArray[Any], section: Section) -> bytes:
    """The block of some numbers of a section, with its checksum."""
    method, payload = encode(numbers, section.bits, section.columns)
    block = bytes((method | WIDTHS.index(section.width) << 4,)) + varint(numbers.size) + varint(len(payload)) + payload
    return block + zlib.crc32(block).to_bytes(4, "little")


def unpack(archive_path: str | Path, network_path: str | Path, *, limit: int | None = None) -> int:
    """Writes the file that an archive holds, whole or not at all, and gives its length in bytes.

    limit: bytes that the file may have; without, 64 MiB + 256 times the archive's own length. Raises FileError for an
    archive that is truncated, damaged, of another version, or claims more than the limit.

    Example:
        >>> size = network.save("network.fw")
        >>> packed = fw.codec.pack("network.fw", "network.fwz")
        >>> fw.codec.unpack("network.fwz", "again.fw") == size
        True
    """
    archive = _read(archive_path)
    return _write(network_path, _unpacked(archive, str(archive_path), limit))


def archive_bytes(network: Network) -> int:
    """Length in bytes of the archive of ``network``, by writing it.

    Example:
        >>> fw.codec.archive_bytes(network) < network.save("network.fw")
        True
    """
    with tempfile.TemporaryDirectory() as folder:
        network.save(Path(folder, "network.fw"))
        return pack(Path(folder, "network.fw"), Path(folder, "network.fwz"))


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error


@contextmanager
def _opened(path: str | Path) -> Iterator[BufferedReader]:
    """A file to read from: a large one is never in memory as a whole."""
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error


def _piece(file: BufferedReader, start: int, end: int) -> bytes:
    """The bytes start..end of a file."""
    file.seek(start)
    return file.read(end - start)


def _write(path: str | Path, pieces: Iterator[bytes]) -> int:
    with written_whole(path) as part, part.open("wb") as file:
        return sum(file.write(piece) for piece in pieces)


def _step(section: Section) -> int:
    """Bytes of a block: rows of a matrix are not cut, nor packed numbers."""
    columns = section.columns
    if section.bits == 8:
        return (PIECE - PIECE % columns if 0 < columns <= PIECE else PIECE) * section.width
    unit = columns * section.bits  # bytes of 8 rows
    return PIECE - PIECE % (unit if 0 < unit <= PIECE else WHOLE)


def contents(path: str | Path) -> tuple[int, bytes, list[StoredBlock]]:
    """The kind of the file in an archive, the archive's bytes, and its blocks. FileError for what is damaged; from
    version 3 on blocks tell that themselves."""
    archive = _read(path)
    head = _head(archive, str(path))
    if head.version < CHECKED:
        _check_all(archive, str(path))
    return head.kind, archive, list(_blocks(archive, head))


def _check_version(archive: bytes, name: str) -> int:
    """The version of an archive. Raises FileError where it is none, or of another version."""
    if archive[:7] != MAGIC:
        raise FileError(f"{name} is no featherweight archive; expected a file that pack wrote")
    version = archive[7] if len(archive) > 7 else 0
    if not OLDEST <= version <= VERSION:
        raise FileError(f"{name} is an archive of version {archive[7:8].hex() or 'none'}; this release reads "
                        f"{OLDEST} to {VERSION}")
    return version


def _head(archive: bytes, name: str) -> Head:
    """What stands before the blocks. Raises FileError where this is no archive."""
    version = _check_version(archive, name)
    at = 40 + (DIGEST if version >= CHECKED else 32)
    kind = archive[at] if version >= CHECKED and len(archive) > at else SAFETENSORS
    length, start = read_varint(archive, at + (version >= CHECKED))
    return Head(version, archive[40:at], kind, length, start)


def _check_all(archive: bytes, name: str) -> None:
    if hashlib.sha256(archive[40:]).digest() != archive[8:40]:
        raise FileError(f"{name} is damaged or truncated: its bytes do not match its checksum")


def _unpacked(archive: bytes, name: str, limit: int | None) -> Iterator[bytes]:
    """The file in an archive, piece by piece; a FileError at the end if it was not the same."""
    _check_version(archive, name)
    _check_all(archive, name)
    head = _head(archive, name)
    digest = hashlib.sha256(bytes((head.kind,)) if head.version >= CHECKED else b"")
    allowed = LIMIT + RATIO * len(archive) if limit is None else limit
    if head.length > allowed:
        raise FileError(f"{name} claims to hold {head.length} bytes, more than the {allowed} allowed; if you trust it "
                        f"write unpack(..., limit={head.length}) or featherweight unpack --limit {head.length}")
    blocks = list(_blocks(archive, head))
    if sum(block.count * block.width for block in blocks) != head.length:
        raise FileError(f"{name} is damaged: its blocks do not add up to the {head.length} bytes it claims")
    begun = bytearray()  # of a safetensors file, until its header is whole
    for block in blocks:
        piece = block.bytes_of(archive)
        digest.update(piece)
        if head.kind == SAFETENSORS and len(begun) < _header_end(begun):
            begun += piece
            if len(begun) >= min(_header_end(begun), head.length):
                _check_length(begun, head.length, name)
        yield piece
    if digest.digest()[:len(head.digest)] != head.digest or head.kind not in (SAFETENSORS, OTHER):
        raise FileError(f"{name} is damaged: what was decoded does not match its checksum")


def _header_end(head: bytes | bytearray) -> int:
    """Where the header of a safetensors file ends, by its first bytes."""
    return 8 + int.from_bytes(head[:8], "little") if len(head) >= 8 else 8


def _check_length(head: bytes | bytearray, length: int, name: str) -> None:
    """Raises FileError unless the tensors in a safetensors header end at ``length``."""
    size = _header_end(head)
    try:
        header = json.loads(bytes(head[8:size]))
        header.pop("__metadata__", None)
        end = size + max((place(entry)[1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{name} holds no featherweight file ({str(error)[:200]}); expected what pack wrote") from error
    if end != length:
        raise FileError(f"{name} claims to hold {length} bytes; the tensors of the file inside end at {end}")


def _blocks(archive: bytes, head: Head) -> Iterator[StoredBlock]:
    """Every block, of the methods that the version knows; nothing is decoded."""
    at, methods = head.at, len(METHODS) if head.version > OLDEST else FIRST
    after = 4 if head.version >= CHECKED else 0
    while at < len(archive):
        begin, method, power = at, archive[at] & 15, archive[at] >> 4
        count, start = read_varint(archive, at + 1)
        length, start = read_varint(archive, start)
        if (method >= methods or power >= len(WIDTHS) or not 0 < count <= BLOCK
                or length > len(archive) - start - after):
            raise FileError(f"the archive is damaged: at byte {at} there is no block")
        end = start + length
        checksum = int.from_bytes(archive[end:end + 4], "little") if after else None
        yield StoredBlock(method, count, WIDTHS[power], begin, start, end, checksum)
        at = end + after


__all__ = ["StoredBlock", "archive_bytes", "contents", "pack", "unpack"]
