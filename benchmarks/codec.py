"""The archive's coder alone, beside nncodec (DeepCABAC), zstd -19 of the packed bits and the order-0 entropy; megabytes
of float32 that stand for them, a second of processor time.

    python benchmarks/codec.py [--archived out/deep_compression/resnet20_0.04.fw ...]

The tensors are trained-like: normal weights whose scales differ by output channel (log-normal, 0.3), pruned or not by
magnitude times a log-normal factor of rows and columns (0.7), as indices of codebooks. --archived: the codebook indices
of these networks instead. All coders get the same indices: zstd packed; nncodec as integers around the most frequent
one, negative values negative, the shortest of the ways to say so. Rows: results/codec.json.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rows import Rows

import featherweight as fw
from featherweight.codec import entropy, rows
from featherweight.codec.blocks import BLOCK
from featherweight.numerics import packing

#: name -> (rows, columns, bits, share of weights kept)
ARMS = {"3x3x256 to 256, 4 bits": (256, 2304, 4, 1.0), "3x3x256 to 256, 4 bits, 30 % kept": (256, 2304, 4, 0.3),
        "4096 to 4096, 5 bits, 4 % kept": (4096, 4096, 5, 0.04), "784 to 300, 3 bits, 3 % kept": (300, 784, 3, 0.03)}


def indices(o: int, i: int, bits: int, share: float) -> NDArray[np.uint8]:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(o, i)) * np.exp(0.3 * generator.normal(size=(o, 1)))
    factor = np.exp(0.7 * generator.normal(size=(o, 1)) + 0.7 * generator.normal(size=(1, i)))
    kept = np.ones(weight.shape, bool)
    if share < 1:
        importance = np.abs(weight) * factor
        kept = importance >= np.quantile(importance, 1 - share)
    levels = 2 ** bits - 1
    entries = np.linspace(-3, 3, levels) * weight[kept].std()
    index = np.searchsorted((entries[1:] + entries[:-1]) / 2, weight) + 1
    return np.where(kept, index, 0).astype(np.uint8)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    found, seconds = None, []
    for _ in range(3):
        began = time.process_time()
        found = work()
        seconds.append(time.process_time() - began)
    return found, min(seconds)


def zstd(data: bytes) -> int | None:
    """Bytes of zstd -19; None where the package is not there."""
    try:
        return len(importlib.import_module("zstandard").ZstdCompressor(level=19).compress(data))
    except ImportError:
        return None


def signed(symbols: NDArray[np.uint8]) -> list[NDArray[np.int32]]:
    """Symbols as integers around 0: around the most frequent one, or where that is 0 with so many below it."""
    z, wide = int(np.bincount(symbols.reshape(-1)).argmax()), symbols.astype(np.int32)
    if z:
        return [wide - z]
    half = int(symbols.max()) // 2
    return [np.where(wide == 0, 0, wide - below - (wide <= below)).astype(np.int32)
            for below in range(half - 1, half + 3)]


def nncodec(symbols: NDArray[np.uint8]) -> tuple[int, float] | tuple[None, None]:
    """Bytes and megabytes a second of nncodec's arithmetic coder; None where the package is not there."""
    try:
        cabac = importlib.import_module("nncodec.extensions.deepCABAC")
        off = importlib.import_module("nncodec.nnc_core.hdsp.hdsp_tool").HDSP_OPTS_OFF()
    except ImportError:
        return None, None

    def coded(numbers: NDArray[np.int32]) -> int:
        encoder = cabac.Encoder()
        encoder.initCtxModels(11, 1)
        encoder.encodeLayer(numbers, 0, 0, 0, 0, 0, np.zeros(len(numbers), np.int32), *off, 0, 0)
        return len(encoder.finish().tobytes())

    least, seconds = min(timed(lambda n=n: coded(n)) for n in map(np.ascontiguousarray, signed(symbols)))
    return least, 4e-6 * symbols.size / seconds


def ideal(piece: NDArray[np.uint8], columns: int) -> float:
    """Bytes that the contexts' own histograms promise, those not counted that say them."""
    matrix = piece.reshape(-1, columns)
    found = rows.chosen(matrix)
    joint = np.zeros((found.count, 256))
    for phase in found.phases():
        pairs = found.of(matrix, phase).astype(np.intp) << 8 | matrix[:, phase::max(found.group, 1)]
        joint += np.bincount(pairs.reshape(-1), minlength=joint.size).reshape(joint.shape)
    chances = joint / np.maximum(joint.sum(1, keepdims=True), 1)
    return float(-(joint * np.log2(np.where(joint > 0, chances, 1))).sum()) / 8


def measure(matrix: NDArray[np.uint8], bits: int) -> dict[str, Any]:
    symbols, i = matrix.reshape(-1), matrix.shape[1]
    step = BLOCK - BLOCK % i
    pieces = [symbols[at:at + step] for at in range(0, symbols.size, step)]
    blocks, encoding = timed(lambda: [rows.encode(piece, i) for piece in pieces])
    found, decoding = timed(lambda: [rows.decode(b, p.size) for b, p in zip(blocks, pieces, strict=True)])
    assert all(np.array_equal(a, b) for a, b in zip(found, pieces, strict=True))
    megabytes = 4e-6 * symbols.size
    cabac, speed = nncodec(matrix)
    return {"bytes": sum(map(len, blocks)), "ideal_bytes": sum(ideal(p, i) for p in pieces), "nncodec_bytes": cabac,
            "nncodec_encode_mb_s": speed, "forms": sorted({b[0] for b in blocks}),
            "order_0_bytes": round(entropy.entropy_bytes(symbols)),
            "zstd_19_bytes": zstd(packing.pack(symbols, bits).tobytes()),
            "float_mb": megabytes, "encode_mb_s": megabytes / encoding, "decode_mb_s": megabytes / decoding}


def archived(path: Path) -> dict[str, Any]:
    """All codebook indices of a network: the sums of their bytes, and the speed of them all."""
    tensors = {n: t for n, t in fw.load(path).tensors().items() if n.endswith("_index") and t.dim() > 1}
    parts = [measure(t.numpy().reshape(t.shape[0], -1), int(t.max()).bit_length()) for t in tensors.values()]
    total = {key: sum(p[key] or 0 for p in parts) for key in parts[0] if key.endswith("bytes") or key == "float_mb"}
    return total | {key: total["float_mb"] / sum(p["float_mb"] / p[key] for p in parts)
                    for key in ("encode_mb_s", "decode_mb_s")}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--archived", type=Path, nargs="+", default=[])
    given, found = reader.parse_args(), Rows("codec.json")
    work: dict[str, Callable[[], dict[str, Any]]] = {
        f"indices of {p.stem}": partial(archived, p) for p in given.archived}
    if not given.archived:
        work = {name: lambda arm=arm: measure(indices(*arm), arm[2]) for name, arm in ARMS.items()}
    for name, make in work.items():
        if name not in found:
            found.add(name, make())
            print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
