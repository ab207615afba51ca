"""Twenty random budgets of ResNet-20 on CIFAR-10 that some combination is known to keep: does what ``fw.search`` ships?

    python benchmarks/search_budgets.py --checkpoints FOLDER

A first search without a training, the fastest with at most three points lost, tells what combinations cost. Each budget
limits the latency in ONNX Runtime, and by chance the file, the archive or the MACs, to up to a tenth above what one of
the combinations took of them, and the drop to what it lost and up to a point more. All searches share their trials,
which are scored on 2,000 training images; the test images are not read. Of each: whether the shipped file is inside all
limits, as measured on it, and the latency of its trial over that of the file as shipped. Beside that, of every
combination of two families or more, the latency that the surrogate told from the trials before it, over the measured
one. Rows go into benchmarks/results/search_budgets.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows
from search import FILES, WORK, cifar10

import featherweight as fw
from featherweight.balance.combine.axes import AXES, Space, told
from featherweight.balance.combine.surrogate import fit
from featherweight.balance.combine.trials import Trial

BUDGETS, SLACK, FAR = 20, 0.1, 3.0
OTHERS = ("file_bytes", "archive_bytes", "macs")


def predictions(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Combination -> the share of the latency told from what was tried before it, over the measured one."""
    named = {told(space.chosen(picks)): picks for picks in space.all()}
    done = [(named[trial.what], trial.shares["latency"]) for trial in trials if not trial.failed]
    found = {}
    for index, (picks, measured) in enumerate(done):
        if sum(map(bool, picks)) > 1:
            places, shares = zip(*done[:index], strict=True)
            guess = fit(space.positions(places), np.log(shares)).at(space.positions([picks]))
            found[told(space.chosen(picks))] = float(np.exp(guess[0])) / measured
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = cifar10.task(calibration_images=512)
    task = dataclasses.replace(task, test=None,
                               validation=lambda inner=task: itertools.islice(inner.batches("validation"), 4))
    network = cifar10.network(20, str(given.checkpoints / FILES[20]))

    def sought(**limits: Any) -> fw.Found:
        return fw.search(network, task, fw.Budget(**limits), out=WORK / "budgets", trials=40, seconds=0.5,
                         minimize="score_drop" if "latency" in limits else "latency")

    rows, chance, began = Rows("search_budgets.json"), np.random.default_rng(0), time.perf_counter()
    first = sought(score_drop=FAR)
    told_by = predictions(Space.of(network, {"latency"}, tuple(AXES)), first.trials)
    able = [trial for trial in first.trials if not trial.failed and trial.what != "nothing" and trial.drop <= FAR]
    kept, shipped = [], []
    for number in range(BUDGETS):
        trial = able[chance.integers(len(able))]
        names = ["latency", *(name for name in OTHERS if chance.random() < 0.3)]
        limits = {name: min(trial.shares[name] * (1 + SLACK * chance.random()), 1.0) for name in names}
        found = sought(**limits, score_drop=max(trial.drop, 0.0) + chance.random())
        kept.append(not found.missed)
        tried = [json.loads(file.read_text())["value"] for file in (WORK / "budgets/search").glob("?" * 16 + ".json")]
        before = next(known["shares"]["latency"] for known in tried if known["what"] == found.chosen.what)
        shipped.append(before / found.chosen.shares["latency"])
        print(number, trial.what, limits, found.chosen.what, dict(found.chosen.shares), dict(found.missed), shipped[-1],
              flush=True)
    rows.add("ResNet-20", {"budgets": BUDGETS, "kept": sum(kept), "seconds": time.perf_counter() - began,
                           "able": len(able), "trial_over_shipped": shipped, "told_over_measured": told_by})
    print(rows["ResNet-20"])


if __name__ == "__main__":
    main()
