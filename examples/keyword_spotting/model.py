"""The example's sounds and its trained network, in the place of yours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import featherweight as fw

EPOCHS, BATCHES, BATCH = 6, 30, 32


def sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log spectra [count, 33 frequencies, 61 times] of a second at 2 kHz, and which of four words it is."""
    g = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, 2000)
    words = torch.randint(0, 4, (count,), generator=g)
    low, span = 150 + 250 * torch.rand(count, 1, generator=g), 100 + 250 * torch.rand(count, 1, generator=g)
    slope = torch.tensor([1.0, -1.0, 0.0, 0.0])[words, None]
    phase = 6.2832 * (low * time + slope * span * time ** 2 / 2 + (slope < 0) * span * time)
    wave = torch.sin(phase) + (words == 2)[:, None] * torch.sin(6.2832 * (low + span) * time)
    wave = wave * (words != 3)[:, None] + 0.7 * torch.randn(count, 2000, generator=g)
    window = torch.hann_window(64)
    return torch.stft(wave, 64, 33, window=window, return_complex=True).abs().clamp(min=1e-3).log()[:, :, :61], words


def task() -> fw.Task:
    """Train, validation and test are drawn apart."""
    def split(batches: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        x, y = sounds(batches * BATCH, seed)
        return list(zip(x.split(BATCH), y.split(BATCH), strict=True))

    return fw.Task.classification(train=split(BATCHES, 0), validation=split(8, 1), test=split(8, 2))


class Spotter(nn.Module):
    """A convolution over the spectrum, a GRU over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(33, 48, 5, 2, 2, bias=False), nn.BatchNorm1d(48), nn.ReLU(),
                                  nn.Conv1d(48, 48, 5, 2, 2, bias=False), nn.BatchNorm1d(48), nn.ReLU())
        self.gru, self.head = nn.GRU(48, 48, batch_first=True), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.gru(self.conv(x).transpose(1, 2))
        return self.head(found[:, -1])


def optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=2e-3)


def trained() -> nn.Module:
    """The network, trained by a plain loop."""
    torch.manual_seed(0)
    model, data = Spotter(), task()
    steps = optimizer(model)
    for _ in range(EPOCHS):
        for x, y in data.batches("train"):
            steps.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            steps.step()
    return model.eval()
