"""The example's photographs, score and trained network, in the place of yours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import featherweight as fw

EPOCHS, PATCHES, PATCH = 8, 600, 32


def psnr(predict: Any, batches: Iterable[Any]) -> float:
    """Peak signal-to-noise ratio in dB over all pixels."""
    error = pixels = 0.0
    for small, large in batches:
        error += float((fw.scores.main_output(predict(small)).clamp(0, 1) - large).square().sum())
        pixels += large.numel()
    return float(-10 * torch.tensor(error / pixels).log10())


def task() -> fw.Task:
    """Patches of one photograph to train, of the left half of the other to validate, of its right half to test."""
    from sklearn.datasets import load_sample_images

    china, flower = (torch.tensor(i).float().permute(2, 0, 1).mean(0, keepdim=True) / 255
                     for i in load_sample_images().images)

    def split(image: Tensor, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        tops = torch.randint(0, image.shape[1] - PATCH, (count,), generator=g).tolist()
        lefts = torch.randint(0, image.shape[2] - PATCH, (count,), generator=g).tolist()
        large = torch.stack([image[:, t:t + PATCH, x:x + PATCH] for t, x in zip(tops, lefts, strict=True)])
        small = nn.functional.avg_pool2d(large, 2)
        return list(zip(small.split(30), large.split(30), strict=True))

    half, training = flower.shape[2] // 2, split(china, PATCHES, 0)
    return fw.Task(train=training, calibration=training[:4], validation=split(flower[:, :, :half], PATCHES // 4, 1),
                   test=split(flower[:, :, half:], PATCHES // 4, 2), loss=nn.functional.mse_loss, score=psnr,
                   score_name="PSNR dB")


class Whole(nn.Module):
    """ESPCN (Shi et al. 2016): all at the small size, pixels shuffled at the end, added to the enlarged image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 5, 1, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(),
                                  nn.Conv2d(width, 4, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear") + self.body(x)


def trained() -> nn.Module:
    """The network, trained by a plain loop."""
    torch.manual_seed(0)
    model, data = Whole(), task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for x, y in data.batches("train"):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return model.eval()
