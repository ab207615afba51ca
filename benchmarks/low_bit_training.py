"""Networks trained as the few-bit networks that they will be: ResNet-20 on CIFAR-10, LeNet-5 on MNIST.

    python benchmarks/low_bit_training.py --checkpoints FOLDER [resnet20] [lenet5] [--arms "int2/uint2" ...]
        [--epochs 20] [--seeds 0]

resnet20: from the trained float network, which is the teacher too; every arm has the same epochs. lenet5: LeNet-5
(20-50-500, with batch norm) trained here in float on 55,000 MNIST images, shifted at random, then on them as they are
with binary weights and values.
"int2/uint2" reads weights/values, and a word behind it tells apart two trainings of one form; the first and the last
layer have 8 bits. What is scored is the network as it is stored: integers and scales, batch norm folded; values
of few bits are simulated exactly.

Choices were made on held-out training images (--split validation tries things out, and writes to the rows' file given
by --rows). Each row reads the test split once and goes into benchmarks/results/low_bit_training.json as soon as it is
measured; one that is there is not run again; a training that was stopped goes on from out/low_bit_training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from sparse_weights import mnist
from torch import nn

import featherweight as fw
from featherweight.quantize import Quantize
from featherweight.steps import Context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

WORK = HERE.parent / "out/low_bit_training"
FILE = "resnet20-12fca82f.th"


@dataclass(frozen=True)
class Arm:
    """A form that weights and values are trained in, and the top-1 that is asked for."""

    wanted: float
    quantize: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


#: the ends of the float network's stages, beside its outputs
FEATURES = fw.distill.Features("hint", weight=0.2, taps=tuple(f"layer{stage}.2" for stage in (1, 2, 3)))
RESNET20: dict[str, Arm] = {
    "int4/uint4": Arm(91.5),
    "int3/uint3": Arm(91.0),
    "int2/uint2": Arm(89.0),
    "int2/uint2 taught by activations": Arm(89.91, train={"beside": (FEATURES,)}),
    "binary/float": Arm(88.5),
    "binary/uint1 SGD": Arm(82.0),
    # validation after one epoch and three: 62.9 and 75.4; lr 0.003: 57.2 and 71.0; SGD: 48.2
    "binary/uint1": Arm(82.0, train={"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.0}),
    "binary/uint1 taught by activations": Arm(82.22, train={"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.0,
                                                            "beside": (FEATURES,)}),
}
LENET5: dict[str, Arm] = {"binary/uint1": Arm(99.0, train={"lr": 0.1})}
#: without these instructions bfloat16 is emulated, and slower than float32
AUTOCAST = "bf16" if "AVX512" in torch.backends.cpu.get_cpu_capability() else None
TRAIN: dict[str, Any] = {"lr": 0.02, "schedule": "onecycle", "autocast": AUTOCAST, "channels_last": True,
                         "weight_decay": 1e-4, "distill": fw.distill.Logits(temperature=4.0, weight=0.5)}


def lenet5() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5, bias=False), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5, bias=False), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500, bias=False), nn.BatchNorm1d(500), nn.ReLU(), nn.Linear(500, 10))


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.rows = Rows(given.rows)

    def context(self, name: str, original: fw.Network | None, seed: int) -> Context:
        last = [time.monotonic()]

        def progress(what: str, done: float, total: float, figures: Any) -> None:
            if time.monotonic() - last[0] > 60:
                last[0] = time.monotonic()
                print(f"  {name}: {done:.0f} of {total:.0f}, loss {figures['loss']:.4f}", flush=True)

        folder = WORK / "".join(c if c.isalnum() else "_" for c in name)
        return Context(original=original, workdir=folder, seed=seed, progress=progress)

    def run(self, model: str, arms: dict[str, Arm], base: Callable[[int], fw.Network], task: fw.Task) -> None:
        for seed in self.given.seeds:
            for form, arm in arms.items():
                name = f"{model} {form}, {self.given.epochs} epochs, seed {seed}"
                if name in self.rows or (self.given.arms and form not in self.given.arms):
                    continue
                self.arm(name, form, arm, base(seed), task, seed)

    def arm(self, name: str, form: str, arm: Arm, base: fw.Network, task: fw.Task, seed: int) -> None:
        weights, _, values = form.split()[0].partition("/")
        step = Quantize(weights, None if values == "float" else values, **arm.quantize)
        train = fw.recover.Train(epochs=self.given.epochs, during=(step,), **{**TRAIN, **arm.train},
                                 batches=self.given.batches)
        start = time.process_time()
        made = train.fit(base, task, self.context(name, base, seed))
        seconds = time.process_time() - start
        with tempfile.TemporaryDirectory() as folder:
            size = made.save(Path(folder, "net.fw"))
        score = task.score(made, task.batches(self.given.split))  # type: ignore[misc]
        self.rows.add(name, {"top1": score, "wanted": arm.wanted, "network_bytes": size, "epochs": self.given.epochs,
                             "seed": seed, "split": self.given.split, "processor_s": round(seconds),
                             "quantize": repr(step), "train": repr({**TRAIN, **arm.train})})
        print(f"{name:56s} {score:6.2f} % (wanted {arm.wanted})  {size} B  {seconds:.0f} s", flush=True)


def float_lenet5(bench: Bench, task: fw.Task, seed: int) -> fw.Network:
    file = WORK / f"lenet5_{seed}.fw"
    if not file.exists():
        torch.manual_seed(seed)
        network = fw.capture(lenet5().eval(), torch.zeros(2, 1, 28, 28))
        train = fw.recover.Train(epochs=6, lr=0.05, weight_decay=5e-4, autocast=AUTOCAST, channels_last=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        train.fit(network, task, bench.context(f"lenet5 float {seed}", None, seed)).save(file)
    loaded = fw.load(file)
    assert isinstance(loaded, fw.Network)
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, help=f"folder with {FILE}")
    parser.add_argument("--arms", nargs="*", default=[])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batches", type=int, help="at most this many batches of each epoch")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", default="low_bit_training.json")
    parser.add_argument("what", nargs="+", choices=["resnet20", "lenet5"])
    given = parser.parse_args()
    bench = Bench(given)
    if "lenet5" in given.what:
        shifted, task = mnist(), mnist(shift=0)  # validation, 8 epochs: 99.18
        bench.run("lenet5", LENET5, lambda seed: float_lenet5(bench, shifted, seed), task)
    if "resnet20" in given.what:
        if given.checkpoints is None:
            parser.error("resnet20 needs --checkpoints FOLDER")
        bench.run("resnet20", RESNET20, lambda seed: cifar10.network(20, str(given.checkpoints / FILE)), cifar10.task())


if __name__ == "__main__":
    main()
