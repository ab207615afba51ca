"""A second reader of archives, slow and obvious, written from FORMAT.md alone; and what matrices of symbols cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from safetensors.numpy import save_file
from torch import nn

import featherweight as fw
from featherweight.codec import blocks, entropy, rows, words
from featherweight.codec.archive import contents
from featherweight.codec.protobuf import raw_tensors
from featherweight.errors import FileError

ROOT = Path(__file__).parents[1]
queue, models = constriction.stream.queue, constriction.stream.model


class Reader:
    """FORMAT.md, sentence by sentence, one symbol at a time."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        assert 0 <= count <= len(self.data) - self.at
        self.at += count
        return self.data[self.at - count:self.at]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        digits = [self.byte()]
        while digits[-1] > 127:
            digits.append(self.byte())
        return sum((d % 128) * 128 ** i for i, d in enumerate(digits))

    def part(self) -> bytes:
        return self.take(self.varint())


def count_of(level: int) -> int:
    return level if level < 16 else (8 + level % 8) * 2 ** (level // 8 - 1)


def coder(stream: bytes):
    return queue.RangeDecoder(np.array([int.from_bytes(stream[i:i + 4], "little") for i in range(0, len(stream), 4)],
                                       np.uint32))


def order_0(stream: bytes, n: int) -> list[int]:
    if not n:
        return []
    read = Reader(stream)
    first, last = read.byte(), read.byte()
    if first == last:
        return [first] * n
    form = read.byte()
    levels = zlib.decompress(read.take(read.byte()), -15) if form else read.take(last - first + 1)
    words = coder(read.rest())
    model = models.Categorical(np.array([count_of(level) for level in levels], np.float64), perfect=False)
    return [first + int(words.decode(model)) for _ in range(n)]


def matrix(stream: bytes, n: int) -> list[int]:
    form, read = stream[0], Reader(stream[1:])
    return order_0(read.rest(), n) if form == 0 else contexts(read, n)


def contexts(read: Reader, n: int) -> list[int]:
    c, z, cap, g = read.varint(), read.byte(), read.byte(), read.byte()
    busy, left = (list(read.take(read.byte())) for _ in range(2))
    across, down = order_0(read.part(), n // c), order_0(read.part(), c)
    histograms, words = Reader(zlib.decompress(read.part(), -15)), coder(read.part())
    models_of = []
    for _ in range((len(busy) + 1) * (len(left) + 2 if g else 1)):
        first, last = histograms.byte(), histograms.byte()
        levels = histograms.take(last - first + 1) if first < last else b""
        models_of.append((first, models.Categorical(np.array([count_of(x) for x in levels], np.float64), perfect=False)
                          if levels else None))
    assert histograms.at == len(histograms.data)
    found: dict[tuple[int, int], int] = {}

    def context(row: int, column: int) -> int:
        b = sum(t <= across[row] + down[column] for t in busy)
        if not g:
            return b
        p, sums, used = column % g, 0, 0
        for away, weight in ((1, 2), (2, 1), (3, 1)):
            if away <= p:
                sums += weight * min(abs(found[row, column - away] - z), cap)
                used += weight
        value = (4 * sums + used // 2) // used if p else 0
        return b * (len(left) + 2) + (1 + sum(t <= value for t in left) if p else 0)

    for p in range(g or 1):
        places = [(row, column) for row in range(n // c) for column in range(c) if not g or column % g == p]
        for _, (row, column) in sorted((context(*place), place) for place in places):
            first, model = models_of[context(row, column)]
            found[row, column] = first + (0 if model is None else int(words.decode(model)))
    return [found[row, column] for row in range(n // c) for column in range(c)]


def numbers_in(packed: bytes, bits: int, count: int) -> list[int]:
    whole = int.from_bytes(packed, "little")
    return [whole >> bits * i & 2 ** bits - 1 for i in range(count)]


def packed(numbers: list[int], bits: int, length: int, left: int = 0) -> bytes:
    whole = sum(number << bits * i for i, number in enumerate(numbers)) | left << bits * len(numbers)
    return whole.to_bytes(length, "little")


def little(numbers: list[int], width: int) -> bytes:
    return b"".join(int(x).to_bytes(width, "little") for x in numbers)


def planes(payload: bytes, n: int, width: int) -> bytes:
    read = Reader(payload)
    bytes_of = [list(part) if len(part) == n else order_0(part, n) for part in (read.part() for _ in range(width))]
    top = 8 * width - 1
    turned = [sum(plane[i] << 8 * p for p, plane in enumerate(bytes_of)) for i in range(n)]
    return little([t >> 1 | (t & 1) << top for t in turned], width)


def palette(payload: bytes, n: int, width: int) -> bytes:
    size = payload[0] + 1
    listed = [payload[1 + i * width:1 + (i + 1) * width] for i in range(size)]
    return b"".join(listed[i] for i in order_0(payload[1 + size * width:], n))


def sparse(payload: bytes, n: int, width: int) -> bytes:
    read = Reader(payload)
    marks = order_0(read.part(), n)
    held = block(read.byte(), read.rest(), marks.count(1), width)
    some = iter([held[i:i + width] for i in range(0, len(held), width)])
    return b"".join(next(some) if m == 1 else bytes(width - 1) + (b"\x80" if m == 2 else b"\0") for m in marks)


def few_bits(payload: bytes, n: int, width: int) -> bytes:
    b = payload[0]
    return packed(order_0(payload[2:], 8 * n // b), b, n, payload[1])


def few_bits_in_rows(payload: bytes, n: int, width: int) -> bytes:
    read = Reader(payload)
    b, m = read.byte(), read.varint()
    return packed(matrix(read.rest(), m), b, n)


def text(payload: bytes, n: int, width: int) -> bytes:
    return zlib.decompressobj(-15, (files("featherweight.codec") / "words.txt").read_bytes()).decompress(payload)


METHODS: list[Callable[[bytes, int, int], bytes]] = [
    lambda p, n, width: p,
    lambda p, n, width: zlib.decompress(p),
    lambda p, n, width: bytes(order_0(p, n)),
    planes, palette, sparse, few_bits,
    lambda p, n, width: bytes(matrix(p, n)),
    few_bits_in_rows,
    text,
]


def block(method: int, payload: bytes, count: int, width: int) -> bytes:
    return METHODS[method](payload, count, width)


def slow_unpack(archive: bytes) -> tuple[bytes, set[int]]:
    """The file inside, and the methods that were met."""
    read = Reader(archive)
    assert read.take(8) == bytes.fromhex("9346575A0D0A1A03")
    assert read.take(32) == hashlib.sha256(archive[40:]).digest()
    inside, kind_of_file, length, found, met = read.take(8), read.byte(), read.varint(), b"", set()
    while read.at < len(archive):
        begin, kind, count = read.at, read.byte(), read.varint()
        found += block(kind % 16, read.part(), count, 2 ** (kind // 16))
        check = zlib.crc32(archive[begin:read.at])
        assert read.take(4) == check.to_bytes(4, "little")
        met.add(kind % 16)
    assert len(found) == length
    assert hashlib.sha256(bytes([kind_of_file]) + found).digest()[:8] == inside
    assert kind_of_file in (0, 1)
    assert kind_of_file == 1 or found[8:9] == b"{"
    return found, met


def pruned(o: int, i: int, share: float, seed: int = 0) -> torch.Tensor:
    """A weight that is dense in some rows and columns, as pruned layers are."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(o, i, generator=generator)
    score = rough.abs() * torch.exp(torch.randn(o, 1, generator=generator) + torch.randn(1, i, generator=generator))
    return rough * (score >= score.flatten().quantile(1 - share))


def test_the_page_alone_is_enough_to_read_an_archive(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 100), nn.ReLU(),
                          nn.Linear(100, 80))
    with torch.no_grad():
        model[4].weight.copy_(pruned(100, 96, 0.1))
    network = fw.capture(model.eval(), torch.zeros(2, 1, 6, 6))
    task = fw.Task(calibration=lambda: iter(()))
    shared = fw.share.Codebook(bits=3, min_size=1000).plan(network, task).apply(network)
    met = set()
    for name, net in (("plain", network), ("shared", shared)):
        net.save(tmp_path / f"{name}.fw")
        fw.codec.pack(tmp_path / f"{name}.fw", tmp_path / f"{name}.fwz")
        found, used = slow_unpack((tmp_path / f"{name}.fwz").read_bytes())
        met |= used
        assert found == (tmp_path / f"{name}.fw").read_bytes()
    assert {blocks.TEXT, blocks.PACKED_ROWS, blocks.SPARSE, blocks.PLANES} <= met


def matrices(draw: st.DrawFn) -> np.ndarray:
    o, i = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    symbols = pruned(o, i, draw(st.floats(0.05, 1)), draw(st.integers(0, 99))).mul(draw(st.sampled_from([1, 5, 40])))
    return (symbols.round().clamp(-128, 127) + 128).numpy().astype(np.uint8)


LOOKING = st.tuples(st.sampled_from([0, 1, 3, 8, 9, 16]), st.sampled_from([1, 4, 15]), st.integers(0, 4),
                    st.integers(0, 4))


def with_contexts(symbols: np.ndarray, group: int, cap: int, busy: int, left: int, seed: int = 0) -> bytes:
    """A stream under contexts that nobody would choose."""
    drawn = np.random.default_rng(seed)
    codes = [drawn.integers(0, rows.CODES, n).astype(np.uint8) for n in symbols.shape]
    cuts = [np.sort(drawn.integers(0, most, n)).astype(np.uint8) for most, n in ((62, busy), (4 * cap, left))]
    return bytes((rows.CONTEXTS,)) + rows.written(symbols, rows.Contexts(*codes, 128, cap, group, *cuts))


@settings(max_examples=60, deadline=None)
@given(st.composite(matrices)(), LOOKING)
def test_both_readers_read_every_form_of_a_matrix(symbols, looking):
    flat, columns = symbols.reshape(-1), symbols.shape[1]
    forms = [rows.encode(flat, columns), bytes((rows.CONTEXTS,)) + rows.written(symbols, rows.chosen(symbols)),
             with_contexts(symbols, *looking)]
    for stream in forms:
        assert np.array_equal(rows.decode(stream, flat.size), flat)
        assert matrix(stream, flat.size) == flat.tolist()


def test_a_stream_is_within_three_hundredths_of_its_model():
    """The bits that the histograms of the contexts promise, beside the words that came out and all that says them."""
    symbols = torch.bucketize(pruned(300, 900, 0.1), torch.linspace(-2, 2, 8)).numpy().astype(np.uint8)
    found = rows.chosen(symbols)
    step, pairs = max(found.group, 1), []
    for phase in found.phases():
        pairs += zip(found.of(symbols, phase).reshape(-1).tolist(), symbols[:, phase::step].reshape(-1).tolist(),
                     strict=True)
    both, alone = Counter(pairs), Counter(context for context, _ in pairs)
    ideal = -sum(n * math.log2(n / alone[context]) for (context, _), n in both.items()) / 8
    stream = rows.written(symbols, found)
    assert ideal < len(stream) < 1.03 * ideal + 900


def test_rows_and_columns_are_worth_a_tenth_of_a_pruned_layer():
    weight = pruned(300, 400, 0.03)
    symbols = torch.bucketize(weight, torch.linspace(-2, 2, 8)).numpy().astype(np.uint8).reshape(-1)
    assert len(rows.encode(symbols, 400)) < 0.9 * len(entropy.encode(symbols))


def test_rows_in_classes_are_worth_something_where_scales_differ():
    generator = np.random.default_rng(0)
    scale = np.exp(generator.normal(size=(64, 1)))
    symbols = np.clip(np.round(generator.normal(size=(64, 500)) * scale * 3) + 128, 0, 255).astype(np.uint8)
    assert len(rows.encode(symbols.reshape(-1), 500)) < 0.95 * len(entropy.encode(symbols.reshape(-1)))


def test_what_stands_left_is_worth_a_tenth_where_kernels_differ():
    generator = np.random.default_rng(0)
    kernels = np.exp(1.5 * generator.normal(size=(64, 64, 1)))
    symbols = np.clip(np.round(generator.normal(size=(64, 64, 9)) * kernels) + 16, 0, 31).astype(np.uint8)
    coded = len(rows.encode(symbols.reshape(-1), 576))
    assert coded < 0.9 * len(entropy.encode(symbols.reshape(-1)))
    assert rows.chosen(symbols.reshape(64, 576)).group == 9


def test_damaged_streams_of_matrices_are_refused_or_give_as_many_symbols():
    symbols = torch.bucketize(pruned(30, 40, 0.2), torch.linspace(-2, 2, 8)).numpy().astype(np.uint8)
    for stream in (bytes((rows.CONTEXTS,)) + rows.written(symbols, rows.chosen(symbols)),
                   with_contexts(symbols, 8, 4, 3, 3)):
        refused = 0
        for at in range(len(stream)):
            for bad in (stream[:at] + bytes((stream[at] ^ 1 << at % 8,)) + stream[at + 1:], stream[:at]):
                try:
                    assert rows.decode(bad, symbols.size).size == symbols.size
                except FileError:
                    refused += 1
        assert refused > len(stream)


def test_a_text_is_bounded_by_its_claim():
    text = b'{"name":"x","op":"input"}'
    assert words.read(words.write(text), len(text)) == text
    for claim in (len(text) - 1, len(text) + 1):
        with pytest.raises(FileError, match="does not end where it claims"):
            words.read(words.write(text), claim)


def test_the_words_are_those_that_the_page_names():
    named = re.search(r"SHA-256 ([0-9a-f]{64})", (ROOT / "FORMAT.md").read_text())
    assert named is not None
    assert hashlib.sha256(words.WORDS).hexdigest() == named[1]


def test_any_safetensors_file_is_packed(tmp_path):
    generator = np.random.default_rng(0)
    save_file({"a": generator.normal(size=(64, 100)).astype(np.float32), "b": np.arange(7, dtype=np.int64),
               "c": generator.normal(size=5000).astype(np.float16)}, tmp_path / "any.safetensors")
    size = fw.codec.pack(tmp_path / "any.safetensors", tmp_path / "any.fwz")
    assert size < 0.9 * (tmp_path / "any.safetensors").stat().st_size
    fw.codec.unpack(tmp_path / "any.fwz", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "any.safetensors").read_bytes()
    assert slow_unpack((tmp_path / "any.fwz").read_bytes())[0] == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("name", ["any.safetensors", "any.onnx"])
def test_an_archive_is_unpacked_without_torch(name, tmp_path):
    if name.endswith("onnx"):
        fw.deploy.target("onnxruntime").export(fw.capture(nn.Linear(40, 30), torch.zeros(2, 40)), tmp_path / name)
    else:
        save_file({"a": np.arange(5000, dtype=np.float32)}, tmp_path / name)
    fw.codec.pack(tmp_path / name, tmp_path / "any.fwz")
    hidden = ("import importlib.abc, sys\n"
              "class Hidden(importlib.abc.MetaPathFinder):\n"
              "    def find_spec(self, name, path, target=None):\n"
              "        if name.partition('.')[0] in ('torch', 'onnx', 'safetensors', 'pydantic', 'typer'):\n"
              "            raise ModuleNotFoundError(name, name=name)\n"
              "sys.meta_path.insert(0, Hidden())\n")
    reading = hidden + "from featherweight.cli import main; sys.argv.insert(1, 'unpack'); main()"
    for arguments, code, said in (((tmp_path / "any.fwz", tmp_path / "again"), 0, "bytes"),
                                  ((tmp_path / name, tmp_path / "no"), 2, "no featherweight archive"),
                                  ((tmp_path / "any.fwz",), 2, "usage")):
        done = subprocess.run([sys.executable, "-c", reading, *map(str, arguments)], capture_output=True, text=True,
                              check=False)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
    assert (tmp_path / "again").read_bytes() == (tmp_path / name).read_bytes()


def test_one_tensor_is_read_without_the_others(tmp_path):
    arrays = {"a": np.zeros((300, 100), np.float32), "b": np.arange(9, dtype=np.uint8).reshape(3, 3)}
    arrays["a"][::7, ::9] = 1.5
    save_file(arrays, tmp_path / "any.safetensors")
    fw.codec.pack(tmp_path / "any.safetensors", tmp_path / "any.fwz")
    for name, array in arrays.items():
        assert np.array_equal(fw.codec.read_tensor(tmp_path / "any.fwz", name), array)
    with pytest.raises(FileError, match="holds no tensor 'x'"):
        fw.codec.read_tensor(tmp_path / "any.fwz", "x")
    assert json.loads(slow_unpack((tmp_path / "any.fwz").read_bytes())[0][8:].split(b"}}")[0] + b"}}")


def test_damage_in_one_tensor_leaves_the_others_readable(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=(70, 90)).astype(np.float32) for name in "abc"}
    save_file(arrays, tmp_path / "any.safetensors")
    fw.codec.pack(tmp_path / "any.safetensors", tmp_path / "any.fwz")
    data = bytearray((tmp_path / "any.fwz").read_bytes())
    for name, block in zip("abc", contents(tmp_path / "any.fwz")[2][1:], strict=True):
        for at in (block.begin, block.start, block.end - 1, block.end + 2):
            bad = bytes(data[:at]) + bytes((data[at] ^ 64,)) + bytes(data[at + 1:])
            (tmp_path / "bad.fwz").write_bytes(bad)
            with pytest.raises(FileError, match="damaged"):
                fw.codec.read_tensor(tmp_path / "bad.fwz", name)
            if at != block.begin:
                for other in set("abc") - {name}:
                    assert np.array_equal(fw.codec.read_tensor(tmp_path / "bad.fwz", other), arrays[other])
            with pytest.raises(FileError, match="damaged"):
                fw.codec.unpack(tmp_path / "bad.fwz", tmp_path / "out")


# ---- ONNX files

def onnx_file(path: Path) -> dict[str, bytes]:
    """A model with initializers of several types, one in a subgraph of a node, and one as a constant; their bytes."""
    generator = np.random.default_rng(0)
    arrays = {"float": generator.normal(size=(40, 90)).astype(np.float32),
              "index": np.tile(np.arange(7, dtype=np.uint8), 300).reshape(30, 70),
              "half": generator.normal(size=900).astype(np.float16), "long": np.arange(200, dtype=np.int64),
              "few": generator.normal(size=3).astype(np.float32), "inner": generator.normal(size=400)}
    made = {name: numpy_helper.from_array(array, name) for name, array in arrays.items()}
    inner = helper.make_graph([], "branch", [], [], [made["inner"]])
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
             helper.make_node("Constant", [], ["k"], value=made["half"])]
    graph = helper.make_graph(nodes, "g", [], [], [made[n] for n in ("float", "index", "long", "few")])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return {name: array.tobytes() for name, array in arrays.items()}


def test_onnx_files_come_back_and_their_tensors_are_found(tmp_path):
    arrays = onnx_file(tmp_path / "a.onnx")
    data = (tmp_path / "a.onnx").read_bytes()
    found = [data[t.start:t.end] for t in raw_tensors(data)]
    assert sorted(found) == sorted([*arrays.values(), arrays["inner"]])  # both branches
    columns = {data[t.start:t.end]: (t.width, t.columns) for t in raw_tensors(data)}
    assert columns[arrays["float"]] == (4, 90)
    assert columns[arrays["index"]] == (1, 70)
    assert columns[arrays["half"]] == (2, 0)
    size = fw.codec.pack(tmp_path / "a.onnx", tmp_path / "a.fwz")
    assert size < 0.85 * len(data)
    assert fw.codec.unpack(tmp_path / "a.fwz", tmp_path / "b.onnx") == len(data)
    assert (tmp_path / "b.onnx").read_bytes() == data
    assert slow_unpack((tmp_path / "a.fwz").read_bytes())[0] == data
    with pytest.raises(FileError, match=r"holds an ONNX file.*write featherweight unpack"):
        fw.codec.read_tensor(tmp_path / "a.fwz", "float")


def test_a_deployed_file_is_packed_as_the_network_is(tmp_path):
    torch.manual_seed(0)
    net = fw.capture(nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)), torch.zeros(2, 8, 9, 9))
    small = fw.share.Codebook(bits=3).plan(net, fw.Task()).apply(net)
    fw.deploy.target("onnxruntime").export(small, tmp_path / "a.onnx")
    size = fw.codec.pack(tmp_path / "a.onnx", tmp_path / "a.fwz")
    assert size < fw.codec.archive_bytes(small) + 1500
    fw.codec.unpack(tmp_path / "a.fwz", tmp_path / "b.onnx")
    runner = fw.deploy.target("onnxruntime").load(tmp_path / "b.onnx", 1, like=small.signature)
    x = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(runner(x), small(x).detach(), rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 500), st.integers(0, 255))
def test_what_is_no_model_is_refused_or_comes_back(tmp_path_factory, junk, at, byte):
    """Whatever is no ONNX file is refused in words; one with a changed byte is refused, or packed and given back."""
    folder = tmp_path_factory.mktemp("junk")
    onnx_file(folder / "a.onnx")
    data = bytearray((folder / "a.onnx").read_bytes())
    data[at % len(data)] = byte
    for given_ in (junk, bytes(data), bytes(data[:at]) + junk):
        (folder / "j.onnx").write_bytes(given_)
        (folder / "again").write_bytes(given_)
        with contextlib.suppress(FileError):
            fw.codec.pack(folder / "j.onnx", folder / "j.fwz")
            fw.codec.unpack(folder / "j.fwz", folder / "again")
        assert (folder / "again").read_bytes() == given_
