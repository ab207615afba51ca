"""The example's series and its trained network, in the place of yours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import featherweight as fw

EPOCHS, COUNT, PAST, AHEAD = 8, 2400, 96, 12


def task() -> fw.Task:
    """A day, a week, a slow wave, and noise; windows in the order of time, the last ones for the test."""
    g = torch.Generator().manual_seed(0)
    t = torch.arange(COUNT + PAST + AHEAD)
    series = (torch.sin(6.2832 * t / 24) + 0.5 * torch.sin(6.2832 * t / 168) + 0.3 * torch.sin(t / 311)
              + 0.15 * torch.randn(len(t), generator=g))
    windows = series.unfold(0, PAST + AHEAD, 1)[:COUNT]
    x, y = windows[:, None, :PAST], windows[:, PAST:]

    def split(start: float, end: float) -> list[tuple[Tensor, Tensor]]:
        chosen = slice(int(start * COUNT), int(end * COUNT))
        return list(zip(x[chosen].split(64), y[chosen].split(64), strict=True))

    return fw.Task.regression(train=split(0, 0.7), validation=split(0.75, 0.85), test=split(0.9, 1.0))


class Forecast(nn.Module):
    """Dilated convolutions, each looking twice as far back."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(part for i in range(5) for part in (
            nn.Conv1d(1 if i == 0 else width, width, 3, dilation=2 ** i, padding=2 ** i), nn.ReLU())))
        self.head = nn.Linear(2 * width, AHEAD)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layers(x)
        return self.head(torch.cat([found[:, :, -1], found.mean(2)], 1))


def trained() -> nn.Module:
    """The network, trained by a plain loop."""
    torch.manual_seed(0)
    model, data = Forecast(), task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for x, y in data.batches("train"):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return model.eval()
