"""Large graphs and large weights through capture, groups, figures, int8, save, load, export and pack.

    python benchmarks/scale.py [graph 2000] [graph 20000] [export 2000] [export 20000] [weight 25000]

Arms: "graph, N nodes", a chain of residual blocks of linear calls 16 wide, whose exported graph has N calls; "export, N
nodes", the same to ONNX, float and int8; "weight, N x N", one linear layer without a bias (25,000: 2.5 GB), all of it.
Each arm is a process. A row has the seconds of every part (by the clock, and of the processor: others may have had it),
the peak of the resident memory in it (Linux's VmHWM, reset before) above what was resident before, in GB, and the bytes
of each file. Results go into benchmarks/results/scale.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import Tensor, nn

import featherweight as fw
from featherweight.axes.groups import axis_groups

ARMS = (("graph", 2000), ("graph", 20_000), ("export", 2000), ("export", 20_000), ("weight", 25_000))


class Chain(nn.Module):
    """x + linear(relu(x)), again and again: three calls a block."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.01 * block(torch.relu(x))
        return x


def made(kind: str, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind != "weight":
        return Chain(size // 4).eval(), torch.randn(2, 16)
    layer = nn.utils.skip_init(nn.Linear, size, size, bias=False)
    with torch.no_grad():
        layer.weight.uniform_(-0.01, 0.01)
    return layer.eval(), torch.randn(2, size)


class Parts:
    """Seconds and memory of one part after the other."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}

    def take(self, name: str, call: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
        before, began, worked = status("VmRSS"), time.perf_counter(), time.process_time()
        found = call()
        self.row[name] = {"seconds": round(time.perf_counter() - began, 2),
                          "processor_s": round(time.process_time() - worked, 2),
                          "peak_gb": round((status("VmHWM") - before) / 1e6, 3)}
        print(name, self.row[name], flush=True)
        return found


    def done(self, folder: Path) -> dict[str, Any]:
        """All of it, and the bytes of the files in the folder."""
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        total = {key: round(sum(part[key] for part in self.row.values()), 1) for key in ("seconds", "processor_s")}
        return {"parts": self.row, **total, "bytes": sizes}


def status(key: str) -> int:
    """Kilobytes, as the system says them."""
    rows = (row.split() for row in Path("/proc/self/status").read_text().splitlines())
    return next(int(row[1]) for row in rows if row[0] == f"{key}:")


def through(kind: str, size: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    parts = Parts()
    model, x = made(kind, size)
    network = parts.take("capture", partial(fw.capture, model, x))
    del model
    runtime, task = fw.deploy.target("onnxruntime"), fw.Task(calibration=[(x, None)] * 2)
    if kind == "export":
        parts.take("export", partial(runtime.export, network, folder / "float.onnx"))
        small = fw.quantize.Quantize().plan(network, task).apply(network)
        parts.take("int8 export", partial(runtime.export, small, folder / "int8.onnx"))
        return parts.done(folder)
    parts.take("groups", lambda: axis_groups(network))
    parts.take("layers", lambda: fw.measure.layers(network))
    parts.take("macs", lambda: fw.measure.macs(network))
    plan = parts.take("int8 plan", lambda: fw.quantize.Quantize().plan(network, task))
    small = parts.take("int8 apply", lambda: plan.apply(network))
    for name, each in (("float", network), ("int8", small)):
        parts.take(f"{name} save", lambda each=each, name=name: each.save(folder / f"{name}.fw"))
        parts.take(f"{name} load", lambda name=name: fw.load(folder / f"{name}.fw"))
        parts.take(f"{name} pack", lambda name=name: fw.codec.pack(folder / f"{name}.fw", folder / f"{name}.fwz"))
    if kind == "weight":
        for name, each in (("float", network), ("int8", small)):
            parts.take(f"{name} export", lambda each=each, name=name: runtime.export(each, folder / f"{name}.onnx"))
    return parts.done(folder)


def main() -> None:
    rows, chosen = Rows("scale.json"), sys.argv[1:]
    if chosen[:1] == ["--arm"]:
        kind, size = chosen[1], int(chosen[2])
        with tempfile.TemporaryDirectory() as folder:
            rows.add(name_of(kind, size), through(kind, size, Path(folder)))
        return
    pairs = [(kind, int(size)) for kind, size in zip(chosen[::2], chosen[1::2], strict=True)]
    for kind, size in pairs or ARMS:
        if name_of(kind, size) not in rows:
            subprocess.run([sys.executable, __file__, "--arm", kind, str(size)], check=True)


def name_of(kind: str, size: int) -> str:
    return f"weight, {size} x {size}" if kind == "weight" else f"{kind}, {size} nodes"


if __name__ == "__main__":
    main()
