"""MNIST and its two classic networks, LeNet-300-100 and Caffe's LeNet-5, as a job file names them.

``network(name)`` gives an untrained network, ``task()`` the data: `mnist.npz` with uint8 arrays x_train
[60000, 28, 28], y_train, x_test, y_test, looked for in $FEATHERWEIGHT_DATA, else ~/.cache/featherweight/data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw

VALIDATION = 5_000  #: training images kept from training, to choose by


def lenet_300_100() -> nn.Module:
    """266,610 parameters (LeCun et al. 1998; Han et al. 2016, table 1)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                         nn.Linear(100, 10))


def lenet_5() -> nn.Module:
    """Caffe's LeNet-5 with 431,080 parameters, as Deep Compression counts it."""
    return nn.Sequential(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


NETWORKS = {"lenet_300_100": lenet_300_100, "lenet_5": lenet_5}


def network(name: str = "lenet_300_100", seed: int = 0) -> fw.Network:
    """The network with fresh weights."""
    torch.manual_seed(seed)
    return fw.capture(NETWORKS[name]().eval(), torch.zeros(2, 1, 28, 28))


def pixels(images: Tensor) -> Tensor:
    """uint8 [n, 28, 28] -> float32 [n, 1, 28, 28], 0..1."""
    return images[:, None].float() / 255


def arrays() -> dict[str, Tensor]:
    folder = Path(os.environ.get("FEATHERWEIGHT_DATA", Path.home() / ".cache/featherweight/data"))
    file = folder / "mnist.npz"
    if not file.exists():
        raise SystemExit(f"{file} is not there: put MNIST there as uint8 arrays x_train, y_train, x_test, y_test")
    with np.load(file) as found:
        data = {name: torch.from_numpy(found[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    return {k: v if k.startswith("x") else v.long() for k, v in data.items()}


def task(batch: int = 128, shift: int = 1) -> fw.Task:
    """Train (shifted by up to ``shift`` pixels), calibration (of train), validation (kept from train), test splits."""
    data = arrays()
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    kept, used = order[:VALIDATION], order[VALIDATION:]
    padded, labels, span = F.pad(data["x_train"][used], (shift,) * 4), data["y_train"][used], torch.arange(28)

    def train() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(labels)).split(batch):
            if len(index) < batch:
                return
            rows, columns = (torch.randint(0, 2 * shift + 1, (len(index), 1)) + span for _ in range(2))
            yield pixels(padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]), labels[index]

    def plain(images: Tensor, targets: Tensor, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(targets), size):
            yield pixels(images[start : start + size]), targets[start : start + size]

    return fw.Task(
        train=train,
        calibration=lambda: plain(data["x_train"][used[:2000]], data["y_train"][used[:2000]]),
        validation=lambda: plain(data["x_train"][kept], data["y_train"][kept]),
        test=lambda: plain(data["x_test"], data["y_test"]),
        loss=F.cross_entropy,
        score=fw.scores.top1,
        score_name="top-1 %",
    )
