"""Integers of a few bits: laid into bytes and back, in files and in archives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import featherweight as fw
from featherweight.codec import blocks
from featherweight.codec.archive import pack as archive
from featherweight.codec.archive import unpack as unarchive
from featherweight.errors import FileError
from featherweight.network.file import packed
from featherweight.numerics import packing


def by_hand(numbers, bits):
    """The same bytes from one long integer."""
    total = sum(int(n) << bits * k for k, n in enumerate(numbers))
    return total.to_bytes(packing.packed_length(len(numbers), bits), "little")


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 2**31))
def test_numbers_lie_end_to_end(bits, count, seed):
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    found = packing.pack(numbers, bits)
    assert found.tobytes() == by_hand(numbers, bits)
    assert np.array_equal(packing.unpack(found, bits, count), numbers)


@pytest.mark.parametrize(("values", "bits"), [([-1, 1], 1), ([-3, -1, 1, 3], 2), ([-1, 0, 1], 2), ([-7, 0, 7, 3], 2),
                                              ([0, 31, 4], 2), ([5], 1), ([-128, 127, 1, 2], 2),
                                              ([-10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 10], 4),
                                              ([*range(0, 127, 2), *range(1, 80, 3), 127], 7)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_a_tensor_takes_as_many_bits_as_its_values_need(values, bits, dtype):
    values = torch.tensor(values)
    if dtype is torch.uint8:
        values = values - values.min()
    numbers = values[torch.randint(len(values), (31, 33))]
    numbers.view(-1)[:len(values)] = values
    numbers = numbers.to(dtype)
    written, entries = packed.pack({"a": numbers, "b": torch.zeros(4)})
    assert ("a" in entries) == (bits is not None)
    assert written["a"].numel() == (31 * 33 if bits is None else math.ceil(31 * 33 * bits / 8))
    back = packed.unpack(written, entries)
    assert torch.equal(back["a"], numbers)
    assert back["a"].dtype is dtype


@pytest.mark.parametrize("entry", [
    [4, 0, 1, "int8", [10, 60]], [0, 0, 1, "int8", [20, 60]], [8, 0, 1, "uint8", [20, 30]], "4 bits", [4, 0, 1, "int8"],
    [4, 0, 1, "float32", [20, 60]], [4, 0, 1, "int8", [-20, -60]], [4, 0, 1, "int8", [20, 60.0]],
    [4, 0, 1, "int8", [20, 60], [1, 2]], [4, 0, 1, "int8", [20, 60], []], [4, 0, 1, "int8", [20, 60], [1, 300]],
    [4, 0, 1, "int8", [20, 60], 7],
    [4, True, 1, "int8", [20, 60]], [4, 0, 1, "int8", [1 << 62, 1 << 62]], [4, 0, 255, "int8", [20, 60]],
])
def test_wrong_entries_are_file_errors(entry):
    tensors = {"a": torch.full((600,), 255, dtype=torch.uint8)}
    with pytest.raises(FileError, match="packed tensor"):
        packed.unpack(tensors, {"a": entry})
    with pytest.raises(FileError, match="packed"):
        packed.unpack(tensors, [entry])
    with pytest.raises(FileError, match="packed tensor 'b'"):
        packed.unpack(tensors, {"b": [4, 0, 1, "int8", [20, 60]]})


def network_of(numbers):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("numbers", numbers)

        def forward(self, x):
            return x @ self.numbers.float()

    return fw.capture(Model(), torch.randn(2, numbers.shape[0]))


@pytest.mark.parametrize("bits", range(1, 8))
def test_files_and_archives_of_packed_numbers(tmp_path, bits):
    torch.manual_seed(bits)
    # about Gaussian, so that there is something to gain by coding
    numbers = (torch.randn(1001, 1201) * 2**bits / 8 + 2**bits / 2).round().clamp(0, 2**bits - 1).to(torch.uint8)
    network, file = network_of(numbers), tmp_path / "n.fw"
    size = network.save(file)
    assert size < 1001 * 1201 * bits / 8 + 3000
    assert torch.equal(fw.load(file).tensor("numbers"), numbers)
    small = archive(file, tmp_path / "n.fwz")
    unarchive(tmp_path / "n.fwz", tmp_path / "again.fw")
    assert file.read_bytes() == (tmp_path / "again.fw").read_bytes()
    counts = np.bincount(numbers.numpy().ravel()) / numbers.numel()
    entropy = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum()
    assert small < 1.01 * 1001 * 1201 * entropy / 8 + 3000


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 500), st.integers(0, 2**31))
def test_blocks_of_packed_numbers_keep_every_bit(bits, count, seed):
    data = np.random.default_rng(seed).integers(0, 256, count).astype(np.uint8)
    payload = blocks._packed(data, bits)
    assert np.array_equal(blocks.decode(blocks.PACKED, payload, count, 1), data)


@pytest.mark.parametrize(("payload", "width"), [(b"", 1), (b"\x09\0abc", 1), (b"\x04\0abc", 2)])
def test_damaged_blocks_of_packed_numbers(payload, width):
    with pytest.raises(FileError, match="damaged"):
        blocks.decode(blocks.PACKED, payload, 4, width)
