"""Linear calls on values rounded when the network runs, beside weights alone of 8 bits and float, in ONNX Runtime.

    python benchmarks/dynamic_values.py

Medians of rounds in turns in one process, one thread; random weights. Rows: how many samples a call reads. Results go
into benchmarks/results/dynamic_values.json.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from rows import Rows
from torch import nn

import featherweight as fw
from featherweight import deploy
from featherweight.measure import interleave
from featherweight.quantize import Quantize

SIZES = ((768, 3072), (3072, 768), (4096, 4096))
COUNTS = (1, 16, 128)
SECONDS = 1.5
FORMS = {"float": None, "weights alone": Quantize(activations=None), "dynamic": Quantize(activations="dynamic")}


def main() -> None:
    rows, runtime = Rows("dynamic_values.json"), deploy.target("onnxruntime")
    for inputs, outputs in SIZES:
        torch.manual_seed(0)
        base = fw.capture(nn.Linear(inputs, outputs).eval(), torch.zeros(2, inputs))
        with tempfile.TemporaryDirectory() as folder:
            runners = {}
            for name, step in FORMS.items():
                file = Path(folder, f"{name}.onnx")
                runtime.export(step.plan(base, fw.Task()).apply(base) if step else base, file)
                runners[name] = runtime.load(file, threads=1, like=base.signature)
            for count in COUNTS:
                sample = torch.randn(count, inputs)
                timed = interleave({n: partial(r, sample) for n, r in runners.items()}, seconds=SECONDS, threads=1,
                                   batch=count, runtime=runtime.name)
                found = {n: {"median_ms": 1e3 * t.median_s, "q1_ms": 1e3 * t.q1_s, "q3_ms": 1e3 * t.q3_s}
                         for n, t in timed.items()}
                rows.add(f"{inputs} to {outputs}, {count} rows", {**found, "rounds": timed["float"].rounds})
                print(inputs, outputs, count, {n: round(f["median_ms"], 3) for n, f in found.items()}, flush=True)


if __name__ == "__main__":
    main()
