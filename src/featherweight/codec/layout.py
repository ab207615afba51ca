"""Where the numbers of a file lie: of a safetensors file by its header, of an ONNX file by its fields.

The sections of a file, laid end to end, are the file; one section holds numbers of one width.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from featherweight.codec.protobuf import RawTensor, raw_tensors
from featherweight.errors import FileError

SMALL = 4096  #: numbers; tensors below it share a block with their neighbours
INLINE = 256  #: bytes; smaller tensors of an ONNX file stay among its text
AXES = 64  #: of a tensor at most
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 4,
              "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SAFETENSORS, OTHER = 0, 1  #: kinds of files, as an archive names them
EXPECTED = "pack takes what network.save wrote, another safetensors file, or an ONNX file"


@dataclass(frozen=True)
class Section:
    """Bytes start..end of a file: numbers of ``width`` bytes; bits: below 8, the bytes hold packed numbers of so many;
    columns: of the matrix that they are, 0 where they are none."""

    start: int
    end: int
    width: int = 1
    bits: int = 8
    columns: int = 0


def sections(file: BufferedReader, length: int, path: Path) -> tuple[int, list[Section]]:
    """The kind of a file of ``length`` bytes, and its sections in order. FileError for a file of neither kind."""
    size = 8 + int.from_bytes(_piece(file, 0, 8), "little")
    begins = _piece(file, 8, 9)
    if length > 8 and (size > length or begins != b"{"):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            try:
                return OTHER, _between(length, raw_tensors(whole))
            except (ValueError, IndexError) as error:
                reason = f"its header is longer than the file; as ONNX: {error}"
        raise FileError(f"{path} is no featherweight file ({reason}); {EXPECTED}")
    return SAFETENSORS, _of_safetensors(file, length, size, path)


def _piece(file: BufferedReader, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _of_safetensors(file: BufferedReader, length: int, size: int, path: Path) -> list[Section]:
    """The file cut where the width of its numbers changes."""
    try:
        if length < 10:
            raise ValueError("its header is longer than the file")
        header = json.loads(_piece(file, 8, size))
        meta = header.pop("__metadata__", {})
        packed = json.loads(meta["graph"]).get("packed", {}) if "graph" in meta else {}
        tensors = sorted((*place(entry), *_form(entry, packed.get(name))) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FileError(f"{path} is no featherweight file ({str(error)[:200]}); {EXPECTED}") from error
    found, at = [Section(0, size)], 0
    for start, end, width, bits, columns in tensors:
        if start != at or end < start or (end - start) % width:
            raise FileError(f"{path} is damaged: its tensors do not lie end to end")
        at = end
        last = found[-1]
        alike = len(found) > 1 and (last.width, last.bits) == (width, bits) == (width, 8)
        if alike and max(last.end - last.start, end - start) < SMALL * width:
            found[-1] = Section(last.start, size + end, width)
        elif end > start:
            found.append(Section(size + start, size + end, width, bits, columns))
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


def place(entry: dict[str, Any]) -> tuple[int, int, int]:
    """(start, end, width) of a tensor by its entry in a safetensors header."""
    start, end = entry["data_offsets"]
    if type(start) is not int or type(end) is not int:
        raise ValueError("its tensors lie nowhere")
    return start, end, ITEM_BYTES.get(str(entry["dtype"]), 1)


def _between(length: int, tensors: Iterable[RawTensor]) -> list[Section]:
    """The tensors of an ONNX file, and what lies before, between and after them as bytes."""
    found, at = [], 0
    for one in sorted(tensors, key=lambda t: t.start):
        if one.end - one.start >= INLINE and not (one.end - one.start) % one.width:
            if one.start > at:
                found.append(Section(at, one.start))
            found.append(Section(one.start, one.end, one.width, one.bits, one.columns))
            at = one.end
    return [*found, Section(at, length)] if at < length else found


__all__ = ["OTHER", "SAFETENSORS", "Section", "place", "sections"]
