"""The example's folder of images and its trained model, in the place of yours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

import featherweight as fw

FOLDER, COUNT, EPOCHS, SIZE = Path("images"), 150, 6, 64
#: pattern -> its wave over turned coordinates and the distance from a middle, all in periods
PATTERNS = {"stripes": lambda u, v, far: np.sin(u), "checks": lambda u, v, far: np.sin(u) * np.sin(v),
            "rings": lambda u, v, far: np.sin(far), "dots": lambda u, v, far: np.maximum(np.sin(u) * np.sin(v), 0.3),
            "waves": lambda u, v, far: np.sin(u + 2 * np.sin(v / 2)), "rays": lambda u, v, far: np.sin(
                8 * np.arctan2(v, u))}


def draw() -> None:
    """Writes noisy patterns in two colours, one folder a kind."""
    from PIL import Image

    r = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    for kind, wave in PATTERNS.items():
        (FOLDER / kind).mkdir(parents=True, exist_ok=True)
        for number in range(COUNT):
            turn, period, (cx, cy) = r.uniform(0, np.pi), r.uniform(1.5, 3), r.uniform(0.2, 0.8, 2) * SIZE
            u, v = ((x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)) / period, (
                (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / period
            shade = wave(u, v, np.hypot(u, v))[..., None]
            image = 128 + shade * r.choice([-1, 1]) * r.uniform(30, 70, 3) + r.uniform(-40, 40, 3)
            image += r.normal(0, 25, image.shape)
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(FOLDER / kind / f"{number}.png")


def trained() -> nn.Module:
    """torchvision's ResNet-18 with six classes, trained by a plain loop; writes the images."""
    if not FOLDER.exists():
        draw()
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=len(PATTERNS))
    data, optimizer = fw.task.images(FOLDER, size=SIZE, resize=SIZE), torch.optim.AdamW(model.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for images, classes in data.batches("train"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
        rate.step()
    return model.eval()
