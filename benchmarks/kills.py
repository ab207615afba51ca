"""Jobs that are killed and go on: do they end with the network and the ``result.json`` of a job that was not killed?

    python benchmarks/kills.py [--step 1] [--moments 20]

Two arms. "every file operation, FAMILY": a job of that family of steps, deployed to a stand-in, is killed before and
after every file operation in its folder (an exception, after which no file operation works any more), one kill a job.
"random moments, onnxruntime": a job of pruning, training and int8 in ONNX Runtime runs in a process of its own, which
SIGKILL ends at moments drawn uniformly from the time that a whole job takes; after every kill the next process goes on
in a copy of the folder. A row says how many kills there were; anything that differs ends the script with an error.
Results go into benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from rows import Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import featherweight as fw
from killing import FAMILIES, check, without_times
from test_recipe import batches, squeeze, task, tiny

RECIPE = fw.Recipe([fw.prune.Channels(macs=0.7), fw.recover.Train(epochs=2, lr=0.05, checkpoint_every=0.0),
                    fw.quantize.Quantize()])


def job(network: fw.Network, out: Path) -> None:
    """One whole job in ONNX Runtime."""
    torch.set_num_threads(1)
    squeeze(network, task(test=lambda: batches(4)), RECIPE, out=out, target="onnxruntime", seconds=0.2)


def moments(count: int, folder: Path) -> dict[str, float]:
    """Kills a job at random moments; each kill is followed by a job that goes on to its end, and is compared."""
    network, context, draws = tiny(), multiprocessing.get_context("fork"), random.Random(0)

    def ended(out: Path, after: float | None = None) -> float:
        began = time.monotonic()
        process = context.Process(target=job, args=(network, out))
        process.start()
        process.join(after)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        elif process.exitcode:
            raise SystemExit(f"a job ended with {process.exitcode}")
        return time.monotonic() - began

    lasted = ended(folder / "whole")
    wanted, kills = outcome(folder / "whole"), 0
    while kills < count:
        out = folder / str(kills)
        if ended(out, moment := draws.uniform(0.0, lasted)) < moment:
            shutil.rmtree(out)  # it had come to its end before
            continue
        kills += 1
        ended(out)
        if outcome(out) != wanted:
            raise SystemExit(f"killed after {moment:.2f} s of {lasted:.2f} s, the job ends otherwise")
        shutil.rmtree(out)
        print(f"{kills} of {count}: killed after {moment:.1f} s", flush=True)
    return {"kills": kills, "whole_s": round(lasted, 1)}


def outcome(out: Path) -> tuple[bytes, bytes, object]:
    """What a job left: the network, the deployed file, and the figures without times."""
    return ((out / "network.fw").read_bytes(), (out / "model.onnx").read_bytes(),
            without_times(json.loads((out / "result.json").read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=1, help="kill at every so-manyth file operation")
    parser.add_argument("--moments", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("kills.json")
    for name, recipe in FAMILIES.items():
        if (arm := f"every file operation, {name}") not in rows:
            with tempfile.TemporaryDirectory() as folder:
                rows.add(arm, {"kills": check(recipe, Path(folder), options.step), "step": options.step})
            print(arm, rows[arm]["kills"], flush=True)
    if (arm := "random moments, onnxruntime") not in rows:
        with tempfile.TemporaryDirectory() as folder:
            rows.add(arm, moments(options.moments, Path(folder)))


if __name__ == "__main__":
    main()
