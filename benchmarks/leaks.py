"""Does a process that compresses again and again grow? Resident memory and objects over 200 calls.

    python benchmarks/leaks.py [--calls 200]

Arms: "stand-in" and "onnxruntime", each call of which captures a small network and compresses it (pruning, int8) for
that target; "onnxruntime alone", which makes sessions of the deployed files, as many a call, runs and frees them, and
shows what is the runtime's own. Every arm is a process. After 20 calls for the caches to fill, memory is read every 20
calls, collected and trimmed (glibc's ``malloc_trim``). A row has resident megabytes and Python's objects at each
reading, and the slope by least squares in kB a call. Results go into benchmarks/results/leaks.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rows import Rows

import featherweight as fw

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_recipe import Scale, squeeze, task, tiny

ARMS = ("stand-in", "onnxruntime", "onnxruntime alone")
EVERY = 20
RECIPES = {"here": fw.Recipe([Scale(), fw.prune.Weights(sparsity=0.5)]),
           "onnxruntime": fw.Recipe([fw.prune.Channels(macs=0.7), fw.quantize.Quantize()])}


def compressing(target: str, folder: Path) -> Callable[[], object]:
    return lambda: squeeze(tiny(), task(), RECIPES[target], target=target, seconds=0.0)


def sessions(folder: Path) -> Callable[[], object]:
    """What one call asks of ONNX Runtime alone: a session to score and compare each of three files, and one to time."""
    network, runtime = tiny(), fw.deploy.target("onnxruntime")
    runtime.export(network, folder / "model.onnx")
    x = torch.randn(16, 4)

    def call() -> None:
        for _ in range(6):
            runner = runtime.load(folder / "model.onnx", like=network.signature)
            for _ in range(30):
                runner(x)
            runner.close()

    return call


def resident() -> float:
    """Megabytes in memory, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 1e6, 2)


def measured(arm: str, calls: int, folder: Path) -> dict[str, object]:
    torch.set_num_threads(1)
    call = sessions(folder) if arm.endswith("alone") else compressing("here" if arm == "stand-in" else arm, folder)
    for _ in range(EVERY):
        call()
    at, memory, objects = [0], [resident()], [len(gc.get_objects())]
    for number in range(1, calls + 1):
        call()
        if number % EVERY == 0:
            at, memory, objects = [*at, number], [*memory, resident()], [*objects, len(gc.get_objects())]
            print(arm, number, memory[-1], objects[-1], flush=True)
    half = len(at) // 2
    return {"calls": calls, "resident_mb": memory, "objects": objects,
            "kb_per_call": round(1000 * float(np.polyfit(at, memory, 1)[0]), 1),
            "kb_per_call_second_half": round(1000 * float(np.polyfit(at[half:], memory[half:], 1)[0]), 1),
            "objects_per_call": round(float(np.polyfit(at, objects, 1)[0]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    rows = Rows("leaks.json")
    for arm in [options.arm] if options.arm else ARMS:
        if arm in rows:
            continue
        if options.arm is None:  # each in a process of its own
            subprocess.run([sys.executable, __file__, "--calls", str(options.calls), "--arm", arm], check=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.add(arm, measured(arm, options.calls, Path(folder)))


if __name__ == "__main__":
    main()
