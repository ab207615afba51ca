"""The trained CIFAR-10 ResNets through the main job: float and int8 in the deployed file, and channels pruned.

    python benchmarks/cifar_resnets.py --checkpoints FOLDER [deployed] [channels] [latency]

deployed: ResNet-20 and ResNet-56, float and int8 after training, test top-1 of the file that ONNX Runtime runs.
channels: ResNet-56 at 2.1x fewer MACs, cut inside the blocks: L1 and random ranking, and L1 at widths in eights, with
    no retraining, with batch norm re-estimated, and after three epochs; beside them a thinner ResNet-56 of the same
    MACs trained from scratch for the same three epochs.
latency: the files of these ResNet-56 timed in the same rounds (the rows of one network each are not).

Every row goes into benchmarks/results/cifar_resnets.json as soon as it is measured; one that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rows import Rows

import featherweight as fw
from featherweight import deploy
from featherweight.measure import interleave, measure
from featherweight.steps import Context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
TARGET_MACS = 1 / 2.1
EPOCHS = 3
SEED = 0
THIN = (11, 21, 45)  #: stage widths of the thinner network


def retraining(epochs: int = EPOCHS, lr: float = 0.02) -> fw.recover.Train:
    return fw.recover.Train(epochs=epochs, lr=lr, schedule="onecycle", autocast="bf16", channels_last=True)


def add(rows: Rows, name: str, make: Callable[[], fw.Network], task: fw.Task) -> None:
    """Measures what ``make`` gives, unless there is a row of it."""
    if name in rows:
        return
    network = make()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(network, task, split="test", step=name, workdir=Path(folder)).to_dict()
    rows.add(name, {**row, "seed": SEED})
    latency = row["latency"]["median_s"] * 1e3
    print(f"{name:44s} {row['score']:6.2f} %  {row['macs'] / 1e6:7.2f} M MACs  {latency:6.3f} ms  "
          f"{row['file_bytes']:8d} B", flush=True)


def deployed_files(rows: Rows, task: fw.Task, checkpoints: Path) -> None:
    for depth, file in FILES.items():
        network = cifar10.network(depth, str(checkpoints / file))
        add(rows, f"resnet{depth} float", lambda n=network: n, task)
        add(rows, f"resnet{depth} int8", lambda n=network: fw.quantize.Quantize().plan(n, task).apply(n), task)


def cuts(base: fw.Network, task: fw.Task) -> dict[str, fw.Network]:
    """The network cut to TARGET_MACS in three ways."""
    found = {}
    for score, round_to in (("l1", 1), ("random", 1), ("l1 in eights", 8)):
        step = fw.prune.Channels(macs=TARGET_MACS, score=score.split()[0], residual=False, round_to=round_to)
        found[score] = step.plan(base, task).apply(base)
    return found


def thin() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(cifar10.ResNet(56, THIN), torch.zeros(2, 3, 32, 32))


def latency(rows: Rows, task: fw.Task, checkpoints: Path) -> None:
    base = cifar10.network(56, str(checkpoints / FILES[56]))
    int8 = fw.quantize.Quantize().plan(base, task).apply(base)
    networks = {"float": base, "int8": int8, "thin": thin()}
    networks |= {f"channels {k}": n for k, n in cuts(base, task).items()}
    runtime, sample = deploy.target("onnxruntime"), torch.zeros(1, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for name, network in networks.items():
            runtime.export(network, Path(folder, name))
            calls[name] = partial(runtime.load(Path(folder, name), like=network.signature), sample)
        timed = interleave(calls, seconds=20.0, threads=1, batch=1, runtime=runtime.name)
    original = timed["float"].median_s
    found = {name: {"median_ms": t.median_s * 1e3, "q1_ms": t.q1_s * 1e3, "q3_ms": t.q3_s * 1e3,
                         "rounds": t.rounds, "faster": original / t.median_s} for name, t in timed.items()}
    rows.add("same rounds", {"latency": found, "seed": SEED})
    print(json.dumps(found, indent=1))


def channels(rows: Rows, task: fw.Task, checkpoints: Path) -> None:
    base = cifar10.network(56, str(checkpoints / FILES[56]))
    context = Context(original=base)
    cut = cuts(base, task)
    for score in cut:
        add(rows, f"resnet56 channels {score}, no retraining", lambda s=score: cut[s], task)
        add(rows, f"resnet56 channels {score}, batch norm again",
            lambda s=score: fw.recover.BatchNorm().fit(cut[s], task, context), task)
    for score in cut:
        add(rows, f"resnet56 channels {score}, {EPOCHS} epochs",
            lambda s=score: retraining().fit(cut[s], task, context), task)

    add(rows, f"resnet56 thin {THIN} from scratch, {EPOCHS} epochs",
        lambda: retraining(lr=0.1).fit(thin(), task, context), task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("what", nargs="*", default=["deployed", "channels", "latency"])
    given = parser.parse_args()
    task, rows = cifar10.task(), Rows("cifar_resnets.json")
    for what in given.what:
        {"deployed": deployed_files, "channels": channels, "latency": latency}[what](rows, task, given.checkpoints)


if __name__ == "__main__":
    main()
