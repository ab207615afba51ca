"""ResNet-20 on CIFAR-10 (91.73 %) as chains of smaller layers, beside plain SVD and our own channel pruning.

    python benchmarks/low_rank.py --checkpoints FOLDER [PART ...]

at-once: no retraining, 17 % and 30 % fewer parameters, 1,024 training images to fit to: ``LowRank(params=...,
    form="auto", data=True)``; the same without data; SVD of im2col and Tucker-2 at the energy that leaves as many
    parameters; ``Channels`` at the MACs that the first left.
trained: 60 % fewer parameters and 55 % fewer MACs, 15 epochs taught by the original's outputs; and by the ends of its
    blocks as well.

tensorly-torch: its factorized convolutions of the same weights, CP and Tucker, at as many parameters; needs that
    package.

scratch: a fresh ResNet-20 on 5,000 images, dense for 6 epochs, beside one that is factorized at 45 % of its MACs after
    an epoch of warm-up and trained on under Frobenius decay: as many epochs, and as many as fit into the processor time
    of the dense training.

gate: no retraining, 70 % and half of the calls' latency in ONNX Runtime: what calls and chains alone are told to take
    of the original's, and what the file takes, one thread, batch 1, interleaved.

dense: a linear layer of 4096 x 4096 whose singular values fall as j^-0.7, at the rank that keeps 95 % of the energy, in
    float and int8; linear layers of 1024 and 4096 as structured matrices; in ONNX Runtime and OpenVINO, one thread,
    batch 1, interleaved with the dense layer.

The forms and ranks are chosen by calibration data, which are training images; the test images are scored once a row.
Every row goes into benchmarks/results/low_rank.json as soon as it is measured; one that is there is not run again, and
a training that was stopped goes on from its checkpoint in out/low_rank.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import nn

import featherweight as fw
from featherweight import deploy, measure
from featherweight.factorize.times import LinkTimes
from featherweight.steps import Context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

POINTS = (0.83, 0.7)  #: parameters that remain
SHARES = (0.7, 0.5)  #: of the calls' latency that remain
EPOCHS = 15
#: where the factorized network is held against the original: the end of every block
BLOCKS = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))
WORK = HERE.parent / "out/low_rank"
Make = Callable[[], fw.Network]


class Bench:
    def __init__(self, checkpoints: Path) -> None:
        self.task = cifar10.task(calibration_images=1024)
        self.rows = Rows("low_rank.json")
        self.file = str(checkpoints / "resnet20-12fca82f.th")
        self.base = cifar10.network(20, self.file)

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

    def tensorly_torch(self) -> None:
        """One relative rank for the convolutions of all blocks, found by bisection."""
        for params, form in itertools.product(POINTS, ("cp", "tucker")):
            name = f"resnet20 params={params} tensorly-torch, {form}"
            if name in self.rows:
                continue
            start, low, high = time.perf_counter(), 0.05, 1.0
            for _ in range(8):
                rank = (low + high) / 2
                small = parameters(theirs(self.file, form, rank, False)) <= params * measure.params(self.base)
                low, high = (rank, high) if small else (low, rank)
            made = theirs(self.file, form, low, True)
            row = {"params": parameters(made), "rank": low, "params_before": measure.params(self.base),
                   "seconds": time.perf_counter() - start,
                   "top1": self.task.score(made, self.task.batches("test"))}  # type: ignore[misc]
            self.rows.add(name, row)
            print(f"{name:44s} {row['top1']:6.2f} %  {1 - row['params'] / row['params_before']:6.1%} fewer params")

    def trained(self, epochs: int = EPOCHS) -> None:
        train = fw.recover.Train(epochs=epochs, lr=0.05, schedule="onecycle", autocast="bf16", channels_last=True,
                                 distill=fw.distill.Logits(temperature=4.0))
        name = f"resnet20 params=0.4, macs=0.45 auto, data, {epochs} epochs"
        folder = WORK / name.replace(" ", "_").replace(",", "")
        self.add(name, lambda: train.fit(self.low_rank(params=0.4, macs=0.45, form="auto", data=True), self.task,
                                         Context(original=self.base, workdir=folder)), epochs=epochs)
        taught = replace(train, distill=None, beside=(
            fw.distill.Logits(temperature=4.0), fw.distill.Features("hint", weight=0.2, taps=BLOCKS)))
        self.add(f"{name}, features", lambda: taught.fit(
            self.low_rank(params=0.4, macs=0.45, form="auto", data=True), self.task,
            Context(original=self.base, workdir=folder.with_name(f"{folder.name}_features"))), epochs=epochs)

    def scratch(self, epochs: int = 6, images: int = 5_000) -> None:
        if "resnet20 from scratch, dense" in self.rows:
            return
        task = cifar10.task(train_images=images)
        train = fw.recover.Train(epochs=epochs, lr=0.1, schedule="onecycle", autocast="bf16", channels_last=True)
        decayed = replace(train, weight_decay=0.0, beside=(fw.factorize.FrobeniusDecay(5e-4),))
        torch.manual_seed(0)
        fresh = cifar10.network(20)

        def add(name: str, how: fw.recover.Train, network: fw.Network, before: float, **facts: Any) -> float:
            start = time.process_time()
            made = how.fit(network, task, Context())
            seconds = time.process_time() - start
            row = {"epochs": how.epochs, "images": images, "seconds_an_epoch": seconds / how.epochs,
                   "processor_s": before + seconds, "params": measure.params(made), "macs": measure.macs(made).total,
                   "validation": task.score(made, task.batches("validation")),  # type: ignore[misc]
                   "top1": task.score(made, task.batches("test")), **facts}  # type: ignore[misc]
            self.rows.add(f"resnet20 from scratch, {name}", row)
            print(name, row, flush=True)
            return seconds

        start = time.process_time()
        warm = replace(train, epochs=1, schedule="constant", lr=0.05).fit(fresh, task, Context())
        step = fw.factorize.LowRank(macs=0.45, form="auto", how="error", round_to=4)
        thin = step.plan(warm, task).apply(warm)
        warmed = time.process_time() - start
        dense = add("dense", train, fresh, 0.0)
        same = add("factorized after 1 epoch, as many epochs", replace(decayed, epochs=epochs - 1), thin, warmed)
        more = int((dense - warmed) / (same / (epochs - 1)))
        add("factorized after 1 epoch, equal time", replace(decayed, epochs=max(1, more)), thin, warmed)

    # ---- speed
    def gate(self, seconds: float = 2.0) -> None:
        runtime, image = deploy.target("onnxruntime"), torch.zeros(1, 3, 32, 32)
        for share in SHARES:
            name = f"resnet20 latency={share} auto, data"
            if name in self.rows:
                continue
            made = self.low_rank(latency=share, form="auto", data=True)
            with tempfile.TemporaryDirectory() as folder:
                calls = {}
                for arm, network in (("whole", self.base), ("made", made)):
                    runtime.export(network, file := Path(folder, f"{arm}.onnx"))
                    calls[arm] = partial(runtime.load(file, like=network.signature), image)
                timed = measure.interleave(calls, seconds=seconds, threads=1, batch=1, runtime="onnxruntime")
            clock = LinkTimes.of(self.base, "onnxruntime")
            self.add(name, lambda m=made: m, calls_told=clock.factorized(made) / clock.total(),
                     latency=timed["made"].median_s / timed["whole"].median_s, calls_s=clock.total(),
                     whole_s=timed["whole"].median_s)

    def dense(self) -> None:
        for width in (1024, 4096):
            dense = linear(width)
            forms: dict[str, fw.steps.Rewrite] = {
                "LowRank energy=0.95": fw.factorize.LowRank(energy=0.95),
                **{f"Structured {form}": fw.factorize.Structured(form, blocks=16 if form == "kronecker" else 32)
                   for form in ("monarch", "kronecker", "circulant", "fourier")}}
            small = {name: step.plan(dense, fw.Task()).apply(dense) for name, step in forms.items()}
            int8 = fw.quantize.Quantize("int8", activations="dynamic", ends=None)
            task = fw.Task(calibration=[(torch.randn(16, width), torch.zeros(16))])
            small["int8"] = int8.plan(dense, task).apply(dense)
            thin = small["LowRank energy=0.95"]
            small["LowRank energy=0.95, int8"] = int8.plan(thin, task).apply(thin)
            for target in ("onnxruntime", "openvino"):
                timed(self.rows, f"linear {width} {target}", {"dense": dense, **small}, target)


def timed(rows: Rows, name: str, networks: dict[str, fw.Network], target: str, **facts: Any) -> None:
    """One thread, batch 1, all arms in turn; the first of them is what the others are compared with.

    processor_s: the median of the seconds that the processor worked for a call, which others on the machine disturb
    less; faster: by these; ratio: the median of ratios of seconds in the same round.
    """
    if name in rows:
        return
    runtime, runners, worked = deploy.target(target), {}, {arm: list[float]() for arm in networks}
    first = next(iter(networks))
    x = networks[first].example_inputs(1)[0]

    def work(arm: str) -> None:
        began = time.process_time()
        runners[arm](*x)
        worked[arm].append(time.process_time() - began)

    with tempfile.TemporaryDirectory() as folder:
        for i, (arm, network) in enumerate(networks.items()):
            file = Path(folder) / f"{i}{runtime.suffix}"
            runtime.export(network, file)
            runners[arm] = runtime.load(file, 1, like=network.signature)
        found = measure.side_by_side({arm: partial(work, arm) for arm in networks}, seconds=1.5 * len(runners))
        for runner in runners.values():
            runner.close()
    processor = {arm: statistics.median(seconds) for arm, seconds in worked.items()}
    row = {arm: {"median_s": found.latencies[arm].median_s, "q1_s": found.latencies[arm].q1_s,
                 "q3_s": found.latencies[arm].q3_s, "processor_s": processor[arm],
                 "faster": processor[first] / processor[arm], "ratio": found.ratio(first, arm).median,
                 "params": measure.params(network), "macs": measure.macs(network).total}
           for arm, network in networks.items()}
    rows.add(name, {"arms": row, "waiting": found.latencies[first].waiting, **facts})
    for arm, one in row.items():
        print(f"{name:24s} {arm:28s} {1e3 * one['processor_s']:8.3f} ms  {one['faster']:5.2f}x "
              f"(in rounds {one['ratio']:5.2f}x)", flush=True)


def linear(width: int) -> fw.Network:
    """A linear layer whose singular values fall as j^-0.7, near those of trained layers."""
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in range(2)]
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(turns[0] * torch.arange(1.0, width + 1) ** -0.7 @ turns[1])
    return fw.capture(layer.eval(), torch.randn(2, width))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def theirs(weights: str, form: str, rank: float, decompose: bool) -> nn.Module:
    """ResNet-20 with the convolutions of its blocks as tensorly-torch has them, at a rank relative to the whole."""
    from tltorch import FactorizedConv

    torch.manual_seed(0)
    model = cifar10.model(20, weights)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and name.startswith("layer"):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, FactorizedConv.from_conv(
                module, rank=rank, factorization=form, implementation="factorized", decompose_weights=decompose))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("parts", nargs="*", help="all of them if none is named")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.checkpoints)
    parts: dict[str, Callable[[], None]] = {"at-once": bench.at_once, "trained": bench.trained,
                                            "tensorly-torch": bench.tensorly_torch,
                                            "scratch": bench.scratch, "gate": bench.gate, "dense": bench.dense}
    for part in given.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
