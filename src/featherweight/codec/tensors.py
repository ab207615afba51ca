"""One tensor out of an archive: only the blocks that cover it, and the header of the file inside, are decoded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.codec.archive import LIMIT, contents
from featherweight.codec.layout import SAFETENSORS
from featherweight.errors import FileError, did_you_mean

#: types as safetensors names them -> numpy's; bfloat16 and 8 bit floats, which numpy lacks, come as their bits
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "F8_E4M3": "u1", "F8_E5M2": "u1"}


def read_tensor(archive_path: str | Path, name: str) -> NDArray[Any]:
    """The tensor called ``name`` as it lies in the file inside an archive; no other is decoded.

    Integers of few bits come as the bytes that hold them. Raises FileError where there is none of this name, and where
    the blocks that hold the tensor or the header do not match their checksums; damage elsewhere is not looked for
    (archives of versions 1 and 2 have one checksum of all their bytes, which is held against them first).

    Example:
        >>> size = network.save("network.fw")
        >>> packed = fw.codec.pack("network.fw", "network.fwz")
        >>> fw.codec.read_tensor("network.fwz", "3.weight").dtype
        dtype('float32')
    """
    read = _reader(archive_path)
    size = int.from_bytes(read(0, 8), "little")
    if size > LIMIT:
        raise FileError(f"{archive_path} holds a file whose header claims {size} bytes")
    try:
        header = json.loads(read(8, 8 + size))
        header.pop("__metadata__", None)
        if name not in header:
            raise FileError(f"{archive_path} holds no tensor {name!r}; {did_you_mean(name, header)}")
        entry = header[name]
        start, end = entry["data_offsets"]
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{end - start} bytes for the shape {list(shape)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{archive_path} holds no tensor {name!r} that can be read ({str(error)[:200]})") from error
    return np.frombuffer(read(8 + size + start, 8 + size + end), dtype).reshape(shape)


def _reader(path: str | Path) -> Callable[[int, int], bytes]:
    """What gives bytes start..end of the file inside."""
    kind, archive, blocks = contents(path)
    if kind != SAFETENSORS:
        raise FileError(f"{path} holds an ONNX file, whose tensors cannot be read one by one; write "
                        f"featherweight unpack {path} FILE.onnx")

    def read(start: int, end: int) -> bytes:
        at, found = 0, []
        for block in blocks:
            size = block.count * block.width
            if at < end and at + size > start:
                found.append(block.bytes_of(archive)[max(start - at, 0):end - at])
            at += size
        if not 0 <= start <= end <= at:
            raise FileError(f"{path} holds {at} bytes, not {start} to {end}")
        return b"".join(found)

    return read


__all__ = ["read_tensor"]
