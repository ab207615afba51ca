"""The example's pictures and its trained network, in the place of yours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import featherweight as fw

EPOCHS, BATCHES, BATCH, SIZE, WIDTH = 6, 24, 16, 32, 16


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [count, 1, 32, 32] and maps of 0 ground, 1 disc, 2 square."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    maps = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for kind in (1, 2):
        cx, cy = torch.randint(6, SIZE - 6, (2, count, 1, 1), generator=g)
        r = torch.randint(4, 8, (count, 1, 1), generator=g)
        inside = (x - cx) ** 2 + (y - cy) ** 2 <= r ** 2 if kind == 1 else ((x - cx).abs() <= r) & ((y - cy).abs() <= r)
        maps[inside] = kind
    bright = torch.tensor([0.0, 0.8, 0.8])[maps] + 0.25 * torch.randn(count, SIZE, SIZE, generator=g)
    return bright[:, None], maps


def task() -> fw.Task:
    """Train, validation and test are drawn apart."""
    def split(batches: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        x, y = pictures(batches * BATCH, seed)
        return list(zip(x.split(BATCH), y.split(BATCH), strict=True))

    training = split(BATCHES, 0)
    return fw.Task.segmentation(train=training, calibration=training[:8], validation=split(6, 1), test=split(6, 2))


def double(i: int, o: int) -> nn.Sequential:
    """Two convolutions."""
    return nn.Sequential(nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                         nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class UNet(nn.Module):
    """Down twice, up twice, with what was there before beside it (Ronneberger et al. 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = double(1, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up_b, self.up_a = (nn.ConvTranspose2d(2 * w, w, 2, 2) for w in (2 * width, width))
        self.d, self.e, self.head = double(4 * width, 2 * width), double(2 * width, width), nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(nn.functional.max_pool2d(a, 2))
        c = self.c(nn.functional.max_pool2d(b, 2))
        d = self.d(torch.cat([self.up_b(c), b], 1))
        return self.head(self.e(torch.cat([self.up_a(d), a], 1)))


def trained() -> nn.Module:
    """The network, trained by a plain loop."""
    torch.manual_seed(0)
    model, data = UNet(WIDTH), task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for x, y in data.batches("train"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()
