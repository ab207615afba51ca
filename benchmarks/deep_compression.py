"""Deep Compression's two MNIST networks, as small as they go: bytes of the archive, graph included, against error.

    python benchmarks/deep_compression.py lenet_300_100 lenet_5 --seeds 0 1 2
    python benchmarks/deep_compression.py --resnet20 FOLDER/resnet20-12fca82f.th

Each LeNet is trained, pruned in a training taught by itself, given codebooks (bits and price chosen on images kept from
training), and trained once more at fixed indices; then its vectors are rounded. The ResNet-20 gets codebooks and no
training. The test split is read once, of the network that the archive gives back. Rows: results/deep_compression.json.
"""

from __future__ import annotations

import argparse
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
    """How a LeNet is made small. sparsity: of its weights. allowed: points of validation score that the codebooks may
    cost. epochs: of the first training, under masks, and at fixed indices."""

    sparsity: float
    epochs: tuple[int, int, int]
    lr: float = 0.02
    first_lr: float = 0.1
    allowed: float = 0.1


ARMS = {"lenet_300_100": Arm(0.968, (25, 30, 4), lr=0.05), "lenet_5": Arm(0.985, (15, 12, 3), lr=0.05)}
CODEBOOKS = [(bits, rate) for bits in (3, 4) for rate in (0.02, 0.005)]  #: from the fewest bytes on


def lenet(name: str, seed: int, arm: Arm) -> dict[str, Any]:
    import mnist

    task, began = mnist.task(batch=256), time.perf_counter()
    whole = kept(f"{name}_{seed}_whole", lambda: fw.recover.Train(
        epochs=arm.epochs[0], lr=arm.first_lr, schedule="onecycle", weight_decay=1e-4, decay_vectors=False,
    ).fit(mnist.network(name, seed), task, fw.steps.Context(seed=seed)))
    context, taught = fw.steps.Context(original=whole, seed=seed), fw.distill.Logits(temperature=2.0, weight=0.8)
    masks = fw.prune.Weights(sparsity=arm.sparsity, frequency=0.02, end=0.6)
    sparse = kept(f"{name}_{seed}_{arm.sparsity}", lambda: fw.recover.Train(
        epochs=arm.epochs[1], lr=arm.lr, weight_decay=1e-5, beside=(taught, masks)).fit(whole, task, context))
    least = score(sparse, task, "validation") - arm.allowed
    for bits, rate in CODEBOOKS:
        step = fw.share.Codebook(bits=bits, rate=rate, importance="fisher", min_size=256)
        shared = step.plan(sparse, task).apply(sparse)
        shared = fw.recover.Train(epochs=arm.epochs[2], lr=arm.lr / 10, weight_decay=0.0, beside=(taught,)).fit(
            shared, task, context)
        small = fw.share.Vectors().plan(shared, task).apply(shared)
        reached = score(small, task, "validation")
        print(name, seed, bits, rate, reached, fw.codec.archive_bytes(small), flush=True)
        if reached >= least:
            break
    else:
        raise SystemExit(f"{name}, seed {seed}: no codebook of {CODEBOOKS} keeps a validation score of {least}")
    return {"sparsity": arm.sparsity, "bits": bits, "rate": rate, "epochs": list(arm.epochs), "seed": seed,
            **figures(whole, small, task, f"{name}_{seed}"), "minutes": (time.perf_counter() - began) / 60}


def resnet20(weights: str, budget: float) -> dict[str, Any]:
    """Codebooks on calibration data, a price of bits for each layer within ``budget`` of the archive, no training."""
    import cifar10

    task, began = cifar10.task(), time.perf_counter()
    whole = fw.network.fold_batch_norm(cifar10.network(20, weights))
    family = fw.share.Rates(step=fw.share.Codebook(bits=5, importance="inputs", min_size=256))
    fw.judge.candidates.register(family)
    mixed = fw.balance.Mixed(archive=budget, kinds=("float",), families=("share.rates",), how="output", batches=1)
    plan = mixed.plan(whole, task)
    small = plan.apply(whole)
    small = fw.share.Vectors().plan(small, task).apply(small)
    return {"budget": budget, **figures(whole, small, task, f"resnet20_{budget}"),
            "minutes": (time.perf_counter() - began) / 60}


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
    reader.add_argument("--resnet20", default="")
    reader.add_argument("--budget", type=float, nargs="+", default=[0.12])
    given = reader.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = Rows("deep_compression.json")
    arms = [(f"{name} seed {seed}", name, seed) for name in given.names for seed in given.seeds]
    for key, name, seed in arms:
        if key not in rows:
            rows.add(key, lenet(name, seed, ARMS[name]))
            print(key, rows[key], flush=True)
    for budget in given.budget if given.resnet20 else []:
        key = f"resnet20 no training {budget}"
        if key not in rows:
            rows.add(key, resnet20(given.resnet20, budget))
            print(key, rows[key], flush=True)


if __name__ == "__main__":
    main()
