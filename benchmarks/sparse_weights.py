"""Single weights set to zero: the LeNets on MNIST, and ResNet-20 on CIFAR-10 with and without retraining.

    python benchmarks/sparse_weights.py lenet300 lenet5 [--seeds 0 1 2]
    python benchmarks/sparse_weights.py --checkpoints FOLDER oneshot resnet20

lenet300, lenet5: LeNet-300-100 and LeNet-5 (20-50-500, 431 k parameters) trained here on 55,000 MNIST images shifted by
    up to two pixels, then pruned in one more training with the dense network as teacher.
oneshot: ResNet-20 at 50 % zeros and no retraining: OBS and least squares beside magnitude, Wanda and random.
resnet20: at 80 % zeros after ten epochs.

Sparsity is counted over the weights of convolutions and linear layers. Choices were made on 5,000 training images that
the MNIST networks do not see, and for ResNet-20 on training images; every row reads the test split once, through the
file that ONNX Runtime runs. A row goes into benchmarks/results/sparse_weights.json as soon as it is measured; one that
is there is not run again, and a training that was stopped goes on from its checkpoint in out/sparse_weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rows import Rows
from torch import Tensor, nn

import featherweight as fw
from featherweight.measure import measure
from featherweight.network.layers import calls_of
from featherweight.steps import Context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

WORK = HERE.parent / "out/sparse_weights"
VALIDATION = 5_000
Make = Callable[[], fw.Network]
Weights = fw.prune.Weights


def add(rows: Rows, name: str, make: Make, task: fw.Task, seed: int, **about: Any) -> None:
    """Measures ``make()`` on the test split; ``about`` says how it was made."""
    if name in rows:
        return
    network = make()
    weights = [network.tensor(n) for n in calls_of(network)]
    zeros, total = (sum(int(f(w)) for w in weights) for f in (lambda w: (w == 0).sum(), Tensor.numel))
    found = measure(network, task, split="test", step=name, archive=True, seconds=0.2)
    row = {"error": round(100 - (found.score or 0.0), 4), "zeros": zeros, "weights": total, "sparsity": zeros / total,
           "params": found.params, "file_bytes": found.file_bytes, "archive_bytes": found.archive_bytes, **about,
           "seed": seed}
    rows.add(name, row)
    print(f"{name:52s} error {row['error']:5.2f} %  zeros {row['sparsity']:.2%}  archive {found.archive_bytes} B",
          flush=True)


def context(name: str, original: fw.Network | None, seed: int) -> Context:
    """Where a training leaves its checkpoints, and a word on its progress once an epoch's time has gone by."""
    last = [time.monotonic()]

    def progress(what: str, done: float, total: float, figures: Any) -> None:
        if time.monotonic() - last[0] > 60:
            last[0] = time.monotonic()
            print(f"  {name}: {done:.0f} of {total:.0f}, loss {figures['loss']:.4f}", flush=True)

    return Context(original=original, workdir=WORK / name.replace(" ", "_"), seed=seed, progress=progress)


def kept(name: str, make: Make) -> fw.Network:
    """What ``make`` gives, from the work folder if it was made before."""
    file = WORK / f"{name.replace(' ', '_')}.fw"
    if not file.exists():
        network = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        network.save(file)
    loaded = fw.load(file)
    assert isinstance(loaded, fw.Network)
    return loaded


# ---- MNIST

def lenet300() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                         nn.Linear(100, 10))


def lenet5() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def mnist(batch: int = 128, shift: int = 2) -> fw.Task:
    """Train (55,000 images, shifted by up to ``shift`` pixels), calibration (from train), validation, test."""
    folder = Path(os.environ.get("FEATHERWEIGHT_DATA", Path.home() / ".cache/featherweight/data"))
    with np.load(folder / "mnist.npz") as found:
        data = {k: torch.from_numpy(found[k]) for k in ("x_train", "y_train", "x_test", "y_test")}
    x, y = data["x_train"], data["y_train"].long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, used = order[:VALIDATION], order[VALIDATION:]
    padded, labels = F.pad(x[used], (shift,) * 4), y[used]

    def ready(images: Tensor) -> Tensor:
        return ((images.float() / 255 - 0.1307) / 0.3081)[:, None]

    def train() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(labels)).split(batch):
            rows, columns = (torch.randint(0, 2 * shift + 1, (len(index), 1)) + torch.arange(28) for _ in range(2))
            yield ready(padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]), labels[index]

    def plain(images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(targets), 500):
            yield ready(images[start:start + 500]), targets[start:start + 500]

    return fw.Task(train=train, calibration=lambda: plain(x[used[:2000]], y[used[:2000]]),
                   validation=lambda: plain(x[held], y[held]),
                   test=lambda: plain(data["x_test"], data["y_test"].long()),
                   loss=F.cross_entropy, score=fw.scores.top1, score_name="top-1 %")


@dataclass(frozen=True)
class Lenet:
    """A model, the epochs of its dense training, and how it is pruned."""

    model: Callable[[], nn.Module]
    dense_epochs: int
    epochs: int
    lr: float
    weight_decay: float
    masks: Weights
    how: str
    #: what makes convolutions faster on a CPU, and steady at the beginning
    more: dict[str, Any] = field(default_factory=dict)


LENETS = {
    "lenet300": Lenet(lenet300, 20, 30, 0.05, 1e-4, Weights(0.95, regrow="surgery", end=0.5, frequency=5 / 12_900),
                      "cubic to half of the way, weights may come back to three quarters"),
    "lenet5": Lenet(lenet5, 6, 25, 0.08, 5e-4, Weights(0.99, end=0.6), "cubic to 0.6 of the way",
                    {"autocast": "bf16", "channels_last": True, "warmup": 0.04, "clip": 1.0}),
}


def dense(row: Lenet, task: fw.Task, where: Context) -> fw.Network:
    torch.manual_seed(where.seed)
    network = fw.capture(row.model().eval(), torch.zeros(2, 1, 28, 28))
    return fw.recover.Train(epochs=row.dense_epochs, lr=0.05, weight_decay=5e-4, **row.more).fit(network, task, where)


def lenet(name: str, rows: Rows, seed: int) -> None:
    row, task, run = LENETS[name], mnist(), f"{name} seed {seed}"
    half = ", bf16" if row.more else ""
    parent = kept(f"{run} dense", lambda: dense(row, task, context(f"{run} dense", None, seed)))
    add(rows, f"{run} dense", lambda: parent, task, seed, validation_error=validation_error(parent, task),
        how=f"{row.dense_epochs} epochs, cosine from 0.05, shifts{half}")
    step = fw.recover.Train(epochs=row.epochs, lr=row.lr, weight_decay=row.weight_decay, during=(row.masks,),
                            distill=fw.distill.Logits(temperature=2.0, weight=0.7), **row.more)
    title = f"{run} {row.masks.sparsity:.1%} zeros"
    pruned = kept(title, lambda: step.fit(parent, task, context(title, parent, seed)))
    add(rows, title, lambda: pruned, task, seed, validation_error=validation_error(pruned, task),
        how=f"{row.epochs} epochs, cosine from {row.lr}, shifts{half}, dense network as teacher, magnitude over "
            f"all layers, {row.how}")


def validation_error(network: fw.Network, task: fw.Task) -> float:
    return round(100 - fw.scores.top1(network, task.batches("validation")), 4)


# ---- ResNet-20

ONESHOT: dict[str, Weights] = {
    "magnitude, global": Weights(0.5),
    "magnitude, erk": Weights(0.5, allocation="erk"),
    "magnitude, layer": Weights(0.5, allocation="layer"),
    "wanda, output": Weights(0.5, score="wanda", allocation="output"),
    "fisher, global": Weights(0.5, score="fisher"),
    "obs score and sweep, global": Weights(0.5, score="obs", compensate="obs"),
    "obs score and sweep, layer": Weights(0.5, score="obs", compensate="obs", allocation="layer"),
    "magnitude, global, least squares": Weights(0.5, compensate="least_squares"),
    "obs score, global, least squares": Weights(0.5, score="obs", compensate="least_squares"),
    "2:4, magnitude": Weights(pattern="2:4"),
    "2:4, obs score and sweep": Weights(pattern="2:4", score="obs", compensate="obs"),
}


def resnet(checkpoints: Path) -> fw.Network:
    return cifar10.network(20, str(checkpoints / "resnet20-12fca82f.th"))


def oneshot(rows: Rows, checkpoints: Path) -> None:
    task, base = cifar10.task(), resnet(checkpoints)
    add(rows, "resnet20 dense", lambda: base, task, 0)
    for name, step in ONESHOT.items():
        add(rows, f"resnet20 50 %, no retraining: {name}", lambda s=step: s.plan(base, task).apply(base), task, 0,
            how="1,024 calibration images")


def retraining(during: tuple[fw.prune.Weights, ...] = ()) -> fw.recover.Train:
    return fw.recover.Train(epochs=10, lr=0.05, schedule="onecycle", autocast="bf16", channels_last=True,
                            weight_decay=1e-4, during=during, distill=fw.distill.Logits(temperature=2.0, weight=0.7))


def resnet20(rows: Rows, checkpoints: Path, seed: int) -> None:
    task, base = cifar10.task(), resnet(checkpoints)
    ways: dict[str, Make] = {
        "gradual": lambda: retraining((Weights(0.8, end=0.5),)).fit(
            base, task, context(f"resnet20 gradual {seed}", base, seed)),
        "regrowing": lambda: retraining((Weights(0.8, regrow="surgery", end=0.4, frequency=5 / 3510),)).fit(
            base, task, context(f"resnet20 regrowing {seed}", base, seed)),
        "obs first": lambda: retraining().fit(
            Weights(0.8, score="obs", compensate="obs").plan(base, task).apply(base), task,
            context(f"resnet20 obs {seed}", base, seed)),
    }
    for name, make in ways.items():
        add(rows, f"resnet20 80 %, 10 epochs, {name}, seed {seed}", make, task, seed,
            how="one cycle to 0.05, bf16, dense network as teacher, flips and shifts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, help="folder with resnet20-12fca82f.th")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("what", nargs="+", choices=["lenet300", "lenet5", "oneshot", "resnet20"])
    given = parser.parse_args()
    rows = Rows("sparse_weights.json")
    for what in given.what:
        if what not in LENETS and given.checkpoints is None:
            parser.error(f"{what} needs --checkpoints FOLDER")
        if what == "oneshot":
            oneshot(rows, given.checkpoints)
        for seed in given.seeds if what != "oneshot" else []:
            if what in LENETS:
                lenet(what, rows, seed)
            else:
                resnet20(rows, given.checkpoints, seed)


if __name__ == "__main__":
    main()
