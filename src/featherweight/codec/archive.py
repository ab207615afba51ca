"""The ``.fwz`` archive: a safetensors file made small by entropy coding; the very same bytes come back.

FORMAT.md states every byte. The writer takes the shortest method for each block; small tensors of one width that lie
together share a block. Version 1, which lacks the methods that know the rows of a matrix, is read as well.

The reader adds up what the blocks claim before it decodes one, refuses a sum that is not the claimed length or passes
the limit, and holds one block in memory at a time. It decodes no tensor before the header of the .fw file inside says
that the tensors end where the file ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.codec.blocks import BLOCK, FIRST, METHODS, WHOLE, WIDTHS, decode, encode
from featherweight.codec.varints import read_varint, varint
from featherweight.errors import FileError
from featherweight.files import written_whole

if TYPE_CHECKING:  # reading an archive needs no torch
    from featherweight.network import Network

MAGIC = b"\x93FWZ\r\n\x1a"
VERSION, OLDEST = 2, 1
SMALL = 4096  #: numbers; tensors below it share a block with their neighbours
LIMIT, RATIO = 64 << 20, 256  #: an archive may claim LIMIT bytes and RATIO times its own length, unless told otherwise
AXES = 64  #: of a tensor at most
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 4,
              "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def pack(network_path: str | Path, archive_path: str | Path) -> int:
    """Writes the archive of a ``.fw`` or any safetensors file, whole or not at all, and gives its length in bytes.

    What was written is decoded once before it is put in place. Raises FileError where ``network_path`` is none.

    Example:
        >>> size = network.save("network.fw")
        >>> fw.codec.pack("network.fw", "network.fwz") < size
        True
    """
    with _opened(network_path) as file:
        length = os.fstat(file.fileno()).st_size
        body = bytearray(hashlib.file_digest(file, "sha256").digest() + varint(length))
        for start, end, width, bits, columns in _sections(file, length, Path(network_path)):
            step = _step(width, bits, columns)
            for at in range(start, end, step):
                numbers = np.frombuffer(_piece(file, at, min(end, at + step)), f"<u{width}")
                method, payload = encode(numbers, bits, columns)
                body += bytes((method | WIDTHS.index(width) << 4,)) + varint(numbers.size) + varint(len(payload))
                body += payload
    archive = MAGIC + bytes((VERSION,)) + hashlib.sha256(body).digest() + body
    for _ in _unpacked(archive, str(archive_path), length):
        pass
    _write(archive_path, iter((archive,)))
    return len(archive)


def unpack(archive_path: str | Path, network_path: str | Path, *, limit: int | None = None) -> int:
    """Writes the ``.fw`` file that an archive holds, whole or not at all, and gives its length in bytes.

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


def _step(width: int, bits: int, columns: int) -> int:
    """Bytes of a block: rows of a matrix are not cut, nor packed numbers."""
    if bits == 8:
        return (BLOCK - BLOCK % columns if 0 < columns <= BLOCK else BLOCK) * width
    unit = columns * bits  # bytes of 8 rows
    return BLOCK - BLOCK % (unit if 0 < unit <= BLOCK else WHOLE)


def _sections(file: BufferedReader, length: int, path: Path) -> list[tuple[int, int, int, int, int]]:
    """The file cut where the width of its numbers changes: (start, end, width, bits, columns) of each piece, in order;
    bits are 8, or fewer where bytes hold packed numbers; columns are 0 where several tensors lie in the piece."""
    size = 8 + int.from_bytes(_piece(file, 0, 8), "little")
    try:
        if length < 10 or size > length:
            raise ValueError("its header is longer than the file")
        header = json.loads(_piece(file, 8, size))
        meta = header.pop("__metadata__", {})
        packed = json.loads(meta["graph"]).get("packed", {}) if "graph" in meta else {}
        tensors = sorted((*_place(entry), *_form(entry, packed.get(name))) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FileError(f"{path} is no featherweight file ({str(error)[:200]}); pack takes what network.save wrote, or "
                        "another safetensors file") from error
    found, at = [(0, size, 1, 8, 0)], 0
    for start, end, width, bits, columns in tensors:
        if start != at or end < start or (end - start) % width:
            raise FileError(f"{path} is damaged: its tensors do not lie end to end")
        at = end
        last = found[-1]
        alike = len(found) > 1 and last[2:4] == (width, bits) == (width, 8)
        if alike and max(last[1] - last[0], end - start) < SMALL * width:
            found[-1] = (last[0], size + end, width, 8, 0)
        elif end > start:
            found.append((size + start, size + end, width, bits, columns))
    if size + at != length:
        raise FileError(f"{path} is damaged: its tensors end at {size + at} of {length} bytes")
    return found


def _form(entry: dict[str, Any], packed: Sequence[Any] | None) -> tuple[int, int]:
    """(bits, columns) of a tensor by its entries in the header and among the packed ones, if any."""
    bits, shape = (8, entry["shape"]) if packed is None else (packed[0], packed[4])
    if type(bits) is not int or not 0 < bits <= 8:
        raise ValueError(f"packed numbers have {str(bits)[:20]} bits")
    if len(shape) > AXES or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise ValueError(f"a tensor has the shape {str(shape)[:80]}")
    return bits, math.prod(shape[1:])


def _place(entry: dict[str, Any]) -> tuple[int, int, int]:
    """(start, end, width) of a tensor by its entry in a safetensors header."""
    start, end = entry["data_offsets"]
    if type(start) is not int or type(end) is not int:
        raise ValueError("its tensors lie nowhere")
    return start, end, ITEM_BYTES.get(str(entry["dtype"]), 1)


def contents(path: str | Path) -> tuple[bytes, list[tuple[int, int, int, tuple[int, int]]]]:
    """An archive's bytes, and (method, count, width, (start, end)) of its blocks. FileError for what is damaged."""
    archive = _read(path)
    version = _checked(archive, str(path))
    return archive, list(_blocks(archive, read_varint(archive, 72)[1], len(METHODS) if version > OLDEST else FIRST))


def _checked(archive: bytes, name: str) -> int:
    """The version of an archive. Raises FileError where it is none, or its bytes do not match its checksum."""
    if archive[:7] != MAGIC:
        raise FileError(f"{name} is no featherweight archive; expected a file that pack wrote")
    version = archive[7] if len(archive) > 7 else 0
    if not OLDEST <= version <= VERSION:
        raise FileError(f"{name} is an archive of version {archive[7:8].hex() or 'none'}; this release reads "
                        f"{OLDEST} to {VERSION}")
    if hashlib.sha256(archive[40:]).digest() != archive[8:40]:
        raise FileError(f"{name} is damaged or truncated: its bytes do not match its checksum")
    return version


def _unpacked(archive: bytes, name: str, limit: int | None) -> Iterator[bytes]:
    """The file in an archive, piece by piece; a FileError at the end if it was not the same."""
    version = _checked(archive, name)
    digest, (length, at) = hashlib.sha256(), read_varint(archive, 72)
    allowed = LIMIT + RATIO * len(archive) if limit is None else limit
    if length > allowed:
        raise FileError(f"{name} claims to hold {length} bytes, more than the {allowed} allowed; if you trust it write "
                        f"unpack(..., limit={length}) or featherweight unpack --limit {length}")
    blocks = list(_blocks(archive, at, len(METHODS) if version > OLDEST else FIRST))
    if sum(count * width for _, count, width, _ in blocks) != length:
        raise FileError(f"{name} is damaged: its blocks do not add up to the {length} bytes it claims")
    head = bytearray()  # of the file inside, until its header is whole
    for method, count, width, (start, end) in blocks:
        piece = decode(method, archive[start:end], count, width).tobytes()
        digest.update(piece)
        if len(head) < _header_end(head):
            head += piece
            if len(head) >= min(_header_end(head), length):
                _check_length(head, length, name)
        yield piece
    if digest.digest() != archive[40:72]:
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
        end = size + max((_place(entry)[1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{name} holds no featherweight file ({str(error)[:200]}); expected what pack wrote") from error
    if end != length:
        raise FileError(f"{name} claims to hold {length} bytes; the tensors of the file inside end at {end}")


def _blocks(archive: bytes, at: int, methods: int) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """(method, count, width, (start, end)) of every block, of the first so many methods; nothing is decoded."""
    while at < len(archive):
        method, power = archive[at] & 15, archive[at] >> 4
        count, start = read_varint(archive, at + 1)
        length, start = read_varint(archive, start)
        if method >= methods or power >= len(WIDTHS) or not 0 < count <= BLOCK or length > len(archive) - start:
            raise FileError(f"the archive is damaged: at byte {at} there is no block")
        at = start + length
        yield method, count, WIDTHS[power], (start, at)


__all__ = ["archive_bytes", "contents", "pack", "unpack"]
