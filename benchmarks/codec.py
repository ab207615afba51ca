"""The archive's coder alone, beside zstd -19 of the packed bits and the order-0 entropy; megabytes of float32
that stand for them, a second of processor time.

    python benchmarks/codec.py

The tensors are trained-like: normal weights whose scales differ by output channel (log-normal, 0.3), pruned or not by
magnitude times a log-normal factor of rows and columns (0.7), as indices of codebooks. What zstd gets are the same
indices, packed. Rows: results/codec.json.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rows import Rows

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


def measure(o: int, i: int, bits: int, share: float) -> dict[str, Any]:
    symbols = indices(o, i, bits, share).reshape(-1)
    step = BLOCK - BLOCK % i
    pieces = [symbols[at:at + step] for at in range(0, symbols.size, step)]
    blocks, encoding = timed(lambda: [rows.encode(piece, i) for piece in pieces])
    found, decoding = timed(lambda: [rows.decode(b, p.size) for b, p in zip(blocks, pieces, strict=True)])
    assert all(np.array_equal(a, b) for a, b in zip(found, pieces, strict=True))
    megabytes = 4e-6 * symbols.size
    return {"bytes": sum(map(len, blocks)), "forms": sorted({b[0] for b in blocks}),
            "order_0_bytes": round(entropy.entropy_bytes(symbols)),
            "zstd_19_bytes": zstd(packing.pack(symbols, bits).tobytes()),
            "float_mb": megabytes, "encode_mb_s": megabytes / encoding, "decode_mb_s": megabytes / decoding}


def main() -> None:
    found = Rows("codec.json")
    for name, arm in ARMS.items():
        if name not in found:
            found.add(name, measure(*arm))
            print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
