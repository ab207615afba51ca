"""Equal files timed while another process has the processor: does any verdict call one of them faster?

    python benchmarks/busy_machine.py [--tries 20]

Three copies of one deployed file, of a small network in ONNX Runtime, are timed as a job times its files, in the same
rounds for one second a file, beside an endless loop. A row has the verdicts that were given (each is wrong), the
medians of the ratios, and the share of the time that was spent waiting for a processor. Results go into
benchmarks/results/busy_machine.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from rows import Rows

import featherweight as fw

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_recipe import tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, runtime, x = tiny(), fw.deploy.target("onnxruntime"), torch.randn(1, 4)
    verdicts, medians, waits = [], [], []
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        try:
            for number in range(options.tries):
                files = [Path(folder, f"{number}_{i}.onnx") for i in range(3)]
                for file in files:
                    runtime.export(network, file)
                calls = {f.name: partial(runtime.load(f, like=network.signature), x) for f in files}
                timed = fw.measure.side_by_side(calls, seconds=3.0)
                first, *others = calls
                ratios = [timed.ratio(first, other) for other in others]
                verdicts += [ratio.verdict for ratio in ratios if ratio.verdict]
                medians += [round(ratio.median, 3) for ratio in ratios]
                waits.append(timed.latencies[first].waiting or 0.0)
                print(number, verdicts, medians[-2:], round(waits[-1], 2), flush=True)
        finally:
            loop.kill()
    Rows("busy_machine.json").add("equal files beside a loop", {
        "tries": options.tries, "verdicts": verdicts, "ratios": medians, "waiting": [round(w, 2) for w in waits],
        "load": round(os.getloadavg()[0], 1)})


if __name__ == "__main__":
    main()
