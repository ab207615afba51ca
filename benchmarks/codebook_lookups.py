"""Codebooks in the deployed file: a lookup is a constant that the runtime folds when it loads, so it costs no time.

    python benchmarks/codebook_lookups.py FOLDER/resnet20-12fca82f.th

The trained ResNet-20 (He et al. 2016) as float and with codebooks of 5 bits in every layer, one input, one thread, in
the same rounds of each runtime. ``ratio``: the median over rounds of shared / float, with quartiles. Rows:
results/codebook_lookups.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows

import featherweight as fw

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/cifar10_resnet56"))


def measure(weights: str, runtime: str, per: str) -> dict[str, Any]:
    import cifar10

    whole = fw.network.fold_batch_norm(cifar10.network(20, weights))
    shared = fw.share.Codebook(bits=5, min_size=256, per=per).plan(whole, fw.Task()).apply(whole)  # type: ignore[arg-type]
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    target = fw.deploy.target(runtime)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}{target.suffix}") for name in ("float", "shared")}
        sizes = {name: target.export(net, files[name]) for name, net in (("float", whole), ("shared", shared))}
        runners = {name: target.load(file, like=whole.signature) for name, file in files.items()}
        timed = fw.measure.side_by_side({name: lambda r=r: r(x) for name, r in runners.items()}, rounds=300)
    ratios = np.array(timed.seconds["shared"]) / np.array(timed.seconds["float"])
    low, middle, high = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return {"runtime": runtime, "per": per, "ratio": middle, "quartiles": [low, high],
            "float_ms": 1e3 * timed.latencies["float"].median_s, "shared_ms": 1e3 * timed.latencies["shared"].median_s,
            "float_file_bytes": sizes["float"], "shared_file_bytes": sizes["shared"],
            "waiting": timed.latencies["shared"].waiting}


def main() -> None:
    found = Rows("codebook_lookups.json")
    torch.set_num_threads(1)
    for runtime in ("onnxruntime", "openvino"):
        for per in ("layer", "channel"):
            key = f"{runtime}, a codebook a {per}"
            if key not in found:
                found.add(key, measure(sys.argv[1], runtime, per))
                print(key, found[key], flush=True)


if __name__ == "__main__":
    main()
