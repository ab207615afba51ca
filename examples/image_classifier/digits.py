"""The example's images and its trained network, in the place of yours."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import featherweight as fw

FOLDER, COUNT, EPOCHS, WIDTH = Path("images"), 1797, 12, 32


def folder_of_images() -> fw.Task:
    """Writes scikit-learn's digits into one folder a class, and reads them as any such folder is read."""
    from PIL import Image
    from sklearn.datasets import load_digits

    held = load_digits()
    for number, (pixels, label) in enumerate(zip(held.images[:COUNT], held.target[:COUNT], strict=True)):
        file = FOLDER / str(label) / f"{number}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9375).astype("uint8")).save(file)
    return fw.task.images(FOLDER, size=8, resize=8, mean=[0.3], std=[0.37], mirror=False, batch=64)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def trained() -> nn.Module:
    """The network, trained by a plain loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, WIDTH, 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), Block(WIDTH),
                          nn.MaxPool2d(2), Block(WIDTH), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
    task, optimizer = folder_of_images(), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for images, classes in task.batches("train"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
    return model.eval()
