"""The demo's model and data: a small residual network on scikit-learn's handwritten digits (8 x 8 pixels)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.errors import TaskError
from featherweight.task import Split, Task, scores

#: samples of each split; 1797 digits in all, shuffled once with a fixed seed
SIZES = {"train": 1077, "calibration": 120, "validation": 300, "test": 300}
BATCH = 64


@cache
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> images [n, 1, 8, 8] in 0..1 and labels [n]. Raises TaskError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError("the demo's data comes with scikit-learn, which is not installed; write "
                        "pip install 'featherweight[demo]'") from error
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16.0
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    parts = list(SIZES.values())
    return dict(zip(SIZES, zip(torch.split(images, parts), torch.split(labels, parts), strict=True), strict=True))


class _Training(Sequence[tuple[Tensor, Tensor]]):
    """One pass over the shuffled train split, every image moved by up to one pixel."""

    def __init__(self) -> None:
        self.images, self.labels = digits()["train"]
        self.order = torch.randperm(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels) // BATCH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if index >= len(self):
            raise IndexError(index)
        chosen = self.order[index * BATCH:(index + 1) * BATCH]
        down, right = (int(i) for i in torch.randint(0, 3, (2,)))
        return F.pad(self.images[chosen], (1, 1, 1, 1))[:, :, down:down + 8, right:right + 8], self.labels[chosen]


def _pass(split: str) -> Split:
    def start() -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = digits()[split]
        return zip(torch.split(images, 100), torch.split(labels, 100), strict=True)

    return start


def task() -> Task:
    """Digits as a Task: 1077 to train, 120 to calibrate, 300 to validate, 300 to test."""
    digits()
    return Task(train=_Training, calibration=_pass("calibration"), validation=_pass("validation"), test=_pass("test"),
                loss=F.cross_entropy, score=scores.top1, score_name="top-1 %")


class DigitsBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, a 1 x 1 convolution where the shape changes (He et al. 2016)."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut = nn.Sequential() if i == o else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False),
                                                                     nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network of eight convolutions for images [n, 1, 8, 8]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(DigitsBlock(width, width), DigitsBlock(width, 2 * width, 2),
                                    DigitsBlock(2 * width, 2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return out


def model() -> DigitNet:
    """The untrained network, always with the same first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DigitNet()
