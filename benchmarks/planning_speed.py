"""How long planning takes, beside an older state of the code: seconds of the processor, one thread.

    python benchmarks/planning_speed.py --old SRC [--rounds 5] [JOB ...]

SRC: the ``src`` folder of another checkout (``git worktree add ../old v0.1.0`` makes one at ``../old/src``). The two
take turns, a process each; every process plans once, which counts as "first" (tables of torch fill), and then, where
plans are quick, some more times on networks that have not been asked anything yet, whose median counts as "fresh".
"agree" says whether both kept the same channels or laid the same grids.

resnet56: ``Channels(macs=0.5).plan``, ResNet-56. quantize: ``Quantize().plan`` and ``.apply``, the same network, 32
    images of 32 pixels to calibrate on.
detector, shuffled: ``Channels(macs=0.5, score="reconstruction", allocation="sensitivity",
    compensate="least_squares").plan`` for networks shaped like small detectors (0.24 M parameters, 352 pixels, random
    weights): MobileNetV2's blocks, or ShuffleNetV2's; a top-down path of sums and concatenations; heads at several
    sizes. 8 random images to calibrate on; "detector, 4 batches" has four times as many.

One row a job goes into benchmarks/results/planning_speed.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

SIZE = 352  #: pixels on a side of what the detectors see
CLASSES, ANCHORS = 20, 3


# ---- networks shaped like detectors

def conv(i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o),
                         *([nn.ReLU()] if act else []))


class Inverted(nn.Module):
    """MobileNetV2's block: wider, depthwise, narrow again; a sum where shapes allow one."""

    def __init__(self, i: int, o: int, stride: int, times: int) -> None:
        super().__init__()
        wide = i * times
        self.body = nn.Sequential(conv(i, wide), conv(wide, wide, 3, stride, wide), conv(wide, o, act=False))
        self.sums = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.sums else self.body(x)


class Shuffled(nn.Module):
    """ShuffleNetV2's block: half of the channels pass, all are shuffled; both halves are computed where it strides."""

    def __init__(self, i: int, o: int, stride: int, times: int) -> None:
        super().__init__()
        half, given = o // 2, i if stride == 2 else i // 2
        self.body = nn.Sequential(conv(given, half), conv(half, half, 3, stride, half, act=False), conv(half, half))
        self.short = nn.Sequential(conv(i, i, 3, 2, i, act=False), conv(i, o - half)) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.short is not None:
            return torch.cat([self.short(x), self.body(x)], 1)
        first, second = x.view(n, c // 2, 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
        return torch.cat([first, self.body(second)], 1)


class Head(nn.Module):
    """Two towers of depthwise and pointwise convolutions: classes, and boxes with how sure they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes, self.boxes = (nn.Sequential(
            conv(width, width, 5, groups=width), conv(width, width), conv(width, width, 5, groups=width),
            nn.Conv2d(width, o, 1)) for o in (CLASSES, 5 * ANCHORS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(x), self.boxes(x)


class Detector(nn.Module):
    """stages: (channels, blocks, stride); the last three give what the heads look at."""

    def __init__(self, block: type[nn.Module], stem: int, stages: list[tuple[int, int, int]], neck: int,
                 times: int = 4) -> None:
        super().__init__()
        self.stem, width = conv(3, stem, 3, 2), stem
        built = []
        for o, count, stride in stages:
            built.append(nn.Sequential(*(block(width if k == 0 else o, o, stride if k == 0 else 1, times)
                                         for k in range(count))))
            width = o
        self.stages = nn.ModuleList(built)
        self.lateral = nn.ModuleList(conv(o, neck) for o, _, _ in stages[-3:])
        self.smooth = nn.Sequential(conv(neck, neck, 3, groups=neck), conv(neck, neck))
        self.join = nn.Sequential(conv(2 * neck, neck), conv(neck, neck, 3, groups=neck), conv(neck, neck))
        self.heads = nn.ModuleList(Head(neck) for _ in range(3))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        seen = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            seen.append(x)
        low, middle, high = (lateral(s) for lateral, s in zip(self.lateral, seen[-3:], strict=True))
        middle = self.smooth(middle + F.interpolate(high, scale_factor=2.0))
        low = self.join(torch.cat([low, F.interpolate(middle, scale_factor=2.0)], 1))
        return [head(x) for head, x in zip(self.heads, (low, middle, high), strict=True)]


def inverted() -> nn.Module:
    return Detector(Inverted, 12, [(8, 1, 1), (12, 2, 2), (20, 3, 2), (32, 4, 2), (56, 3, 2)], 64)


def shuffled() -> nn.Module:
    return Detector(Shuffled, 24, [(24, 1, 2), (48, 4, 2), (96, 8, 2), (192, 4, 2)], 64)


def detection_loss(output: list[tuple[Tensor, Tensor]], target: Any) -> Tensor:
    """As if nothing were there: no class, no box."""
    return sum((F.binary_cross_entropy_with_logits(c, torch.zeros_like(c)) + b.square().mean() for c, b in output),
               start=torch.zeros(()))


def unsettled(model: nn.Module) -> nn.Module:
    """Random batch statistics, as a trained network's differ from channel to channel."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            assert module.running_mean is not None
            module.running_mean.normal_(std=0.1, generator=generator)
    return model.eval()


# ---- what is timed

@dataclass(frozen=True)
class Job:
    """A network, the images it is calibrated on and what is planned. repeats: plans of fresh networks after the
    first."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batches: int
    batch: int
    run: Callable[[fw.Network, fw.Task], Any]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    repeats: int = 0


def halved(network: fw.Network, task: fw.Task) -> Any:
    return fw.prune.Channels(macs=0.5).plan(network, task).keep


def quantized(network: fw.Network, task: fw.Task) -> Any:
    plan = fw.quantize.Quantize().plan(network, task)
    plan.apply(network)
    return [(p.node, p.scale, p.zero_point, p.readers) for p in plan.points]


def refit(network: fw.Network, task: fw.Task) -> Any:
    step = fw.prune.Channels(macs=0.5, score="reconstruction", allocation="sensitivity", compensate="least_squares")
    return step.plan(network, task).keep


WIDE = (3, SIZE, SIZE)
JOBS: dict[str, Job] = {
    "resnet56": Job(lambda: cifar10.ResNet(56), (3, 32, 32), 1, 32, halved, repeats=9),
    "quantize": Job(lambda: cifar10.ResNet(56), (3, 32, 32), 1, 32, quantized, repeats=9),
    "detector": Job(inverted, WIDE, 1, 8, refit, detection_loss),
    "detector, 4 batches": Job(inverted, WIDE, 4, 8, refit, detection_loss),
    "shuffled": Job(shuffled, WIDE, 1, 8, refit, detection_loss),
}


def timed(job: Job) -> dict[str, Any]:
    """Seconds of this process: of the first plan and of each later one, and a digest of what was decided."""
    torch.manual_seed(0)
    network = fw.capture(unsettled(job.make()), torch.randn(2, *job.shape))
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(job.batch, *job.shape, generator=generator), torch.zeros(job.batch, dtype=torch.long))
            for _ in range(job.batches)]
    task = fw.Task(calibration=lambda: data, loss=job.loss)
    seconds, decided = [], None
    for _ in range(job.repeats + 1):
        fresh = network.copy()
        start = time.process_time()
        decided = job.run(fresh, task)
        seconds.append(time.process_time() - start)
    return {"first": seconds[0], "fresh": seconds[1:], "parameters": sum(p.numel() for p in network.parameters()),
            "decided": hashlib.sha256(repr(decided).encode()).hexdigest()}


def measured(src: Path, name: str) -> dict[str, Any]:
    """The same in a process of its own, with the code in ``src``."""
    environment = {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "--measure", name], env=environment, check=True,
                          capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, ratios old / new within a round."""
    found: dict[str, Any] = {"rounds": len(rounds), "parameters": rounds[0][1]["parameters"],
                             "agree": all(a["decided"] == b["decided"] for a, b in rounds)}
    for which in ("first", "fresh"):
        pairs = np.array([[np.median(side[which]) for side in both] for both in rounds if both[0][which]])
        if len(pairs):
            ratios = pairs[:, 0] / pairs[:, 1]
            old, new, ratio = np.median(pairs[:, 0]), np.median(pairs[:, 1]), np.median(ratios)
            found[which] = {"old_s": round(float(old), 4), "new_s": round(float(new), 4),
                            "ratio": round(float(ratio), 2), "least": round(float(ratios.min()), 2),
                            "most": round(float(ratios.max()), 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--old", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=JOBS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        print(json.dumps(timed(JOBS[given.measure])))
        return
    if given.old is None or not (given.old / "featherweight").is_dir():
        parser.error(f"--old {given.old}: expected the src folder of another checkout, with featherweight in it")
    if unknown := set(given.jobs) - set(JOBS):
        parser.error(f"no job {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    from rows import Rows  # of this checkout alone: the older one's need not fit

    from featherweight.deploy.processor import saturates

    rows = Rows("planning_speed.json")
    for name in given.jobs or JOBS:
        found = row([(measured(given.old, name), measured(HERE.parent / "src", name)) for _ in range(given.rounds)])
        rows.add(name, {**found, "vnni": not saturates()})
        print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
