"""Entropy coding and the archive: exact, near the entropy, and hard to hurt."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import featherweight as fw
from featherweight.codec import archive_bytes, blocks, entropy, pack, unpack
from featherweight.codec.archive import MAGIC
from featherweight.errors import FileError

quick = settings(max_examples=60, deadline=None)


def entropy_bytes(symbols) -> float:
    """Order-0 entropy the long way, symbol by symbol."""
    counts = Counter(int(s) for s in symbols)
    return sum(-c * math.log2(c / len(symbols)) for c in counts.values()) / 8


def skewed(alphabet: int, count: int, power: float, seed: int = 0) -> np.ndarray:
    p = 1 / np.arange(1, alphabet + 1) ** power
    return np.random.default_rng(seed).choice(alphabet, count, p=p / p.sum()).astype(np.uint8)


# ---- the coder

@quick
@given(hnp.arrays(np.uint8, st.integers(0, 3000), elements=st.integers(0, 255)))
def test_any_symbols_come_back(symbols):
    assert np.array_equal(entropy.decode(entropy.encode(symbols), len(symbols)), symbols)


@quick
@given(st.integers(1, 256), st.integers(1, 5000), st.floats(0, 6), st.integers(0, 99))
def test_skewed_symbols_come_back(alphabet, count, power, seed):
    symbols = skewed(alphabet, count, power, seed)
    assert np.array_equal(entropy.decode(entropy.encode(symbols), count), symbols)


@pytest.mark.parametrize("symbols", [[], [7], [255], [0] * 10_000, list(range(256)), [0] * 9999 + [255]])
def test_extreme_symbols_come_back(symbols):
    symbols = np.array(symbols, np.uint8)
    stream = entropy.encode(symbols)
    assert np.array_equal(entropy.decode(stream, len(symbols)), symbols)
    if len(set(symbols.tolist())) < 2:
        assert len(stream) <= 2


@pytest.mark.parametrize("alphabet", [2, 3, 16, 32, 256])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("count", [100, 5_000, 300_000])
def test_streams_are_near_their_entropy(alphabet, power, count):
    symbols = skewed(alphabet, count, power)
    ideal = entropy_bytes(symbols)
    assert abs(ideal - entropy.entropy_bytes(symbols)) <= 1e-6 * count
    assert len(entropy.encode(symbols)) <= 1.01 * ideal + 20 + 1.25 * len(set(symbols.tolist()))


def test_histogram_levels_are_exact_below_16_and_near_above():
    counts = np.unique(np.geomspace(1, 1e9, 4000).astype(np.int64))
    kept = entropy.count_of(entropy.levels_of(counts))
    assert np.array_equal(kept[counts < 16], counts[counts < 16])
    assert (np.abs(kept - counts) <= counts / 16).all()


@quick
@given(st.binary(max_size=400), st.integers(0, 5000))
def test_a_hostile_stream_is_symbols_or_a_file_error(stream, count):
    try:
        assert len(entropy.decode(stream, count)) == count
    except FileError as error:
        assert "coded stream" in str(error)  # noqa: PT017


# ---- blocks

@quick
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 500), st.integers(0, 4), st.integers(0, 99))
def test_every_method_gives_its_numbers_back(width, count, kind, seed):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 256, count * width, np.uint8).view(f"<u{width}").copy()
    if kind == 1:
        numbers[:] = numbers[0]
    elif kind == 2:
        numbers[rng.random(count) < 0.9] = 0
    elif kind == 3:
        numbers = numbers[rng.integers(0, min(count, 7), count)]
    elif kind == 4:
        numbers[:] = np.arange(count)
    for method, (write, _) in blocks.METHODS.items():
        if (payload := write(numbers)) is not None:
            assert np.array_equal(blocks.decode(method, payload, count, width), numbers), method


def test_floats_code_by_exponent_zeros_and_palette():
    weights = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    method, planes = blocks.encode(weights.view("<u4"))
    assert method == blocks.PLANES
    assert len(planes) < 0.88 * weights.nbytes  # the exponent: 8 bits that hold under 3
    sparse = np.where(np.abs(weights) > 1.96, weights, 0)
    method, payload = blocks.encode(sparse.view("<u4"))
    assert method == blocks.SPARSE
    assert len(payload) < entropy_bytes(sparse != 0) + 0.9 * 4 * np.count_nonzero(sparse) + 40
    few = np.round(weights) + 0  # + 0: no negative zeros
    method, payload = blocks.encode(few.view("<u4"))
    assert method == blocks.PALETTE
    assert len(payload) < 1.01 * entropy_bytes(few.astype(np.int64)) + 100


@quick
@given(st.integers(0, 10), st.binary(max_size=300), st.integers(0, 2000), st.sampled_from([1, 2, 4, 8, 3]))
def test_a_hostile_block_is_numbers_or_a_file_error(method, payload, count, width):
    try:
        numbers = blocks.decode(method, payload, count, width)
    except FileError as error:
        assert "archive" in str(error) or "coded stream" in str(error)  # noqa: PT017
    else:
        assert numbers.size == count
        assert numbers.itemsize == width


# ---- the archive

class Many(nn.Module):
    """Parameters of several dtypes, an index, a mask, an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)
        self.brief = nn.Parameter(torch.randn(40).to(torch.bfloat16))
        self.register_buffer("index", torch.arange(8).flip(0))
        self.register_buffer("mask", torch.arange(8) % 3 == 0)
        self.register_buffer("none", torch.zeros(0, 4))

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))[:, self.index] * self.mask
        return self.fc(x) + self.brief.float().sum() + self.none.sum()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    fw.capture(Many(), torch.randn(2, 3, 8, 8)).save(folder / "a.fw")
    pack(folder / "a.fw", folder / "a.fwz")
    return folder / "a.fw", folder / "a.fwz"


def test_the_same_bytes_come_back(saved, tmp_path):
    network, archive = saved
    assert archive.stat().st_size < network.stat().st_size
    assert unpack(archive, tmp_path / "b.fw") == network.stat().st_size
    assert (tmp_path / "b.fw").read_bytes() == network.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"b.fw"}
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(fw.load(tmp_path / "b.fw")(x), fw.load(network)(x))


def test_packing_is_deterministic_and_told_right(saved, tmp_path):
    network, archive = saved
    assert pack(network, tmp_path / "b.fwz") == (tmp_path / "b.fwz").stat().st_size
    assert (tmp_path / "b.fwz").read_bytes() == archive.read_bytes()
    # the order of the strings in a safetensors header is not fixed: a few bytes of its deflated text
    assert abs(archive_bytes(fw.load(network)) - archive.stat().st_size) <= 16


def test_a_tensor_larger_than_a_block_comes_back(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(1100, 1000)
    with torch.no_grad():
        model.weight[model.weight.abs() < 0.027] = 0
    fw.capture(model, torch.randn(2, 1100)).save(tmp_path / "a.fw")
    size = pack(tmp_path / "a.fw", tmp_path / "a.fwz")
    unpack(tmp_path / "a.fwz", tmp_path / "b.fw")
    assert (tmp_path / "a.fw").read_bytes() == (tmp_path / "b.fw").read_bytes()
    kept = int((model.weight != 0).sum())
    assert size < 1.01 * entropy_bytes((model.weight != 0).flatten().tolist()) + 4 * kept + 6000


def test_a_truncated_archive_is_refused(saved, tmp_path):
    data = saved[1].read_bytes()
    for end in [*range(80), *range(80, len(data), 7)]:
        (tmp_path / "cut.fwz").write_bytes(data[:end])
        with pytest.raises(FileError, match=r"no featherweight archive|of version|damaged or truncated"):
            unpack(tmp_path / "cut.fwz", tmp_path / "out.fw")
    assert {p.name for p in tmp_path.iterdir()} == {"cut.fwz"}


def test_a_flipped_bit_is_refused(saved, tmp_path):
    data = saved[1].read_bytes()
    for at in [*range(80), *range(80, len(data), 7)]:
        (tmp_path / "bad.fwz").write_bytes(data[:at] + bytes((data[at] ^ 1 << at % 8,)) + data[at + 1:])
        with pytest.raises(FileError, match=r"no featherweight archive|of version|damaged"):
            unpack(tmp_path / "bad.fwz", tmp_path / "out.fw")
    assert {p.name for p in tmp_path.iterdir()} == {"bad.fwz"}


def signed(body: bytes, version: int = 1) -> bytes:
    """An archive whose outer checksum is right: what an attacker would send."""
    return MAGIC + bytes((version,)) + hashlib.sha256(body).digest() + body


def test_a_flipped_bit_under_a_right_checksum_is_refused(saved, tmp_path):
    body = saved[1].read_bytes()[40:]
    for at in range(0, len(body), 5):
        bad = body[:at] + bytes((body[at] ^ 1 << at % 8,)) + body[at + 1:]
        (tmp_path / "bad.fwz").write_bytes(signed(bad, saved[1].read_bytes()[7]))
        with pytest.raises(FileError, match=r"archive|coded stream|damaged|claims"):
            unpack(tmp_path / "bad.fwz", tmp_path / "out.fw")
    assert {p.name for p in tmp_path.iterdir()} == {"bad.fwz"}


@pytest.mark.parametrize(("claimed", "tail", "match"), [
    (1 << 50, b"", "claims to hold"),
    (1 << 20, b"", "do not add up"),
    (1 << 20, b"\x02" + blocks.varint(1 << 40) + blocks.varint(2) + b"\x00\x00", "there is no block"),
    (1 << 20, b"\x02" + blocks.varint(1 << 20) + blocks.varint(1 << 40), "there is no block"),
    (8, b"\x3f" + blocks.varint(1) + blocks.varint(0), "there is no block"),
    (8, b"\x40" + blocks.varint(1) + blocks.varint(0), "there is no block"),
    (8, b"\x00\x80", "a length has no end"),
    (1 << 20, b"\x34" + blocks.varint(1 << 17) + blocks.varint(3) + b"\xff\x00\x00", "bytes for 256 numbers"),
    (1 << 20, b"\x35" + blocks.varint(1 << 17) + blocks.varint(4) + b"\x02\x01\x01\x05", "mask of zeros"),
    (1 << 20, b"\x05" + blocks.varint(1 << 20) + blocks.varint(4) + b"\x02\x01\x01\x00", "bytes for 1048576 numbers"),
])
def test_huge_and_crooked_claims_are_refused(claimed, tail, match, tmp_path):
    (tmp_path / "bad.fwz").write_bytes(signed(bytes(32) + blocks.varint(claimed) + tail))
    with pytest.raises(FileError, match=match):
        unpack(tmp_path / "bad.fwz", tmp_path / "out.fw")


def test_a_ratio_bomb_needs_leave(tmp_path):
    block = b"\x34" + blocks.varint(1 << 20) + blocks.varint(11) + b"\x00" + bytes(8) + b"\x00\x00"  # 8 MiB of zeros
    count = 4096
    (tmp_path / "bomb.fwz").write_bytes(signed(bytes(32) + blocks.varint(count << 23) + block * count))
    with pytest.raises(FileError, match=r"claims to hold 34359738368 bytes.*limit=34359738368"):
        unpack(tmp_path / "bomb.fwz", tmp_path / "out.fw")
    with pytest.raises(FileError, match="claims to hold"):
        unpack(tmp_path / "bomb.fwz", tmp_path / "out.fw", limit=1000)


def test_a_deflate_bomb_stops_at_its_claim():
    import zlib

    bomb = zlib.compress(bytes(50_000_000), 9)
    with pytest.raises(FileError, match="does not end where it claims"):
        blocks.decode(blocks.DEFLATED, bomb, 1000, 1)


def test_only_networks_are_packed(saved, tmp_path):
    def header(entries) -> bytes:
        text = json.dumps({"__metadata__": {"format": "featherweight 1"}, **entries}).encode()
        return len(text).to_bytes(8, "little") + text

    for data in (b"", b"PK\x03\x04" + bytes(100), saved[0].read_bytes()[:-1], saved[0].read_bytes() + b"x",
                 b"\xff" * 100, header({"a": {"dtype": "F32", "data_offsets": [4, 8]}}) + bytes(8),
                 header({"a": {"dtype": "F32", "data_offsets": [0, 7]}}) + bytes(7), header({"a": 3}),
                 header({"a": {"dtype": "F32", "data_offsets": [0]}})):
        (tmp_path / "x.fw").write_bytes(data)
        with pytest.raises(FileError, match=r"no featherweight file|is damaged"):
            pack(tmp_path / "x.fw", tmp_path / "x.fwz")
    with pytest.raises(FileError, match="cannot be read"):
        pack(tmp_path / "missing.fw", tmp_path / "x.fwz")
    assert {p.name for p in tmp_path.iterdir()} == {"x.fw"}
