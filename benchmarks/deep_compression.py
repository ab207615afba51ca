"""Deep Compression's two MNIST networks, as small as they go: bytes of the archive, graph included, against error.

    python benchmarks/deep_compression.py lenet_300_100 lenet_5 --seeds 0 1 2
    python benchmarks/deep_compression.py --resnets FOLDER --depths 20 56
    python benchmarks/deep_compression.py --resnets FOLDER --trained "resnet20, 22 % kept" --seeds 0

Each LeNet is trained, pruned in a training taught by itself, and given codebooks whose errors weights make up for (bits
and price chosen on images kept from training); then its vectors are rounded. The ResNets get codebooks and no training;
or, --trained, masks and then codebooks in trainings taught by the original's outputs and the ends of its stages, 15
epochs at most together, with settings that were fixed beforehand; or masks alone so, and then codebooks without one.
(The rows of 17 and 20 % kept are of earlier settings: taught at the ends of all blocks, a cosine schedule, masks that
grow until 0.6 of the training.)
The test split is read once, of the network that the archive gives back. Rows: results/deep_compression.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import Rows

import featherweight as fw

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out/deep_compression"
for example in ("deep_compression", "cifar10_resnet56"):
    sys.path.insert(0, str(ROOT / "examples" / example))


@dataclass(frozen=True)
class Arm:
    """How a LeNet is made small. sparsity: of its weights. epochs: of the first training, and under masks. allowed:
    points of validation score that the codebooks may cost. quick: bfloat16 where torch deems it safe, channels last."""

    sparsity: float
    epochs: tuple[int, int]
    lr: float = 0.05
    first_lr: float = 0.1
    allowed: float = 0.1
    quick: bool = False

    def layout(self) -> dict[str, Any]:
        return {"autocast": "bf16", "channels_last": True} if self.quick else {}


ARMS = {"lenet_300_100": Arm(0.968, (25, 30)), "lenet_300_100 smaller": Arm(0.982, (25, 30)),
        "lenet_5": Arm(0.985, (4, 8), quick=True), "lenet_5 smaller": Arm(0.993, (4, 8), quick=True),
        "lenet_5 longer": Arm(0.983, (9, 14), allowed=0.04, quick=True),
        "lenet_5 longest": Arm(0.981, (15, 30), allowed=0.02, quick=True),
        "lenet_5 longest, fewer kept": Arm(0.984, (15, 30), allowed=0.08, quick=True),
        "lenet_5 longest, fewer kept, nothing lost": Arm(0.984, (15, 30), allowed=0.0, quick=True)}


@dataclass(frozen=True)
class Trained:
    """How a trained ResNet is made small: epochs under masks that grow, epochs under codebooks of so many entries.
    entries None: codebooks of 3 bits after the masks, without training, whose errors weights make up for."""

    depth: int
    sparsity: float
    entries: int | None
    epochs: tuple[int, int] = (9, 6)


TRAINED = {"resnet20, 22 % kept": Trained(20, 0.78, 6, (4, 3)), "resnet20, 17 % kept": Trained(20, 0.83, 5),
           "resnet20, 17 % kept, made up for": Trained(20, 0.83, None, (9, 0)),
           "resnet20, 20 % kept, made up for": Trained(20, 0.8, None, (15, 0)),
           "resnet20, 14 % kept, made up for": Trained(20, 0.86, None, (15, 0)),
           "resnet56, 13 % kept": Trained(56, 0.87, 5, (4, 2)),
           "resnet56, 13 % kept, made up for": Trained(56, 0.87, None, (9, 0))}
RESNETS = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
CODEBOOKS = [(2, 0.01), (3, 0.1), (3, 0.03), (3, 0.003), (4, 0.003)]  #: bits and rates, from the fewest bytes on


def lenet(arm_name: str, seed: int, arm: Arm) -> dict[str, Any]:
    import mnist

    task, began, name = mnist.task(batch=256), time.perf_counter(), arm_name.partition(" ")[0]
    whole = kept(f"{name}_{seed}_{arm.epochs[0]}_whole", lambda: fw.recover.Train(
        epochs=arm.epochs[0], lr=arm.first_lr, schedule="onecycle", weight_decay=1e-4, decay_vectors=False,
        **arm.layout()).fit(mnist.network(name, seed), task, fw.steps.Context(seed=seed)))
    context, taught = fw.steps.Context(original=whole, seed=seed), fw.distill.Logits(temperature=2.0, weight=0.8)
    masks = fw.prune.Weights(sparsity=arm.sparsity, frequency=0.02, end=0.6)
    sparse = kept(f"{name}_{seed}_{arm.sparsity}_{arm.epochs}", lambda: fw.recover.Train(
        epochs=arm.epochs[1], lr=arm.lr, weight_decay=1e-5, beside=(taught, masks), **arm.layout(),
    ).fit(whole, task, context))
    tried = {}
    least = score(sparse, task, "validation") - arm.allowed - 1e-6
    for bits, rate in CODEBOOKS:
        step = fw.share.Codebook(bits=bits, rate=rate, compensate="obs", min_size=256)
        shared = step.plan(sparse, task).apply(sparse)
        small = fw.share.Vectors().plan(shared, task).apply(shared)
        tried[bits, rate] = score(small, task, "validation"), small
        print(arm_name, seed, bits, rate, tried[bits, rate][0], fw.codec.archive_bytes(small), flush=True)
        if tried[bits, rate][0] >= least:
            break
    (bits, rate), (_, small) = max(tried.items(), key=lambda item: item[1][0])
    return {"sparsity": arm.sparsity, "bits": bits, "rate": rate, "epochs": list(arm.epochs), "seed": seed,
            "sparse_validation": score(sparse, task, "validation"), "whole_epochs": arm.epochs[0],
            **figures(whole, small, task, f"{name}_{seed}_{arm.sparsity}"),
            "minutes": (time.perf_counter() - began) / 60}


def untrained(depth: int, weights: str, rate: float) -> dict[str, Any]:
    """Codebooks on calibration data under a price of bits, weights making up for each other; no training."""
    import cifar10

    task, began = cifar10.task(), time.perf_counter()
    whole = fw.network.fold_batch_norm(cifar10.network(depth, weights))
    step = fw.share.Codebook(bits=5, rate=rate, compensate="obs", min_size=256)
    small = step.plan(whole, task).apply(whole)
    small = fw.share.Vectors().plan(small, task).apply(small)
    planned = time.perf_counter() - began
    return {"rate": rate, **figures(whole, small, task, f"resnet{depth}_{rate}"), "planning_minutes": planned / 60}


def trained(arm: Trained, weights: str, seed: int, name: str) -> dict[str, Any]:
    """Masks, then codebooks in training; the statistics of batch norms go into their scale and shift at the end."""
    import cifar10

    task, began = cifar10.task(), time.process_time()
    whole = cifar10.network(arm.depth, weights)
    stages = tuple(f"layer{stage}.{(arm.depth - 2) // 6 - 1}" for stage in (1, 2, 3))
    taught = fw.distill.Logits(temperature=4.0, weight=0.9), fw.distill.Features("hint", weight=0.2, taps=stages)
    train = fw.recover.Train(schedule="onecycle", autocast="bf16", channels_last=True, weight_decay=1e-4)
    masks = fw.prune.Weights(sparsity=arm.sparsity, end=0.5)
    folder = OUT / name.replace(" ", "_").replace(",", "").replace("%", "")

    def fit(network: fw.Network, epochs: int, lr: float, what: Any) -> fw.Network:
        return dataclasses.replace(train, epochs=epochs, lr=lr, beside=(*taught, what)).fit(
            network, task, fw.steps.Context(original=whole, seed=seed, workdir=folder / f"{epochs}_{lr}"))

    sparse = fit(whole, arm.epochs[0], 0.05, masks)
    if arm.entries is None:
        small = fw.network.fold_batch_norm(sparse)
        small = fw.share.Codebook(bits=3, rate=0.03, compensate="obs", min_size=256).plan(small, task).apply(small)
    else:
        books = fw.share.Codebook(clusters=arm.entries, min_size=256, end=0.8)
        small = fw.network.settle_batch_norm(fit(sparse, arm.epochs[1], 0.02, books))
    small = fw.share.Vectors().plan(small, task).apply(small)
    return {"sparsity": arm.sparsity, "entries": arm.entries, "epochs": list(arm.epochs), "seed": seed,
            "sparse_validation": score(sparse, task, "validation"), **figures(whole, small, task, folder.name),
            "processor_minutes": (time.process_time() - began) / 60}


def figures(whole: fw.Network, small: fw.Network, task: fw.Task, name: str) -> dict[str, Any]:
    """Bytes and scores of what the archive gives back; the ratio to 4 bytes a parameter."""
    small.save(OUT / f"{name}.fw")
    size = fw.codec.pack(OUT / f"{name}.fw", OUT / f"{name}.fwz")
    fw.codec.unpack(OUT / f"{name}.fwz", OUT / f"{name}_again.fw")
    again = fw.load(OUT / f"{name}_again.fw")
    floats = 4 * sum(p.numel() for p in whole.parameters())
    return {"bytes": size, "float_bytes": floats, "ratio": floats / size,
            "validation": score(again, task, "validation"), "whole_validation": score(whole, task, "validation"),
            "test_error": 100 - score(again, task, "test"), "whole_test_error": 100 - score(whole, task, "test")}


def score(network: fw.Network, task: fw.Task, split: str) -> float:
    assert task.score is not None
    with torch.no_grad():
        return float(task.score(network.eval(), task.batches(split, None)))


def kept(name: str, make: Any) -> fw.Network:
    """The network of this name from an earlier run, or made now and saved."""
    path = OUT / f"{name}.fw"
    if not path.exists():
        make().save(path)
    return fw.load(path)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("names", nargs="*", default=[], help=", ".join(ARMS))
    reader.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    reader.add_argument("--resnets", default="", help="the folder of resnet20-12fca82f.th and resnet56-4bfd9763.th")
    reader.add_argument("--depths", type=int, nargs="+", default=list(RESNETS))
    reader.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.04, 0.06, 0.1, 0.2])
    reader.add_argument("--trained", nargs="+", default=[], help=", ".join(TRAINED))
    given = reader.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = Rows("deep_compression.json")
    arms = [(f"{name} seed {seed}", name, seed) for name in given.names for seed in given.seeds]
    for key, name, seed in arms:
        if key not in rows:
            rows.add(key, lenet(name, seed, ARMS[name]))
            print(key, rows[key], flush=True)
    for arm, seed in itertools.product(given.trained, given.seeds):
        key, how = f"{arm} seed {seed}", TRAINED[arm]
        if key not in rows:
            rows.add(key, trained(how, str(Path(given.resnets, RESNETS[how.depth])), seed, key))
            print(key, rows[key], flush=True)
    if given.trained:
        return
    for depth, rate in itertools.product(given.depths, given.rates) if given.resnets else []:
        key = f"resnet{depth} no training, made up for, {rate}"
        if key not in rows:
            rows.add(key, untrained(depth, str(Path(given.resnets, RESNETS[depth])), rate))
            print(key, rows[key], flush=True)


if __name__ == "__main__":
    main()
