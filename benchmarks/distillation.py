"""What a teacher brings: every kind of knowledge and every strategy beside the same training without.

    python benchmarks/distillation.py --checkpoints FOLDER [PART ...] [--seeds 0 1 2]

small, small-more: a fresh ResNet-8 on a subset of CIFAR-10 (2,560 training images, mirrored at random, 12 epochs, SGD
    with one cycle to 0.05), taught by the trained ResNet-56 where an arm has a teacher; 3 seeds. The teacher saw all
    45,000 images. Validation (5,000 images of the training split) chooses the pair of objectives; every row has both
    scores.
pruned, pruned-3x: ResNet-20 at 2.1x and 3x fewer MACs after 8 epochs on the whole split, as in beside_torch_pruning.py,
    taught by the outputs and by the activations of what it was cut from: kept channels compared directly.
pruned-56: ResNet-56 so at 2.1x after 20 epochs; zeros: ResNet-20 at 80 % zeros after 10, as in sparse_weights.py.
costs: seconds and memory of each arm as a ratio to plain training; rows go into distillation_costs.json.

Every row goes into benchmarks/results/distillation.json as soon as it is measured; one that is there is not run again.
A training that was stopped goes on from its checkpoint in out/distillation.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import Tensor

import featherweight as fw
from featherweight import measure
from featherweight.distill import (
    BornAgain,
    Exits,
    Features,
    Logits,
    Mutual,
    OwnPast,
    Relations,
    Smoothing,
)
from featherweight.distill.cache import OutputCache
from featherweight.steps import Context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
SEEDS = (0, 1, 2)
IMAGES, BATCH, EPOCHS = 2560, 64, 12
WORK = HERE.parent / "out/distillation"
CACHE = str(WORK / "outputs")
KD = Logits(temperature=4.0, weight=0.5, cache=CACHE)
#: name -> what works beside the training of the small student, the essential arms first
SMALL: dict[str, tuple[Any, ...]] = {
    "no teacher": (),
    "kd": (KD,),
    "label smoothing": (Smoothing(0.1),),
    "dist": (dataclasses.replace(KD, loss="dist"),),
    "kd, standardized": (dataclasses.replace(KD, temperature=2.0, standardize=True),),
    "dml": (Mutual(),),
    "born again": (),
    "byot": (Exits(),),
    "attention": (Features("attention", weight=5.0),),
    "similarity": (Features("similarity", weight=1000.0),),
    "dist and attention": (dataclasses.replace(KD, loss="dist"), Features("attention", weight=5.0)),
    "dkd": (dataclasses.replace(KD, loss="dkd"),),
    "mlkd": (dataclasses.replace(KD, loss="mlkd"),),
    "ps-kd": (OwnPast(0.8),),
    "hint": (Features("hint"),),
    "kd and attention": (KD, Features("attention", weight=5.0)),
    "kd and similarity": (KD, Features("similarity", weight=1000.0)),
    "rkd": (Relations("rkd"),),
    "correlation": (Relations("correlation", weight=10.0),),
    "crd": (Relations("crd", weight=0.5, bank=1024),),
    "review": (Features("review"),),
    "cwd": (Features("cwd"),),
    "fgd": (Features("fgd", weight=0.1),),
    "mgd": (Features("mgd"),),
}
FIRST = 11  #: arms that `small` runs; `small-more` runs the others


def ends(depth: int, inner: tuple[str, ...] = (".bn1", "")) -> tuple[str, ...]:
    """Every stage's end, and before it the inner activations of its last block, where channels are cut."""
    return tuple(f"layer{stage}.{(depth - 2) // 6 - 1}{where}" for stage in (1, 2, 3) for where in inner)


def by_parent(taps: tuple[str, ...]) -> tuple[Any, ...]:
    """Taught by the outputs and the activations of what the student was cut from."""
    return Logits(temperature=4.0, weight=0.9), Features("hint", weight=0.2, taps=taps)


def subset(mirrored: bool = True) -> fw.Task:
    """2,560 images, not shifted, so that outputs can be cached; each mirrored half of the time, or as they are."""
    whole, data = cifar10.task(), cifar10.arrays()
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    used = order[cifar10.VALIDATION:][:IMAGES]
    images, labels = data["x_train"][used], data["y_train"][used]

    def train() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(IMAGES).split(BATCH):
            turned = torch.rand(len(index), 1, 1, 1) < 0.5 * mirrored
            yield cifar10.normalised(torch.where(turned, images[index].flip(3), images[index])), labels[index]

    return dataclasses.replace(whole, train=train)


class Bench:
    def __init__(self, checkpoints: Path, seeds: list[int]) -> None:
        self.checkpoints, self.seeds, self.rows = checkpoints, seeds, Rows("distillation.json")

    def original(self, depth: int) -> fw.Network:
        return cifar10.network(depth, str(self.checkpoints / FILES[depth]))

    def add(self, name: str, make: Callable[[Path], fw.Network], task: fw.Task, **facts: Any) -> None:
        if name in self.rows:
            return
        start, wall = time.process_time(), time.monotonic()
        network = make(WORK / name.replace(" ", "_").replace(",", ""))
        assert task.score is not None
        scores = {split: task.score(network, task.batches(split)) for split in ("validation", "test")}
        row = {"validation": scores["validation"], "top1": scores["test"], **facts, "macs": measure.macs(network).total,
               "processor_s": round(time.process_time() - start), "wall_s": round(time.monotonic() - wall),
               "notes": list(network.notes)[:3]}
        self.rows.add(name, row)
        print(f"{name:52s} validation {scores['validation']:6.2f} test {scores['test']:6.2f} {row['wall_s']} s",
              flush=True)

    def small(self, arms: list[str]) -> None:
        task, teacher = subset(), self.original(56)
        train = fw.recover.Train(epochs=EPOCHS, lr=0.05, schedule="onecycle", autocast="bf16", channels_last=True)
        for seed in self.seeds:
            for arm in arms:
                self.add(f"resnet8 {arm}, seed {seed}", lambda folder, a=arm, s=seed: self._taught(
                    a, s, train, task, teacher, folder), task, arm=arm, seed=seed, epochs=EPOCHS, images=IMAGES)

    def _taught(self, arm: str, seed: int, train: fw.recover.Train, task: fw.Task, teacher: fw.Network,
                folder: Path) -> fw.Network:
        torch.manual_seed(seed)
        student = cifar10.network(8)
        context = Context(original=teacher, workdir=folder, seed=seed)
        if arm == "born again":  # the first generation is the arm without a teacher
            first = train.fit(student, task, Context(workdir=folder / "first", seed=seed))
            return BornAgain(train).fit(first, task, dataclasses.replace(context, original=None))
        return dataclasses.replace(train, beside=SMALL[arm]).fit(student, task, context)

    def pruned(self, depth: int, fewer: float, epochs: int, seeds: list[int]) -> None:
        task, base = cifar10.task(calibration_images=1024), self.original(depth)
        step = fw.prune.Channels(macs=1 / fewer, score="reconstruction", allocation="sensitivity",
                                 compensate="least_squares", residual=False)
        plan = step.plan(base, task)
        train = fw.recover.Train(epochs=epochs, lr=0.02, schedule="onecycle", autocast="bf16", channels_last=True,
                                 beside=by_parent(ends(depth)))
        for seed in seeds:
            self.add(f"resnet{depth} {fewer}x logits and features, seed {seed}",
                     lambda folder, s=seed: train.fit(plan.apply(base), task, Context(
                         original=base, workdir=folder, seed=s, plans=(plan,))),
                     task, arm="logits and features", seed=seed, epochs=epochs, fewer=fewer)

    def zeros(self) -> None:
        task, base = cifar10.task(), self.original(20)
        train = fw.recover.Train(epochs=10, lr=0.05, schedule="onecycle", autocast="bf16", channels_last=True,
                                 weight_decay=1e-4, during=(fw.prune.Weights(0.8, end=0.5),),
                                 beside=by_parent(ends(20, ("",))))
        for seed in self.seeds:
            self.add(f"resnet20 80 % zeros, logits and features, seed {seed}", lambda folder, s=seed: train.fit(
                base, task, Context(original=base, workdir=folder, seed=s)), task, seed=seed, epochs=10)

    def costs(self, rounds: int = 3) -> None:
        """Processor seconds of 10 steps of each arm, in turn, as the median ratio to plain training in the same round;
        the peak of memory that 4 steps ask for in a process of their own, as a ratio to plain training."""
        task, teacher, rows = subset(), self.original(56), Rows("distillation_costs.json")
        arms = [a for a in SMALL if a != "born again"]
        seconds: dict[str, list[float]] = {a: [] for a in arms}

        def train(arm: str, batches: int) -> float:
            fit = fw.recover.Train(epochs=1, batches=batches, lr=0.01, channels_last=True, beside=tuple(
                dataclasses.replace(b, cache=None) if isinstance(b, Logits) else b for b in SMALL[arm]))
            start = time.process_time()
            fit.fit(cifar10.network(8), task, Context(original=teacher))
            return time.process_time() - start

        for _ in range(rounds):
            for arm in arms:
                seconds[arm].append(train(arm, 10))
        peaks = {arm: peak(partial(train, arm, 4)) for arm in arms}
        for arm in arms:
            ratio = statistics.median(a / b for a, b in zip(seconds[arm], seconds["no teacher"], strict=True))
            rows.add(arm, {"time_ratio": ratio, "rounds": rounds, "peak_bytes": peaks[arm],
                           "memory_ratio": peaks[arm] / peaks["no teacher"]})
            print(f"costs {arm:30s} time {ratio:6.2f} memory {rows[arm]['memory_ratio']:6.2f}", flush=True)
        self.cached()

    def cached(self) -> None:
        """What the cache brings to images as they are, and to those that come mirrored half of the time."""
        rows, teacher = Rows("distillation_costs.json"), self.original(56)
        for name, task in (("cache, as they are", subset(mirrored=False)), ("cache, mirrored", subset())):
            if name not in rows:
                rows.add(name, {**cached(task, teacher), "epochs": 3, "images": IMAGES})
                print(name, rows[name], flush=True)


def peak(work: Callable[[], Any]) -> int:
    """Bytes by which a process grows while it works."""
    read, write = os.pipe()
    if not (child := os.fork()):
        before = high_water()
        work()
        os.write(write, str(high_water() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as file:
        return int(file.read())


def high_water() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def cached(task: fw.Task, teacher: fw.Network) -> dict[str, Any]:
    """The share of samples whose outputs were in the cache over three epochs, its bytes, and seconds an epoch beside
    those without a cache. (A batch of which one sample is new is asked of the teacher as a whole.)"""
    seen: dict[int, OutputCache] = {}
    ask = OutputCache.outputs

    def asked(cache: OutputCache, *given: Any, **more: Any) -> Any:
        seen[id(cache)] = cache
        return ask(cache, *given, **more)

    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        OutputCache.outputs = asked  # type: ignore[method-assign]
        for name in (None, folder):
            fit = fw.recover.Train(epochs=3, lr=0.01, channels_last=True, beside=(dataclasses.replace(KD, cache=name),))
            start = time.process_time()
            fit.fit(cifar10.network(8), task, Context(original=teacher))
            seconds["cached" if name else "asked anew"] = (time.process_time() - start) / 3
        OutputCache.outputs = ask  # type: ignore[method-assign]
        (cache,) = seen.values()
        return {"hit_rate": cache.hit_rate, "file_bytes": cache.file_bytes, "seconds_an_epoch": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("parts", nargs="*", help="all of them if none is named")
    given = parser.parse_args()
    bench = Bench(given.checkpoints, given.seeds)
    parts: dict[str, Callable[[], None]] = {
        "small": lambda: bench.small(list(SMALL)[:FIRST]), "small-more": lambda: bench.small(list(SMALL)[FIRST:]),
        "pruned": lambda: bench.pruned(20, 2.1, 8, given.seeds),
        "pruned-3x": lambda: bench.pruned(20, 3.0, 8, given.seeds),
        "pruned-56": lambda: bench.pruned(56, 2.1, 20, given.seeds[:1]), "zeros": bench.zeros,
        "costs": bench.costs, "cache": bench.cached}
    for part in given.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
