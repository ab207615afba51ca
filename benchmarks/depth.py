"""Depth against width: ResNet-56 on CIFAR-10 without a third of its blocks, beside channels cut to the same latency.

    python benchmarks/depth.py --checkpoints FOLDER [--epochs 6]

depth: the 9 blocks of 27 that the calibration data miss least, one after the other, are dropped. channels: cut inside
the blocks at widths that are multiples of 8 (and of 16), to the share of MACs, found by bisection, at which the file is
as fast in ONNX Runtime as the one without the blocks; both are timed in turns in one process. All are scored on the
test split with no retraining, with batch norm estimated again, and after the same training; the original is timed in
the same rounds.

Every row goes into benchmarks/results/depth.json as soon as it is measured; one that is there is not run again. To try
the command out: --epochs 1 --batches 3 --images 16 --split validation --rows FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from rows import Rows

import featherweight as fw
from featherweight import deploy
from featherweight.measure import interleave, macs, measure
from featherweight.steps import Context, Plan

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

FILE = "resnet56-4bfd9763.th"
BLOCKS = 9
WIDTHS = (8, 16)
TRIALS = 8  #: steps of the bisection
SEED = 0


def latencies(networks: Mapping[str, fw.Network], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds for one image on one thread of ONNX Runtime, all files in turns in this process."""
    runtime, sample = deploy.target("onnxruntime"), torch.zeros(1, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for i, (name, network) in enumerate(networks.items()):
            file = Path(folder, f"{i}{runtime.suffix}")
            runtime.export(network, file)
            calls[name] = partial(runtime.load(file, threads=1, like=network.signature), sample)
        timed = interleave(calls, seconds=seconds, threads=1, batch=1, runtime=runtime.name)
    return {name: {"median_ms": t.median_s * 1e3, "q1_ms": t.q1_s * 1e3, "q3_ms": t.q3_s * 1e3, "rounds": t.rounds}
            for name, t in timed.items()}


def channels_as_fast(base: fw.Network, other: fw.Network, task: fw.Task, given: argparse.Namespace,
                     width: int) -> tuple[Plan, list[dict[str, float]]]:
    """The channel plan at widths in multiples of ``width`` whose file comes nearest to the latency of ``other``.

    Lower quartiles are compared: what else runs on the machine moves them least."""
    low, high = 0.15, 1.0
    tried: dict[str, tuple[float, Plan]] = {}
    trials = []
    for _ in range(TRIALS):
        share = (low + high) / 2
        plan = fw.prune.Channels(macs=share, score=given.score, residual=False, round_to=width).plan(base, task)
        small, name = plan.apply(base), plan.summary()
        if name not in tried:  # widths move in steps: near shares give one plan
            timed = latencies({"channels": small, "depth": other}, given.seconds / 2)
            tried[name] = timed["channels"]["q1_ms"] / timed["depth"]["q1_ms"], plan
            trials.append({"asked": share, "macs": macs(small).total / macs(base).total,
                           "latency_to_depth": tried[name][0]})
            print(f"  widths in {width}s, macs {share:.3f}: {tried[name][0]:.3f} of the latency", flush=True)
        low, high = (low, share) if tried[name][0] > 1 else (share, high)
    return min(tried.values(), key=lambda t: abs(t[0] - 1))[1], trials


def planned(rows: Rows, name: str, make: Callable[[], tuple[Plan, object]]) -> Plan:
    """The plan in row ``name``, made now if there is none."""
    if name not in rows:
        plan, how = make()
        bare = dataclasses.replace(plan, skipped=())
        rows.add(name, {"plan": bare.to_json(), "summary": plan.summary(), "how": how, "seed": SEED})
        print(f"{name}: {plan.summary()}", flush=True)
    return Plan.from_json(rows[name]["plan"])


def scored(rows: Rows, name: str, network: Callable[[], fw.Network], task: fw.Task, split: str) -> None:
    if name in rows:
        return
    found = measure(network(), task, split=split, step=name, seconds=0.2)
    row = found.to_dict()
    threads, versions = row["latency"]["threads"], dict(row["latency"]["versions"])
    del row["latency"]  # the latencies to compare are those of the same rounds
    rows.add(name, {**row, "seed": SEED, "runtime_threads": threads, "versions": versions})
    print(f"{name:44s} {row['score']:6.2f} %  {row['macs'] / 1e6:7.2f} M MACs  {row['file_bytes']:8d} B", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help=f"folder with {FILE}")
    parser.add_argument("--epochs", type=int, default=6, help="of the training after the cut; 0 trains nothing")
    parser.add_argument("--batches", type=int, help="at most this many batches of each epoch")
    parser.add_argument("--images", type=int, default=1024, help="for calibration; the choice of blocks reads 256")
    parser.add_argument("--score", default="l1", help="of the channels")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the last timing")
    parser.add_argument("--split", default="test", help="split that is scored")
    parser.add_argument("--rows", default="depth.json", help="result file")
    parser.add_argument("--state", type=Path, help="folder for checkpoints of the trainings, to go on after a kill")
    given = parser.parse_args()
    task, rows = cifar10.task(calibration_images=given.images), Rows(given.rows)
    base = cifar10.network(56, str(given.checkpoints / FILE))
    context = Context(original=base, seed=SEED)

    def depth() -> tuple[Plan, object]:
        step = fw.prune.Layers(count=BLOCKS, score="output", greedy=True, kinds=("residual", "shortcut"), batches=2)
        return step.plan(base, task), f"score=output, greedy, {min(256, given.images)} calibration images"

    networks = {"original": base, "depth": planned(rows, "plan: depth", depth).apply(base)}
    for width in WIDTHS:
        plan = planned(rows, f"plan: channels in {width}s",
                       lambda w=width: channels_as_fast(base, networks["depth"], task, given, w))
        networks[f"channels in {width}s"] = plan.apply(base)
    if "same rounds" not in rows:
        rows.add("same rounds", {"latency": latencies(networks, given.seconds), "runtime": "onnxruntime", "seed": SEED,
                                 "runtime_threads": 1, "batch": 1})
    scored(rows, "original", lambda: base, task, given.split)
    for name, network in networks.items():
        if name != "original":
            scored(rows, f"{name}, no retraining", lambda n=network: n, task, given.split)
            scored(rows, f"{name}, batch norm again", lambda n=network: fw.recover.BatchNorm().fit(n, task, context),
                   task, given.split)
    train = fw.recover.Train(epochs=given.epochs, lr=0.02, schedule="onecycle", autocast="bf16", channels_last=True,
                             batches=given.batches, seed=SEED)
    for name, network in networks.items() if given.epochs else ():
        place = given.state / name.replace(" ", "_") if given.state else None
        scored(rows, f"{name}, {given.epochs} epochs",
               lambda n=network, p=place: train.fit(n, task, dataclasses.replace(context, workdir=p)), task,
               given.split)


if __name__ == "__main__":
    main()
