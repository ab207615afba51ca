"""The example's detector and its training, in the place of yours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import voc
from torch import Tensor, nn

import featherweight as fw

EPOCHS, BATCH, WIDTH, WIDE, HIGH, STRIDE = 80, 16, 16, 256, 192, 8
Targets = list[dict[str, Tensor]]


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Maps(nn.Module):
    """Images -> classes [n, k + 1, h / 8, w / 8], the last of them none, and sides [n, 4, h / 8, w / 8]: the logarithm
    of the distance to the left, upper, right and lower side of the box, in strides (FCOS, Tian et al. 2019)."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        w = WIDTH
        self.stage1 = nn.Sequential(conv(3, w, 2), conv(w, 2 * w, 2), conv(2 * w, 4 * w, 2), conv(4 * w, 4 * w))
        self.stage2 = nn.Sequential(conv(4 * w, 8 * w, 2), conv(8 * w, 8 * w))
        self.stage3 = nn.Sequential(conv(8 * w, 8 * w, 2), conv(8 * w, 8 * w))
        self.near, self.middle, self.far = (nn.Conv2d(i * w, 4 * w, 1) for i in (4, 8, 8))
        self.tower = nn.Sequential(conv(4 * w, 4 * w), conv(4 * w, 4 * w))
        self.classes, self.sides = nn.Conv2d(4 * w, kinds + 1, 3, 1, 1), nn.Conv2d(4 * w, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = self.stage1(x)
        two = self.stage2(one)
        up = self.middle(two) + F.interpolate(self.far(self.stage3(two)), scale_factor=2.0)
        y = self.tower(self.near(one) + F.interpolate(up, scale_factor=2.0))
        return {"classes": self.classes(y), "sides": self.sides(y)}


class Detector(nn.Module):
    """A network, and Python around it that no graph holds: how many boxes there are depends on the picture."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.maps = Maps(kinds)

    def forward(self, images: Tensor) -> Targets:
        return boxes(self.maps(images))


def places(maps: Tensor) -> Tensor:
    """x, y, x, y [4, h, w] of the middle of every place, in pixels."""
    y, x = torch.meshgrid(torch.arange(maps.shape[2]), torch.arange(maps.shape[3]), indexing="ij")
    return (torch.stack([x, y, x, y]) + 0.5) * STRIDE


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [n, m] of boxes [n, 4] and [m, 4]."""
    both = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0).prod(2)
    area = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return both / (area[0][:, None] + area[1] - both).clamp(min=1e-9)


def boxes(maps: dict[str, Tensor], least: float = 0.05, most: float = 0.5, count: int = 300) -> Targets:
    """For each image the boxes of scores above ``least``; of two of one class with an overlap above ``most`` the better
    one. The best ``count`` are looked at."""
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None, None]
    corners = places(maps["sides"]) + sign * maps["sides"].float().clamp(-4, 4).exp() * STRIDE
    found = []
    for scores, held in zip(maps["classes"].float().softmax(1)[:, :-1].flatten(2), corners.flatten(2), strict=True):
        best, index = scores.flatten().topk(min(count, scores.numel()))
        best, index = best[best > least], index[best > least]
        labels, box = index // scores.shape[1], held[:, index % scores.shape[1]].T
        near = (overlap(box, box) > most) & (labels[:, None] == labels)
        kept = torch.ones(len(best), dtype=torch.bool)
        for i in range(len(best)):
            kept[i + 1:] &= ~(near[i, i + 1:] & kept[i])
        found.append({"boxes": box[kept], "scores": best[kept], "labels": labels[kept]})
    return found


def assigned(target: dict[str, Tensor], maps: Tensor) -> tuple[Tensor, Tensor]:
    """Of every place its label [h, w] (-1: none) and the distances [4, h, w] to the sides of its box, in strides. A
    place within 1.5 strides of a box's middle belongs to it, to the smallest of several."""
    at, box = places(maps), target["boxes"][:, :, None, None]
    if not len(box):
        return torch.full(maps.shape[2:], -1), torch.ones_like(at)
    away = torch.cat([at[:2] - box[:, :2], box[:, 2:] - at[2:]], 1)
    middle = ((box[:, :2] + box[:, 2:]) / 2 - at[:2]).abs().amax(1)
    area = (box[:, 2:] - box[:, :2]).prod(1).expand(len(box), *at.shape[1:])
    area = torch.where((away.amin(1) > 0) & (middle < 1.5 * STRIDE), area, torch.inf)
    size, best = area.min(0)
    return (torch.where(size < torch.inf, target["labels"][best], -1),
            away.gather(0, best.expand(1, 4, *best.shape))[0] / STRIDE)


def loss(maps: dict[str, Tensor], targets: Targets) -> Tensor:
    """Focal cross entropy (Lin et al. 2017, gamma 2), and 1 - IoU of the boxes at the places that have one."""
    held = [assigned(target, maps["sides"]) for target in targets]
    labels, wanted = torch.stack([label for label, _ in held]), torch.stack([away for _, away in held])
    there, logits = labels >= 0, maps["classes"].float()
    logs = logits.log_softmax(1).gather(1, labels.where(there, torch.tensor(logits.shape[1] - 1))[:, None])[:, 0]
    given = maps["sides"].float().clamp(-4, 4).exp()
    both, one, two = ((d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3]) for d in (torch.minimum(given, wanted), given, wanted))
    apart = (1 - both / (one + two - both).clamp(min=1e-6)) * there
    return (apart.sum() - ((1 - logs.exp()).square() * logs).sum()) / there.sum().clamp(min=1)


def task() -> fw.Task:
    """Training, validation and test are the splits that the folder names; training images are mirrored at random."""
    place = voc.folder()
    held = {split: voc.read(place, split, WIDE, HIGH) for split in ("train", "val", "test")}

    def batches(split: str, training: bool = False) -> Iterator[tuple[Tensor, Targets]]:
        images, targets = held[split]
        order = torch.randperm(len(images)) if training else torch.arange(len(images))
        for index in order.split(BATCH):
            pairs = [mirrored(images[i], targets[i]) if training else (images[i], targets[i]) for i in index.tolist()]
            yield torch.stack([x for x, _ in pairs]).float() / 127.5 - 1, [t for _, t in pairs]

    def split(name: str, training: bool = False) -> Callable[[], Iterator[tuple[Tensor, Targets]]]:
        return partial(batches, name, training)

    return fw.Task.detection(train=split("train", True), calibration=split("train"), validation=split("val"),
                             test=split("test"), loss=loss, decode=boxes)


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Left and right changed half of the time, above and below too."""
    box = target["boxes"].clone()
    for axis, at, size in ((2, [2, 0], WIDE), (1, [3, 1], HIGH)):
        if torch.rand(()) < 0.5:
            image = image.flip(axis)
            box[:, sorted(at)] = size - box[:, at]
    return image, {**target, "boxes": box}


def trained() -> Detector:
    """The detector, trained by a plain loop."""
    torch.manual_seed(0)
    data, detector = task(), Detector(len(voc.names(voc.folder())))
    optimizer: Any = torch.optim.SGD(detector.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    steps = EPOCHS * sum(1 for _ in data.batches("calibration"))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(EPOCHS):
        for images, targets in data.batches("train"):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                found = detector.maps(images.contiguous(memory_format=torch.channels_last))
            loss(found, targets).backward()
            nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
            optimizer.step()
            rate.step()
    return detector.eval()
