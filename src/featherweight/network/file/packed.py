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
from torch import Tensor

from featherweight.errors import FileError
from featherweight.numerics import packing

WHOLE = {"int8": torch.int8, "uint8": torch.uint8}
SMALLEST = 256  #: numbers; for fewer, saying how they are packed takes what is saved
LISTED = 32  #: as many different numbers are listed at most
ELEMENTS = 1 << 40  #: no file holds more numbers in one tensor


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """The tensors as they are written, and the entries of "packed"."""
    written, entries = dict(tensors), {}
    for name, tensor in tensors.items():
        found = _bits(tensor)
        if found is not None:
            bits, lowest, step, listed = found
            numbers = tensor.numpy().astype(np.int16)
            places = (np.searchsorted(listed, numbers) if listed else (numbers - lowest) // step).astype(np.uint8)
            written[name] = torch.from_numpy(packing.pack(places, bits))
            entries[name] = [bits, lowest, step, str(tensor.dtype).removeprefix("torch."), list(tensor.shape),
                             *([listed] if listed else [])]
    return written, entries


def _bits(tensor: Tensor) -> tuple[int, int, int, list[int]] | None:
    """(bits, lowest, step, list) that hold every number of a tensor; None where one byte each is as good. The list is
    empty where it would save nothing."""
    if tensor.dtype not in WHOLE.values() or tensor.numel() < SMALLEST:
        return None
    values = torch.unique(tensor).tolist()
    step = max(1, math.gcd(*(v - values[0] for v in values)))
    bits = max(1, ((values[-1] - values[0]) // step).bit_length())
    few = max(1, (len(values) - 1).bit_length())
    if few < bits and len(values) <= LISTED:
        return few, values[0], step, values
    return (bits, values[0], step, []) if bits < 8 else None


def unpack(written: Mapping[str, Tensor], entries: Any) -> dict[str, Tensor]:
    """The tensors that ``pack`` was given. Every wrong entry is a FileError."""
    if not isinstance(entries, dict):
        raise FileError(f"what is said of packed tensors is {str(entries)[:80]!r}; "
                        "expected names and how each is packed")
    tensors = dict(written)
    for name, entry in entries.items():
        bits, lowest, step, dtype, shape, listed = _checked(name, entry, written.get(name))
        count = math.prod(shape)
        places = packing.unpack(written[name].numpy(), bits, count).astype(np.int16)
        if listed and places.max(initial=0) >= len(listed):
            raise FileError(f"the packed tensor {name[:80]!r} holds places beyond its {len(listed)} numbers")
        numbers = np.array(listed, np.int16)[places] if listed else places * step + lowest
        ends = torch.iinfo(dtype)
        if numbers.min(initial=ends.min) < ends.min or numbers.max(initial=ends.max) > ends.max:
            raise FileError(f"the packed tensor {name[:80]!r} holds numbers that are no {dtype}")
        tensors[name] = torch.from_numpy(numbers).to(dtype).reshape(shape)
    return tensors


def _checked(name: str, entry: Any, packed: Tensor | None) -> tuple[int, int, int, torch.dtype, list[int], list[int]]:
    wrong = FileError(f"the packed tensor {name[:80]!r} is described by {str(entry)[:80]!r}, which does not fit it")
    if not isinstance(entry, list) or len(entry) not in (5, 6) or packed is None or packed.dtype is not torch.uint8:
        raise wrong
    bits, lowest, step, dtype, shape, *more = entry
    listed = more[0] if more else []
    whole = [bits, lowest, step, *(shape if isinstance(shape, list) else [None])]
    if not all(type(v) is int for v in whole) or dtype not in WHOLE or not isinstance(shape, list):
        raise wrong
    if not (1 <= bits < 8 and 1 <= step <= 255 and -128 <= lowest <= 255 and all(0 <= s < ELEMENTS for s in shape)):
        raise wrong
    if more and not (isinstance(listed, list) and listed and all(type(v) is int and -128 <= v <= 255 for v in listed)):
        raise wrong
    if math.prod(shape) > ELEMENTS or packed.shape != (packing.packed_length(math.prod(shape), bits),):
        raise wrong
    return bits, lowest, step, WHOLE[dtype], shape, listed


__all__ = ["pack", "unpack"]
