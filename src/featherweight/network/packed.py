"""Tensors of one-byte whole numbers in a file: written with as many bits a number as their values need.

What is packed is said in the file's description under "packed": {name: [bits, lowest, step, dtype, shape]}. A number q
stands as (q - lowest) / step in ``bits`` bits (``numerics.packing``); the bytes are a uint8 tensor of the same name.
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
ELEMENTS = 1 << 40  #: no file holds more numbers in one tensor


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """The tensors as they are written, and the entries of "packed"."""
    written, entries = dict(tensors), {}
    for name, tensor in tensors.items():
        found = _bits(tensor)
        if found is not None:
            bits, lowest, step = found
            numbers = (tensor.numpy().astype(np.int16) - lowest) // step
            written[name] = torch.from_numpy(packing.pack(numbers.astype(np.uint8), bits))
            entries[name] = [bits, lowest, step, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    return written, entries


def _bits(tensor: Tensor) -> tuple[int, int, int] | None:
    """(bits, lowest, step) that hold every number of a tensor; None where one byte each is as good."""
    if tensor.dtype not in WHOLE.values() or tensor.numel() < SMALLEST:
        return None
    values = torch.unique(tensor).tolist()
    step = max(1, math.gcd(*(v - values[0] for v in values)))
    bits = max(1, ((values[-1] - values[0]) // step).bit_length())
    return (bits, values[0], step) if bits < 8 else None


def unpack(written: Mapping[str, Tensor], entries: Any) -> dict[str, Tensor]:
    """The tensors that ``pack`` was given. Every wrong entry is a FileError."""
    if not isinstance(entries, dict):
        raise FileError(f"what is said of packed tensors is {str(entries)[:80]!r}; "
                        "expected names and how each is packed")
    tensors = dict(written)
    for name, entry in entries.items():
        bits, lowest, step, dtype, shape = _checked(name, entry, written.get(name))
        count = math.prod(shape)
        numbers = packing.unpack(written[name].numpy(), bits, count).astype(np.int16) * step + lowest
        ends = torch.iinfo(dtype)
        if numbers.min(initial=ends.min) < ends.min or numbers.max(initial=ends.max) > ends.max:
            raise FileError(f"the packed tensor {name[:80]!r} holds numbers that are no {dtype}")
        tensors[name] = torch.from_numpy(numbers).to(dtype).reshape(shape)
    return tensors


def _checked(name: str, entry: Any, packed: Tensor | None) -> tuple[int, int, int, torch.dtype, list[int]]:
    wrong = FileError(f"the packed tensor {name[:80]!r} is described by {str(entry)[:80]!r}, which does not fit it")
    if not isinstance(entry, list) or len(entry) != 5 or packed is None or packed.dtype is not torch.uint8:
        raise wrong
    bits, lowest, step, dtype, shape = entry
    whole = [bits, lowest, step, *(shape if isinstance(shape, list) else [None])]
    if not all(type(v) is int for v in whole) or dtype not in WHOLE or not isinstance(shape, list):
        raise wrong
    if not (1 <= bits < 8 and 1 <= step <= 255 and -128 <= lowest <= 255 and all(0 <= s < ELEMENTS for s in shape)):
        raise wrong
    if math.prod(shape) > ELEMENTS or packed.shape != (packing.packed_length(math.prod(shape), bits),):
        raise wrong
    return bits, lowest, step, WHOLE[dtype], shape


__all__ = ["pack", "unpack"]
