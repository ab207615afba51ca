"""Tensors of one-byte integers in a file: written with as many bits a number as their values need.

What is packed is said in the file's description under "packed": {name: [bits, lowest, step, dtype, shape]}. A number q
stands as (q - lowest) / step in ``bits`` bits (``numerics.packing``); the bytes are a uint8 tensor of the same name.
Where few numbers occur that lie unevenly, [bits, lowest, step, dtype, shape, numbers] lists them, and q stands as its
place in the list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.errors import FileError
from featherweight.numerics import packing

WHOLE = {"int8": torch.int8, "uint8": torch.uint8}
SMALLEST = 256  #: numbers; for fewer, saying how they are packed takes what is saved
LISTED = 32  #: as many different numbers are listed at most
ELEMENTS = 1 << 40  #: no file holds more numbers in one tensor
AXES = 64  #: nor more axes
PIECE = 1 << 18  #: numbers that are packed and unpacked at a time, a multiple of 8


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """The tensors as they are written, and the entries of "packed"."""
    written, entries = dict(tensors), {}
    for name, tensor in tensors.items():
        found = _bits(tensor)
        if found is not None:
            bits, lowest, step, listed = found
            written[name] = torch.from_numpy(_packed(tensor, listed or _run(bits, lowest, step), bits))
            entries[name] = [bits, lowest, step, str(tensor.dtype).removeprefix("torch."), list(tensor.shape),
                             *([listed] if listed else [])]
    return written, entries


def _run(bits: int, lowest: int, step: int) -> list[int]:
    """The numbers that stand for 0, 1, ... in so many bits."""
    return [lowest + step * place for place in range(1 << bits)]


def _packed(tensor: Tensor, numbers: list[int], bits: int) -> NDArray[np.uint8]:
    """A tensor whose numbers are all among ``numbers``, packed."""
    place = np.zeros(256, np.uint8)  # of a number, taken modulo 256
    place[np.array(numbers) % 256] = range(len(numbers))
    flat = tensor.numpy().reshape(-1).view(np.uint8)
    pieces = [packing.pack(place[flat[at:at + PIECE]], bits) for at in range(0, flat.size, PIECE)]
    return np.concatenate(pieces)


def _bits(tensor: Tensor) -> tuple[int, int, int, list[int]] | None:
    """(bits, lowest, step, list) that hold every number of a tensor; None where one byte each is as good. The list is
    empty where it would save nothing."""
    if tensor.dtype not in WHOLE.values() or tensor.numel() < SMALLEST:
        return None
    values = _occurring(tensor)
    step = max(1, math.gcd(*(v - values[0] for v in values)))
    bits = max(1, ((values[-1] - values[0]) // step).bit_length())
    few = max(1, (len(values) - 1).bit_length())
    if few < bits and len(values) <= LISTED:
        return few, values[0], step, values
    return (bits, values[0], step, []) if bits < 8 else None


def _occurring(tensor: Tensor) -> list[int]:
    """The numbers that occur in a tensor of bytes, in their order."""
    numbers, seen = tensor.numpy().reshape(-1), np.zeros(256, np.int64)
    for at in range(0, numbers.size, PIECE):
        seen += np.bincount(numbers[at:at + PIECE].view(np.uint8), minlength=256)
    return sorted(np.flatnonzero(seen).astype(np.uint8).view(numbers.dtype).tolist())


def unpack(written: Mapping[str, Tensor], entries: Any) -> dict[str, Tensor]:
    """The tensors that ``pack`` was given. Every wrong entry is a FileError."""
    if not isinstance(entries, dict):
        raise FileError(f"what is said of packed tensors is {str(entries)[:80]!r}; "
                        "expected names and how each is packed")
    tensors = dict(written)
    for name, entry in entries.items():
        bits, lowest, step, dtype, shape, listed = _checked(name, entry, written.get(name))
        numbers, ends = listed or _run(bits, lowest, step), torch.iinfo(dtype)
        good = [ends.min <= number <= ends.max for number in numbers]
        usable = good.index(False) if False in good else len(good)
        out = torch.empty(math.prod(shape), dtype=dtype)
        last = _unpacked(written[name].numpy(), numbers, bits, out.numpy())
        if last >= len(numbers):
            raise FileError(f"the packed tensor {name[:80]!r} holds places beyond its {len(numbers)} numbers")
        if last >= usable:
            raise FileError(f"the packed tensor {name[:80]!r} holds numbers that are no {dtype}")
        tensors[name] = out.reshape(shape)
    return tensors


def _unpacked(packed: NDArray[np.uint8], numbers: list[int], bits: int, out: NDArray[Any]) -> int:
    """Writes what ``_packed`` made ``packed`` of into ``out``; gives the last place that occurs in it."""
    number = np.zeros(256, np.int64)
    number[:len(numbers)] = numbers
    table, last = number.astype(out.dtype), 0
    for at in range(0, out.size, PIECE):
        piece = out[at:at + PIECE]
        start = at * bits // 8  # PIECE is a multiple of 8: a piece starts with a byte
        places = packing.unpack(packed[start:start + packing.packed_length(piece.size, bits)], bits, piece.size)
        last = max(last, int(places.max()))
        piece[:] = table[places]
    return last


def _checked(name: str, entry: Any, packed: Tensor | None) -> tuple[int, int, int, torch.dtype, list[int], list[int]]:
    wrong = FileError(f"the packed tensor {name[:80]!r} is described by {str(entry)[:80]!r}, which does not fit it")
    if not isinstance(entry, list) or len(entry) not in (5, 6) or packed is None or packed.dtype is not torch.uint8:
        raise wrong
    bits, lowest, step, dtype, shape, *more = entry
    listed = more[0] if more else []
    whole = [bits, lowest, step, *(shape if isinstance(shape, list) else [None])]  # None: no integer
    if not all(type(v) is int for v in whole) or not isinstance(dtype, str) or dtype not in WHOLE:
        raise wrong
    if not (1 <= bits < 8 and 1 <= step <= 255 and -128 <= lowest <= 255 and all(0 <= s < ELEMENTS for s in shape)):
        raise wrong
    if more and not (isinstance(listed, list) and 0 < len(listed) <= 1 << bits and all(
            type(v) is int and -128 <= v <= 255 for v in listed)):
        raise wrong
    if not _few(shape) or packed.shape != (packing.packed_length(math.prod(shape), bits),):
        raise wrong
    return bits, lowest, step, WHOLE[dtype], shape, listed


def _few(shape: list[int]) -> bool:
    """Whether a shape has no more axes and numbers than a tensor of a file; no product grows beyond that."""
    count = 1
    for size in shape[:AXES]:
        count = min(count * size, ELEMENTS + 1)
    return len(shape) <= AXES and count <= ELEMENTS


__all__ = ["pack", "unpack"]
