"""``fw.search`` on CIFAR-10's ResNet-20 (91.73 %), beside each family alone.

    python benchmarks/search.py --checkpoints FOLDER [--minutes 30] [ARM ...]

macs 1.2, macs 1.5, ...: no training, so many times fewer MACs, the score's drop minimized. fast, small: at most half a
    point lost, the latency in the runtime or the archive minimized; "openvino" after it for that runtime.

Combinations are tried on 2,000 images kept from the training set, which the checkpoint has seen in its training; the
test images are scored once an arm. Arms of one runtime share their trials, which lie in out/search. Every arm leaves a
row in benchmarks/results/search.json: what was chosen, beside the best of each family alone, and the front.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rows import Rows

import featherweight as fw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

WORK = HERE.parent / "out/search"
POINTS = 0.5
MACS = ("2.1", "1.5", "3", "1.2", "4")
#: arm -> (budget, what is minimized)
ARMS: dict[str, tuple[fw.Budget, str]] = {
    **{f"macs {fewer}": (fw.Budget(macs=1 / float(fewer)), "score_drop") for fewer in MACS},
    "fast": (fw.Budget(score_drop=POINTS), "latency"),
    "small": (fw.Budget(score_drop=POINTS), "archive_bytes"),
}


def row(found: fw.Found, seconds: float) -> dict[str, Any]:
    final, result = found.result.final, found.result
    assert final is not None
    first, last = result.trail[0], result.trail[-1]
    return {
        "test": final.after.score, "test_before": final.before.score, "validation_drop": found.chosen.drop,
        "recipe": found.chosen.what, "shares": dict(found.chosen.shares), "missed": dict(found.missed),
        "file_bytes": last.file_bytes, "archive_bytes": last.archive_bytes, "macs": last.macs,
        "file_bytes_before": first.file_bytes, "macs_before": first.macs,
        "faster": last.ratios["original"].median if last.ratios else 1.0, "trials": len(found.trials),
        "seconds": seconds, "alone": {name: trial.to_dict() for name, trial in found.alone.items()},
        "front": [trial.to_dict() for trial in found.front]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("search.json")
    task = cifar10.task(calibration_images=512)
    few = dataclasses.replace(task, validation=lambda: itertools.islice(task.batches("validation"), 4))
    network = cifar10.network(20, str(given.checkpoints / "resnet20-12fca82f.th"))
    for arm in given.arms or [*ARMS, *(f"{name} openvino" for name in ("fast", "small"))]:
        name, _, _target = arm.partition(" openvino")
        runtime = "openvino" if arm.endswith(" openvino") else "onnxruntime"
        budget, minimize = ARMS[name]
        began = time.perf_counter()
        found = fw.search(network, few, budget, runtime, WORK / runtime, minimize=minimize, minutes=given.minutes,
                          trials=200, seconds=0.5)
        rows.add(f"ResNet-20, {arm}", row(found, time.perf_counter() - began))
        print(arm, found, sep="\n", flush=True)


if __name__ == "__main__":
    main()
