"""Channels of the trained CIFAR-10 ResNets cut by featherweight and by Torch-Pruning, same weights, data and budget.

    python benchmarks/beside_torch_pruning.py --checkpoints FOLDER [PART ...]

theirs, ours: no retraining, ResNet-20 and ResNet-56 at 1.2x to 4x fewer MACs, 1,024 training images to calibrate on:
    for them to re-estimate batch norm; for us to choose by and to refit the weights that remain. Torch-Pruning (1.6.1)
    stops on the option-A shortcut unless all but each block's inner channels are left alone; with these, its L1 is run
    with one ratio for all layers and with a global ranking.
theirs-trained, ours-trained: ResNet-20 at 2.1x and 3x after 8 epochs, 3 seeds. theirs-taught, ours-taught: the same
    training with the original as teacher (temperature 4, half of the loss) for both.
ours-uniform-taught: so, and with one share for all layers on our side too, which is worse without retraining.
ours-long: ResNet-56 at 2.1x, retrained for longer, taught by the original.

Torch-Pruning is needed for its own side alone. MACs are counted by featherweight for both. Every row goes into
benchmarks/results/beside_torch_pruning.json as soon as it is measured; one that is there is not run again, and a
training that was stopped goes on from its checkpoint in out/beside_torch_pruning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import nn

import featherweight as fw
from featherweight import measure
from featherweight.steps import Context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
POINTS = (1.2, 1.5, 2.1, 3.0, 4.0)  #: times fewer MACs
TRAINED = (2.1, 3.0)
SEEDS = (0, 1, 2)
EPOCHS = 8
LONG = (20,)  #: epochs of ResNet-56
TEACHER = fw.distill.Logits(temperature=4.0)
BATCHES = 8  #: of 128 images, for batch norm
WORK = HERE.parent / "out/beside_torch_pruning"
Make = Callable[[], fw.Network]


def retraining(epochs: int = EPOCHS, distill: fw.distill.Logits | None = None) -> fw.recover.Train:
    """SGD, one cycle to 0.02, flips and shifts."""
    return fw.recover.Train(epochs=epochs, lr=0.02, schedule="onecycle", autocast="bf16", channels_last=True,
                            distill=distill)


class Bench:
    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.task = cifar10.task(calibration_images=BATCHES * 128)
        self.rows = Rows("beside_torch_pruning.json")

    def original(self, depth: int) -> fw.Network:
        return cifar10.network(depth, str(self.checkpoints / FILES[depth]))

    def normed(self, network: fw.Network) -> fw.Network:
        return fw.recover.BatchNorm(batches=BATCHES).fit(network, self.task, Context())

    def add(self, name: str, base: fw.Network, make: Make, **facts: Any) -> None:
        if name in self.rows:
            return
        network = make()
        row = {"macs": measure.macs(network).total, "params": measure.params(network), **facts,
               "macs_before": measure.macs(base).total,
               "top1": self.task.score(network, self.task.batches("test"))}  # type: ignore[misc]
        row["fewer_macs"] = row["macs_before"] / row["macs"]
        self.rows.add(name, row)
        print(f"{name:58s} {row['top1']:6.2f} %  {row['fewer_macs']:5.2f}x fewer MACs", flush=True)

    def trained(self, name: str, base: fw.Network, start: Make, seed: int, train: fw.recover.Train) -> None:
        def make() -> fw.Network:
            folder = WORK / name.replace(" ", "_").replace(",", "")
            return train.fit(start(), self.task, Context(original=base, workdir=folder, seed=seed))

        self.add(name, base, make, seed=seed, epochs=train.epochs, taught=train.distill is not None)

    def training(self, side: str, start: Callable[[float], fw.Network], taught: bool) -> None:
        """ResNet-20 at both points with every seed; ``start`` gives the cut network."""
        base, how = self.original(20), "taught" if taught else "trained"
        for seed in SEEDS:
            for fewer in TRAINED:
                self.trained(f"resnet20 {side} {fewer}x {how}, seed {seed}", base, lambda f=fewer: start(f), seed,
                             retraining(distill=TEACHER if taught else None))

    # ---- featherweight
    def ours(self, depth: int, fewer: float, allocation: str = "sensitivity") -> fw.Network:
        base = self.original(depth)
        step = fw.prune.Channels(macs=1 / fewer, score="reconstruction", allocation=allocation,
                                 compensate="least_squares", residual=False)
        return step.plan(base, self.task).apply(base)

    def our_curve(self) -> None:
        for depth in FILES:
            base = self.original(depth)
            for fewer in POINTS:
                self.add(f"resnet{depth} ours {fewer}x", base, lambda d=depth, f=fewer: self.ours(d, f), side="ours")

    def our_training(self, taught: bool = False) -> None:
        self.training("ours", partial(self.ours, 20), taught)

    def our_uniform_training(self) -> None:
        self.training("ours uniform", partial(self.ours, 20, allocation="uniform"), True)

    def our_long(self) -> None:
        base = self.original(56)
        for epochs in LONG:
            self.trained(f"resnet56 ours 2.1x, {epochs} epochs, taught", base, lambda: self.ours(56, 2.1), 0,
                         retraining(epochs, TEACHER))

    # ---- Torch-Pruning
    def theirs(self, depth: int, fewer: float, overall: bool) -> fw.Network:
        """Its L1 on the inner channels of every block, the ratio found by bisection so that the MACs are met."""
        base = measure.macs(self.original(depth)).total
        low, high, best = 0.0, 1.0, None
        for _ in range(12):
            ratio = (low + high) / 2
            found = self._cut_by_them(depth, ratio, overall)
            macs = measure.macs(found).total
            if best is None or abs(macs * fewer - base) < best[0]:
                best = (abs(macs * fewer - base), found)
            low, high = (ratio, high) if macs * fewer > base else (low, ratio)
        assert best is not None
        return best[1]

    def _cut_by_them(self, depth: int, ratio: float, overall: bool) -> fw.Network:
        import torch_pruning as tp

        model = cifar10.ResNet(depth)
        saved = torch.load(self.checkpoints / FILES[depth], map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({k.removeprefix("module."): v for k, v in saved.items()}, strict=False)
        model.eval()
        fixed: list[nn.Module] = [m for n, m in model.named_modules()
                                  if isinstance(m, nn.Conv2d | nn.Linear) and not n.endswith(".conv1")] + [model.conv1]
        example = torch.zeros(1, 3, 32, 32)
        pruner = tp.pruner.MagnitudePruner(
            model, example, importance=tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=ratio,
            global_pruning=overall, ignored_layers=fixed)
        pruner.step()
        return fw.capture(model, torch.zeros(2, 3, 32, 32))

    def their_curve(self) -> None:
        for depth in FILES:
            base = self.original(depth)
            for fewer in POINTS:
                for overall in (False, True):
                    kind = "global" if overall else "uniform"
                    self.add(f"resnet{depth} theirs {kind} {fewer}x", base,
                             lambda d=depth, f=fewer, o=overall: self.normed(self.theirs(d, f, o)), side="theirs")

    def their_training(self, taught: bool = False) -> None:
        self.training("theirs uniform", lambda fewer: self.theirs(20, fewer, False), taught)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("parts", nargs="*", help="all of them if none is named")
    given = parser.parse_args()
    bench = Bench(given.checkpoints)
    parts: dict[str, Callable[[], None]] = {
        "theirs": bench.their_curve, "ours": bench.our_curve,
        "theirs-trained": bench.their_training, "ours-trained": bench.our_training,
        "theirs-taught": partial(bench.their_training, True), "ours-taught": partial(bench.our_training, True),
        "ours-uniform-taught": bench.our_uniform_training, "ours-long": bench.our_long}
    for part in given.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
