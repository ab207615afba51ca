"""Two equal files timed while other processes have the processor: does any verdict call one of them faster?

    python benchmarks/busy_machine.py [--tries 20]

A job's two steps that change nothing (weights times 1, a bias plus 0) leave three equal files, deployed to ONNX Runtime
and timed as every job is, in the same rounds, beside as many endless loops as there are processors. A row has the
verdicts that were given (each is wrong), the ratios of medians, and the share of the time that was spent waiting for a
processor. Results go into benchmarks/results/busy_machine.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from rows import Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_recipe import Nudge, Scale, squeeze, task, tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("busy_machine.json")
    network, verdicts, medians, waits = tiny(), [], [], []
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        for _ in range(options.tries):
            trail = squeeze(network, task(score=None), [Scale(by=1.0), Nudge(by=0.0)], target="onnxruntime",
                            seconds=1.0).trail
            ratios = [ratio for row in trail for ratio in row.ratios.values()]
            verdicts += [ratio.verdict for ratio in ratios if ratio.verdict]
            medians += [round(ratio.median, 3) for ratio in ratios]
            waits.append(trail[-1].latency.waiting)
            print(verdicts, medians[-3:], waits[-1], flush=True)
    finally:
        for loop in loops:
            loop.kill()
    rows.add("equal files beside a loop a processor", {"tries": options.tries, "verdicts": verdicts, "ratios": medians,
                                                       "waiting": [round(w, 2) for w in waits if w is not None]})


if __name__ == "__main__":
    main()
