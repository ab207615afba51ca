"""ResNet-20 on CIFAR-10 (91.73 %) as chains of smaller layers, beside plain SVD and our own channel pruning.

    python benchmarks/low_rank.py --checkpoints FOLDER [PART ...]

at-once: no retraining, 17 % and 30 % fewer parameters, 1,024 training images to fit to: ``LowRank(params=...,
    form="auto", data=True)``; the same without data; SVD of im2col and Tucker-2 at the energy that leaves as many
    parameters; ``Channels`` at the MACs that the first left.
trained: 60 % fewer parameters and 55 % fewer MACs, 15 epochs taught by the original.

The forms and ranks are chosen by calibration data, which are training images; the test images are scored once a row.
Every row goes into benchmarks/results/low_rank.json as soon as it is measured; one that is there is not run again, and
a training that was stopped goes on from its checkpoint in out/low_rank.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import Rows

import featherweight as fw
from featherweight import measure
from featherweight.steps import Context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

POINTS = (0.83, 0.7)  #: parameters that remain
EPOCHS = 15
WORK = HERE.parent / "out/low_rank"
Make = Callable[[], fw.Network]


class Bench:
    def __init__(self, checkpoints: Path) -> None:
        self.task = cifar10.task(calibration_images=1024)
        self.rows = Rows("low_rank.json")
        self.base = cifar10.network(20, str(checkpoints / "resnet20-12fca82f.th"))

    def add(self, name: str, make: Make, **facts: Any) -> None:
        if name in self.rows:
            return
        start = time.perf_counter()
        network = make()
        seconds = time.perf_counter() - start
        row = {"params": measure.params(network), "macs": measure.macs(network).total, **facts,
               "params_before": measure.params(self.base), "macs_before": measure.macs(self.base).total,
               "seconds": seconds, "top1": self.task.score(network, self.task.batches("test"))}  # type: ignore[misc]
        self.rows.add(name, row)
        print(f"{name:44s} {row['top1']:6.2f} %  {1 - row['params'] / row['params_before']:6.1%} fewer params "
              f"{1 - row['macs'] / row['macs_before']:6.1%} fewer MACs  {seconds:.0f} s", flush=True)

    def low_rank(self, **options: Any) -> fw.Network:
        return fw.factorize.LowRank(**options).plan(self.base, self.task).apply(self.base)

    def by_energy(self, form: str, params: float) -> fw.Network:
        """At the one energy, found by bisection, that leaves these parameters."""
        low, high, whole = 0.05, 1.0, measure.params(self.base)
        found = self.base
        for _ in range(12):
            energy = (low + high) / 2
            made = self.low_rank(energy=energy, form=form, min_gain=0.0)
            small = measure.params(made) <= params * whole
            low, high = (energy, high) if small else (low, energy)
            found = made if small else found
        return found

    def channels(self, macs: float) -> fw.Network:
        step = fw.prune.Channels(macs=macs, score="reconstruction", allocation="sensitivity",
                                 compensate="least_squares", residual=False)
        return step.plan(self.base, self.task).apply(self.base)

    def at_once(self) -> None:
        self.add("resnet20", lambda: self.base)
        for params in POINTS:
            name = f"resnet20 params={params}"
            self.add(f"{name} auto, data", lambda p=params: self.low_rank(params=p, form="auto", data=True))
            self.add(f"{name} auto", lambda p=params: self.low_rank(params=p, form="auto"))
            for form in ("svd", "tucker2"):
                self.add(f"{name} {form} by energy", lambda p=params, f=form: self.by_energy(f, p))
            row = self.rows[f"{name} auto, data"]
            self.add(f"{name} Channels at its MACs", lambda r=row: self.channels(r["macs"] / r["macs_before"]))

    def trained(self, epochs: int = EPOCHS) -> None:
        train = fw.recover.Train(epochs=epochs, lr=0.05, schedule="onecycle", autocast="bf16", channels_last=True,
                                 distill=fw.distill.Logits(temperature=4.0))
        name = f"resnet20 params=0.4, macs=0.45 auto, data, {epochs} epochs"
        folder = WORK / name.replace(" ", "_").replace(",", "")
        self.add(name, lambda: train.fit(self.low_rank(params=0.4, macs=0.45, form="auto", data=True), self.task,
                                         Context(original=self.base, workdir=folder)), epochs=epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("parts", nargs="*", help="all of them if none is named")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.checkpoints)
    parts: dict[str, Callable[[], None]] = {"at-once": bench.at_once, "trained": bench.trained}
    for part in given.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
