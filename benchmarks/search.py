"""``fw.search`` on CIFAR-10's ResNet-20 (91.73 %) and ResNet-56 (93.39 %), beside each family alone.

    python benchmarks/search.py --checkpoints FOLDER [--depth 20] [--minutes 30] [--epochs 12] [--threads 1] [ARM ...]

macs 1.2, macs 1.5, ...: no training, so many times fewer MACs, the score's drop minimized. fast, small: at most half a
point lost, the latency in the runtime or the archive minimized; "trained": with 12 epochs taught by the original,
of which every trial with a cut gets one; "openvino": in that runtime. fixed: the README's recipe with that training
and int8, beside them. --epochs trains fewer, at a rate lower by the square root of their share: what time there is for
where a processor emulates bfloat16 (ResNet-56: ten minutes an epoch on two cores).

Combinations are tried on 2,000 images of the training set. The checkpoints have seen all 50,000 in their training
(ResNet-20 is right on 99.8 % of them), and no further training leaves that, so none of them can say what a training
loses. "trained" arms are therefore tried on the first 5,000 of the test images, and scored on the other 5,000, which
choose nothing; all others are scored on all test images, once an arm. Arms of one runtime share their trials, which lie
in out/search. Every arm leaves a row in benchmarks/results/search.json: what was chosen, beside the best of each family
alone, and the front.
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
from low_bit_training import AUTOCAST
from rows import Rows

import featherweight as fw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

WORK = HERE.parent / "out/search"
FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
MORE = ("trained", "openvino", "trained openvino")
POINTS = 0.5
MACS = ("2.1", "1.5", "3", "1.2", "4")
#: arm -> (budget, what is minimized)
ARMS: dict[str, tuple[fw.Budget, str]] = {
    **{f"macs {fewer}": (fw.Budget(macs=1 / float(fewer)), "score_drop") for fewer in MACS},
    "fast": (fw.Budget(score_drop=POINTS), "latency"),
    "small": (fw.Budget(score_drop=POINTS), "archive_bytes"),
}
EPOCHS, RATE = 12, 0.05


def training(epochs: int = EPOCHS) -> fw.recover.Train:
    return fw.recover.Train(epochs=epochs, lr=RATE * (epochs / EPOCHS)**0.5, schedule="onecycle", autocast=AUTOCAST,
                            channels_last=True, weight_decay=1e-4,
                            beside=(fw.distill.Logits(temperature=4.0, weight=0.9),))


def fixed_order(train: fw.recover.Train) -> fw.Recipe:
    """The recipe of the README with a training."""
    return fw.Recipe([fw.prune.Channels(macs=0.5, score="reconstruction", allocation="sensitivity",
                                        compensate="least_squares"), train, fw.quantize.Quantize()])


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


def fixed(result: fw.Result, seconds: float) -> dict[str, Any]:
    assert result.final is not None
    first, last = result.trail[0], result.trail[-1]
    return {"test": result.final.after.score, "test_before": result.final.before.score, "recipe": "the README's",
            "file_bytes": last.file_bytes, "archive_bytes": last.archive_bytes, "macs": last.macs,
            "file_bytes_before": first.file_bytes, "macs_before": first.macs,
            "faster": last.ratios["original"].median, "seconds": seconds}


def halved(task: fw.Task) -> fw.Task:
    """The task with one half of the test images to choose by, and the other to be scored on."""
    half = sum(1 for _ in task.batches("test")) // 2
    return dataclasses.replace(task, validation=lambda: itertools.islice(task.batches("test"), half),
                               test=lambda: itertools.islice(task.batches("test"), half, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"{', '.join(ARMS)}, fixed; and words behind them")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--depth", type=int, choices=list(FILES), default=20)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=1, help="of torch; what is deployed is timed on one")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train = training(given.epochs)
    rows = Rows("search.json")
    task = cifar10.task(calibration_images=512)
    few = dataclasses.replace(task, validation=lambda: itertools.islice(task.batches("validation"), 4))
    seen = halved(task)
    network = cifar10.network(given.depth, str(given.checkpoints / FILES[given.depth]))
    for arm in given.arms or [*ARMS, *(f"{name} {more}" for name in ("fast", "small") for more in MORE)]:
        name = next(known for known in (*ARMS, "fixed") if arm.startswith(known))
        words = arm.removeprefix(name).split()
        runtime = "openvino" if "openvino" in words else "onnxruntime"
        trained = name == "fixed" or "trained" in words
        fewer = f", {given.epochs} epochs" * (trained and given.epochs != EPOCHS)
        out = WORK / f"{given.depth} {runtime}{' trained' * trained}{fewer}".removeprefix("20 ")
        began = time.perf_counter()
        if name == "fixed":
            result = fw.compress(network, seen, fixed_order(train), runtime, out.with_name(f"{out.name} fixed"),
                                 seconds=0.5)
            found = fixed(result, time.perf_counter() - began)
        else:
            budget, minimize = ARMS[name]
            answer = fw.search(network, seen if trained else few, budget, runtime, out, minimize=minimize, trials=200,
                               minutes=given.minutes, seconds=0.5, recover=train if trained else None)
            found = row(answer, time.perf_counter() - began)
            print(answer, flush=True)
        rows.add(f"ResNet-{given.depth}, {arm}{fewer}", found)
        print(arm, found["test"], found["faster"], flush=True)


if __name__ == "__main__":
    main()
