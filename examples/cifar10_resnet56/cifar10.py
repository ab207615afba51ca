"""CIFAR-10 and its classic ResNets (He et al. 2016, section 4.2, option A shortcuts), as a job file names them.

``network(depth, weights)`` gives the trained model, ``task()`` the data: `cifar10.npz` with uint8 arrays x_train
[50000, 32, 32, 3], y_train, x_test, y_test, looked for in $FEATHERWEIGHT_DATA, else ~/.cache/featherweight/data.
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

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
VALIDATION = 5_000  #: training images kept from fine-tuning, to choose by


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(out + x)


class ResNet(nn.Module):
    """Depth 6n + 2 with ``widths`` channels in its three stages. Input [n, 3, 32, 32], normalised; output [n, 10]."""

    def __init__(self, depth: int = 20, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for stage, width in enumerate(widths, 1):
            layer = [Block(before if i == 0 else width, width, 2 if i == 0 and stage > 1 else 1) for i in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
            before = width
        self.linear = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def network(depth: int = 56, weights: str = "") -> fw.Network:
    """The ResNet of this depth, trained weights read from the file ``weights`` (state dict, keys may say "module.")."""
    return fw.capture(model(depth, weights), torch.zeros(2, 3, 32, 32))


def model(depth: int, weights: str = "") -> ResNet:
    """The module that ``network`` captures."""
    made = ResNet(depth)
    if weights:
        saved = torch.load(Path(weights).expanduser(), map_location="cpu", weights_only=True)
        state = {k.removeprefix("module."): v for k, v in saved.get("state_dict", saved).items()}
        missing, unexpected = made.load_state_dict(state, strict=False)
        wrong = [m for m in missing if not m.endswith("num_batches_tracked")] + list(unexpected)
        if wrong:
            raise SystemExit(f"{weights} does not hold a ResNet-{depth}: {wrong[:3]}")
    return made.eval()


def normalised(images: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] -> float32, as the weights were trained."""
    return (images.float() / 255 - MEAN) / STD


def arrays() -> dict[str, Tensor]:
    folder = Path(os.environ.get("FEATHERWEIGHT_DATA", Path.home() / ".cache/featherweight/data"))
    file = folder / "cifar10.npz"
    if not file.exists():
        raise SystemExit(f"{file} is not there: put CIFAR-10 there as uint8 arrays x_train, y_train, x_test, y_test")
    with np.load(file) as found:
        data = {name: torch.from_numpy(found[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    return {k: v.permute(0, 3, 1, 2).contiguous() if k.startswith("x") else v.long() for k, v in data.items()}


def task(batch: int = 128, calibration_images: int = 1024, train_images: int = 50_000 - VALIDATION) -> fw.Task:
    """Train (augmented by shifts and flips), calibration (from train), validation (kept from train) and test splits."""
    data = arrays()
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    kept, used = order[:VALIDATION], order[VALIDATION:][:train_images]
    padded = F.pad(data["x_train"][used], (4, 4, 4, 4))
    labels = data["y_train"][used]
    span = torch.arange(32)

    def train() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(labels)).split(batch):
            if len(index) < batch:
                return
            rows, columns = (torch.randint(0, 9, (len(index), 1)) + span for _ in range(2))
            columns = torch.where(torch.rand(len(index), 1) < 0.5, columns, columns.flip(1))
            crops = padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            yield normalised(crops.permute(0, 3, 1, 2)), labels[index]

    def plain(images: Tensor, targets: Tensor, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(targets), size):
            yield normalised(images[start : start + size]), targets[start : start + size]

    calibration = used[:calibration_images]
    return fw.Task(
        train=train,
        calibration=lambda: plain(data["x_train"][calibration], data["y_train"][calibration], 128),
        validation=lambda: plain(data["x_train"][kept], data["y_train"][kept]),
        test=lambda: plain(data["x_test"], data["y_test"]),
        loss=F.cross_entropy,
        score=fw.scores.top1,
        score_name="top-1 %",
    )
