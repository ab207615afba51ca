"""The example's table and its trained network, in the place of yours."""

from __future__ import annotations

import csv

import torch
from torch import nn

import featherweight as fw

EPOCHS = 30


def rows() -> fw.Task:
    """Writes the table as rows.csv, and reads it as any such file is read."""
    from sklearn.datasets import load_breast_cancer

    held = load_breast_cancer()
    with open("rows.csv", "w", newline="", encoding="utf-8") as file:
        table = ([*map(float, row), int(label)] for row, label in zip(held.data, held.target, strict=True))
        csv.writer(file).writerows([[*held.feature_names, "malignant"], *table])
    return fw.task.table("rows.csv", "malignant", batch=32)


def trained() -> nn.Module:
    """The network, trained by a plain loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
    task, optimizer = rows(), torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(EPOCHS):
        for x, y in task.batches("train"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()
