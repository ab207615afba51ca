"""LSTMs of 8 bits in ONNX Runtime, on integers or read back to float at load, beside float and the runtime's tool.

    python benchmarks/recurrent_layers.py

Medians of rounds in turns in one process, one thread; random weights, 20 steps; ``apart``: ||outputs - float|| over
||float||. The runtime's tool leaves matrices alone that are laid together at load (64 wide and more). Results go into
benchmarks/results/recurrent_layers.json.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from onnxruntime.quantization import quantize_dynamic
from rows import Rows
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy
from featherweight.deploy.onnx import weights
from featherweight.measure import interleave

WIDTHS = (16, 32, 64, 128, 256, 512)
COUNTS = (1, 8)
STEPS = 20
SECONDS = 1.0


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)[0]
        return result


def main() -> None:
    rows, runtime = Rows("recurrent_layers.json"), deploy.target("onnxruntime")
    for width in WIDTHS:
        torch.manual_seed(0)
        base = fw.capture(Layer(width).eval(), torch.randn(2, STEPS, width), dynamic={})
        small = fw.quantize.Quantize(activations=None).plan(base, fw.Task()).apply(base)
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, f"{i}.onnx") for i, name in enumerate(
                ("float", "integers", "read back", "the runtime's tool"))}
            runtime.export(base, files["float"])
            runtime.export(small, files["integers"])
            with mock.patch.object(weights, "on_integers", return_value=False):
                runtime.export(small, files["read back"])
            quantize_dynamic(files["float"], files["the runtime's tool"])
            runners = {name: runtime.load(file, threads=1, like=base.signature) for name, file in files.items()}
            for count in COUNTS:
                x = torch.randn(count, STEPS, width)
                whole = runners["float"](x)
                timed = interleave({n: partial(r, x) for n, r in runners.items()}, seconds=SECONDS, threads=1,
                                   batch=count, runtime=runtime.name)
                found = {n: {"median_ms": 1e3 * t.median_s, "q1_ms": 1e3 * t.q1_s, "q3_ms": 1e3 * t.q3_s,
                             "bytes": files[n].stat().st_size,
                             "apart": float((runners[n](x) - whole).norm() / whole.norm())} for n, t in timed.items()}
                rows.add(f"{width} wide, {count} samples", {**found, "rounds": timed["float"].rounds})
                print(width, count, {n: (round(f["median_ms"], 3), f["bytes"], round(f["apart"], 4))
                                     for n, f in found.items()}, flush=True)


if __name__ == "__main__":
    main()
