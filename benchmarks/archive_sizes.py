"""Archives of AlexNet's and VGG-16's size: bytes, seconds of processor time and peak memory of packing and unpacking.

    python benchmarks/archive_sizes.py

The weights are trained-like, not trained: normal, their scales differing by output channel (log-normal, 0.3), pruned by
magnitude times a log-normal factor of rows and columns (0.7) to the densities that Han et al. 2016 (Deep Compression,
tables 4 and 5) give for each layer, and stored as indices of codebooks of 2^8 (convolutions) and 2^5 entries (dense
layers), one byte a weight; codebooks and biases in float32. Packing and unpacking run in processes of their own, whose
peak of resident memory beyond what imports took is given (Linux's VmHWM).
Rows: results/archive_sizes.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from codec import indices
from rows import Rows
from safetensors.numpy import save_file

#: network -> layer -> (outputs, inputs of one, share of weights kept)
NETWORKS = {
    "AlexNet": {"conv1": (96, 363, 0.84), "conv2": (256, 1200, 0.38), "conv3": (384, 2304, 0.35),
                "conv4": (384, 1728, 0.37), "conv5": (256, 1728, 0.37), "fc6": (4096, 9216, 0.09),
                "fc7": (4096, 4096, 0.09), "fc8": (1000, 4096, 0.25)},
    "VGG-16": {"conv1_1": (64, 27, 0.58), "conv1_2": (64, 576, 0.22), "conv2_1": (128, 576, 0.34),
               "conv2_2": (128, 1152, 0.36), "conv3_1": (256, 1152, 0.53), "conv3_2": (256, 2304, 0.24),
               "conv3_3": (256, 2304, 0.42), "conv4_1": (512, 2304, 0.32), "conv4_2": (512, 4608, 0.27),
               "conv4_3": (512, 4608, 0.34), "conv5_1": (512, 4608, 0.35), "conv5_2": (512, 4608, 0.29),
               "conv5_3": (512, 4608, 0.36), "fc6": (4096, 25088, 0.04), "fc7": (4096, 4096, 0.04),
               "fc8": (1000, 4096, 0.23)}}
PUBLISHED = {"AlexNet": 6.9e6, "VGG-16": 11.3e6}  #: bytes: Han et al. 2016, table 1
CHILD = """
import json, re, sys, time
from featherweight.codec import archive
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
began = time.process_time()
if len(sys.argv) > 1:
    getattr(archive, sys.argv[1])(*sys.argv[2:])
print(json.dumps({"seconds": time.process_time() - began, "peak_bytes": peak() - before}))
"""


def tensors(layers: dict[str, tuple[int, int, float]]) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, (o, i, share) in layers.items():
        bits = 8 if name.startswith("conv") else 5
        found[f"{name}_index"] = indices(o, i, bits, share)
        generator = np.random.default_rng(1)
        found[f"{name}_codebook"] = np.sort(generator.normal(size=2 ** bits - 1)).astype(np.float32)
        found[f"{name}_bias"] = generator.normal(size=o).astype(np.float32)
    return found


def child(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def measure(name: str) -> dict[str, Any]:
    weights = sum(o * i for o, i, _ in NETWORKS[name].values())
    with tempfile.TemporaryDirectory() as folder:
        plain, packed, again = (str(Path(folder, n)) for n in ("a.safetensors", "a.fwz", "b.safetensors"))
        save_file(tensors(NETWORKS[name]), plain)
        packing, unpacking = child("pack", plain, packed), child("unpack", packed, again)
        assert Path(plain).read_bytes() == Path(again).read_bytes()
        size, decoded = Path(packed).stat().st_size, Path(plain).stat().st_size
    return {"weights": weights, "float_bytes": 4 * weights, "decoded_bytes": decoded, "bytes": size,
            "published_bytes": PUBLISHED[name], "ratio": 4 * weights / size,
            **{f"{verb}_{key}": value for verb, found in (("pack", packing), ("unpack", unpacking))
               for key, value in found.items()},
            "pack_peak_of_decoded": packing["peak_bytes"] / decoded,
            "unpack_peak_of_decoded": unpacking["peak_bytes"] / decoded}


def main() -> None:
    found = Rows("archive_sizes.json")
    for name in NETWORKS:
        if name not in found:
            found.add(name, measure(name))
            print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
