"""What is distilled beside classification of images: a detector, a segmenter and a small transformer, with their data.

Detection: BCCD (blood cells, 364 photographs in VOC's form, 3 classes, its own split 205 / 87 / 72), at 256 x 192, by
an anchor-free detector of one stage and one scale (FCOS, Tian et al. 2019). Segmentation: 64 x 64 drawings of
overlapping shapes in noise, 4 classes and the ground. Text: the snippets of Hutto and Gilbert 2014 (films, goods, news,
tweets; the archive of the package vaderSentiment holds them), liked or not, by a transformer on words.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw

Batch = tuple[Any, Any]


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def batches(count: int, size: int, make: Callable[[Tensor], Batch], shuffled: bool) -> Iterator[Batch]:
    order = torch.randperm(count) if shuffled else torch.arange(count)
    for index in order.split(size):
        yield make(index)


# ---- detection
WIDE, HIGH, STRIDE, MOST = 256, 192, 8, 40
CELLS = ("RBC", "WBC", "Platelets")


class Detector(nn.Module):
    """Images [n, 3, 192, 256] -> classes [n, 4, 24, 32], the last of them none, and boxes [n, 4, 24, 32]: the logarithm
    of the distances to the left, upper, right and lower side, in strides."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(conv(3, w, 2), conv(w, 2 * w, 2))
        self.stage1 = nn.Sequential(conv(2 * w, 4 * w, 2), conv(4 * w, 4 * w))
        self.stage2 = nn.Sequential(conv(4 * w, 8 * w, 2), conv(8 * w, 8 * w))
        self.stage3 = nn.Sequential(conv(8 * w, 8 * w, 2), conv(8 * w, 8 * w))
        self.lateral1, self.lateral2, self.lateral3 = (nn.Conv2d(i, 4 * w, 1) for i in (4 * w, 8 * w, 8 * w))
        self.neck = conv(4 * w, 4 * w)
        self.tower = nn.Sequential(conv(4 * w, 4 * w), conv(4 * w, 4 * w))
        self.classes, self.boxes = nn.Conv2d(4 * w, len(CELLS) + 1, 3, 1, 1), nn.Conv2d(4 * w, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = self.stage1(self.stem(x))
        two = self.stage2(one)
        three = self.stage3(two)
        down = self.lateral2(two) + F.interpolate(self.lateral3(three), scale_factor=2.0)
        y = self.tower(self.neck(self.lateral1(one) + F.interpolate(down, scale_factor=2.0)))
        return {"classes": self.classes(y), "boxes": self.boxes(y)}


def bccd(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 3, 192, 256] and boxes [n, 40, 5]: class (-1: no box), left, top, right, bottom in pixels."""
    from PIL import Image

    names = (folder / f"ImageSets/Main/{split}.txt").read_text().split()
    images, boxes = [], torch.full((len(names), MOST, 5), -1.0)
    for n, name in enumerate(names):
        picture = Image.open(folder / f"JPEGImages/{name}.jpg").convert("RGB")
        scale = WIDE / picture.width, HIGH / picture.height
        images.append(torch.from_numpy(np.array(picture.resize((WIDE, HIGH)))).permute(2, 0, 1))
        for k, thing in enumerate(ElementTree.parse(folder / f"Annotations/{name}.xml").findall("object")[:MOST]):
            sides = [float(thing.findtext(f"bndbox/{side}", "0")) for side in ("xmin", "ymin", "xmax", "ymax")]
            boxes[n, k] = torch.tensor([CELLS.index(thing.findtext("name", "")), sides[0] * scale[0],
                                        sides[1] * scale[1], sides[2] * scale[0], sides[3] * scale[1]])
    return torch.stack(images), boxes


def centres() -> tuple[Tensor, Tensor]:
    """x [24, 32] and y [24, 32] of the places, in pixels."""
    y, x = torch.meshgrid(torch.arange(HIGH // STRIDE), torch.arange(WIDE // STRIDE), indexing="ij")
    return (x + 0.5) * STRIDE, (y + 0.5) * STRIDE


def assigned(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of boxes [n, m, 5]: each place's class [n, 24, 32] (3: none), distances [n, 4, 24, 32] in strides, and whether it
    lies in a box at all. A place within 1.5 strides of a box's centre belongs to it, to the smallest of several."""
    x, y = centres()
    kind, sides = boxes[..., 0], boxes[..., 1:, None, None]
    away = torch.stack([x - sides[:, :, 0], y - sides[:, :, 1], sides[:, :, 2] - x, sides[:, :, 3] - y], 2)
    there = (kind >= 0)[..., None, None]
    inside = (away.amin(2) > 0) & there
    middle = torch.stack([(sides[:, :, 0] + sides[:, :, 2]) / 2 - x, (sides[:, :, 1] + sides[:, :, 3]) / 2 - y], 2)
    near = inside & (middle.abs().amax(2) < 1.5 * STRIDE)
    area = torch.where(near, ((sides[:, :, 2] - sides[:, :, 0]) * (sides[:, :, 3] - sides[:, :, 1])), torch.inf)
    best = area.argmin(1, keepdim=True)
    classes = torch.where(near.any(1), kind.long().gather(1, best.flatten(1)).view(best.shape).squeeze(1), len(CELLS))
    distances = away.gather(1, best.unsqueeze(2).expand(-1, -1, 4, -1, -1)).squeeze(1) / STRIDE
    return classes, distances, inside.any(1)


def detection_loss(output: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """Focal cross entropy (Lin et al. 2017, gamma 2) and 1 - IoU of the boxes, over the places that have one."""
    classes, distances, _ = assigned(boxes)
    positive = classes < len(CELLS)
    logs = output["classes"].float().log_softmax(1).gather(1, classes[:, None])[:, 0]
    count = positive.sum().clamp(min=1)
    focal = -((1 - logs.exp()).square() * logs).sum() / count
    given = output["boxes"].float().clamp(-4, 4).exp()
    overlap = torch.minimum(given, distances)
    inter = (overlap[:, 0] + overlap[:, 2]) * (overlap[:, 1] + overlap[:, 3])
    size = [(d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3]) for d in (given, distances)]
    iou = inter / (size[0] + size[1] - inter).clamp(min=1e-6)
    return focal + ((1 - iou) * positive).sum() / count


def found_boxes(output: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """For each image the boxes of scores above 0.05, at most 100, none over another of its class by an IoU of 0.5."""
    x, y = centres()
    scores, away = output["classes"].float().softmax(1)[:, :-1], output["boxes"].float().clamp(-4, 4).exp() * STRIDE
    corners = torch.stack([x - away[:, 0], y - away[:, 1], x + away[:, 2], y + away[:, 3]], -1).flatten(1, 2)
    results = []
    for score, box in zip(scores.flatten(2), corners, strict=True):
        kind, place = (score > 0.05).nonzero(as_tuple=True)
        order = score[kind, place].argsort(descending=True)
        kind, place, kept = kind[order], place[order], []
        for k in range(len(kind)):
            if len(kept) < 100 and not any(kind[j] == kind[k] and overlap(box[place[j]], box[place[k]]) > 0.5
                                           for j in kept):
                kept.append(k)
        results.append({"boxes": box[place[kept]], "scores": score[kind[kept], place[kept]], "labels": kind[kept]})
    return results


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes."""
    sides = torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])
    both = float(sides.clamp(min=0).prod())
    return both / max(float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - both, 1e-9)


def average_precision(network: Any, split: Iterator[Batch]) -> float:
    """mAP at an IoU of 0.5, in %."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_thresholds=[0.5])
    with torch.no_grad():
        for images, boxes in split:
            metric.update(found_boxes(network(images)), [{"boxes": b[b[:, 0] >= 0, 1:],
                                                          "labels": b[b[:, 0] >= 0, 0].long()} for b in boxes])
    return 100 * float(metric.compute()["map"])


def detection(folder: Path) -> fw.Task:
    parts = {split: bccd(folder, split) for split in ("train", "val", "test")}

    def split(name: str, train: bool = False) -> Callable[[], Iterator[Batch]]:
        images, boxes = parts[name]

        def make(index: Tensor) -> Batch:
            x, found = images[index].float() / 127.5 - 1, boxes[index].clone()
            if train and torch.rand(()) < 0.5:
                x, found[..., [1, 3]] = x.flip(3), WIDE - found[..., [3, 1]]
            if train and torch.rand(()) < 0.5:
                x, found[..., [2, 4]] = x.flip(2), HIGH - found[..., [4, 2]]
            return x.contiguous(), found

        return lambda: batches(len(images), 16, make, train)

    return fw.Task(train=split("train", True), calibration=split("train"), validation=split("val"), test=split("test"),
                   loss=detection_loss, score=average_precision)


# ---- segmentation
SIDE, SHAPES = 64, 5


class Segmenter(nn.Module):
    """Images [n, 3, 64, 64] -> classes [n, 5, 64, 64]: a U-net of three scales."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        w = width
        self.down1, self.down2 = nn.Sequential(conv(3, w), conv(w, w)), nn.Sequential(conv(w, 2 * w, 2),
                                                                                      conv(2 * w, 2 * w))
        self.down3 = nn.Sequential(conv(2 * w, 4 * w, 2), conv(4 * w, 4 * w))
        self.up2, self.up1 = conv(6 * w, 2 * w), conv(3 * w, w)
        self.out = nn.Conv2d(w, SHAPES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(one)
        three = self.down3(two)
        two = self.up2(torch.cat([two, F.interpolate(three, scale_factor=2.0)], 1))
        one = self.up1(torch.cat([one, F.interpolate(two, scale_factor=2.0)], 1))
        return self.out(one)


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 3, 64, 64] and classes [n, 64, 64]: discs, squares, triangles and rings, 3 to 6 an image, those
    drawn last above the others; their colours say nothing of their kind, and noise lies over all."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    images = np.empty((count, 3, SIDE, SIDE), np.uint8)
    classes = np.zeros((count, SIDE, SIDE), np.int64)
    for n in range(count):
        image = np.repeat(generator.uniform(60, 200, (3, 1, 1)), SIDE, 1).repeat(SIDE, 2)
        for _ in range(generator.integers(3, 7)):
            kind, size = generator.integers(1, SHAPES), generator.uniform(5, 13)
            cx, cy, turn = *generator.uniform(6, SIDE - 6, 2), generator.uniform(0, np.pi)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            far = np.hypot(u, v)
            inside = (far < size, np.maximum(abs(u), abs(v)) < 0.85 * size,
                      (v > -0.6 * size) & (v + 1.8 * abs(u) < size), (far < size) & (far > 0.55 * size))[kind - 1]
            image = np.where(inside, generator.uniform(20, 235, (3, 1, 1)), image)
            classes[n][inside] = kind
        images[n] = np.clip(image + generator.normal(0, 45, image.shape), 0, 255)
    return torch.from_numpy(images), torch.from_numpy(classes)


def mean_iou(network: Any, split: Iterator[Batch]) -> float:
    """Mean over the classes of intersection over union, in %."""
    counts = torch.zeros(SHAPES, SHAPES)
    with torch.no_grad():
        for x, y in split:
            pairs = SHAPES * y + network(x).argmax(1)
            counts += torch.bincount(pairs.flatten(), minlength=SHAPES**2).view(SHAPES, SHAPES)
    both = counts.diagonal()
    return 100 * float((both / (counts.sum(0) + counts.sum(1) - both)).mean())


def segmentation() -> fw.Task:
    parts = {"train": drawn(1000, 0), "validation": drawn(400, 1), "test": drawn(1000, 2)}

    def split(name: str, train: bool = False) -> Callable[[], Iterator[Batch]]:
        images, classes = parts[name]
        return lambda: batches(len(images), 32, lambda index: (images[index].float() / 127.5 - 1, classes[index]),
                               train)

    return fw.Task(train=split("train", True), calibration=split("train"), validation=split("validation"),
                   test=split("test"), loss=F.cross_entropy, score=mean_iou)


# ---- text
WORDS, TOKENS = 8000, 40


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, shown[:, None, None, :])
        found: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return found


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.wide, self.narrow, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.2)

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), shown))
        found: Tensor = x + self.drop(self.narrow(F.gelu(self.wide(self.norm2(x)))))
        return found


class Reader(nn.Module):
    """Words [n, 40] and which of them are there [n, 40] -> liked or not [n, 2]."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.drop, self.out = nn.LayerNorm(width), nn.Dropout(0.3), nn.Linear(width, 2)

    def forward(self, words: Tensor, shown: Tensor) -> Tensor:
        x = self.drop(self.words(words) + self.places)
        for layer in self.layers:
            x = layer(x, shown)
        x = self.norm(x) * shown[..., None]
        found: Tensor = self.out(x.sum(1) / shown.sum(1, keepdim=True).clamp(min=1))
        return found


def snippets(archive: Path) -> list[tuple[list[str], int]]:
    """Words and whether people liked what they read, of every snippet whose mean rating is not within 0.2 of 0."""
    found = []
    with tarfile.open(archive) as outer:
        inside = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inside)) as inner:
            for member in sorted(inner.getmembers(), key=lambda m: m.name):
                if member.name.endswith("GroundTruth.txt"):
                    source = inner.extractfile(member)
                    assert source is not None
                    for line in source.read().decode("latin-1").splitlines():
                        _, rating, text = line.split("\t", 2)
                        if abs(float(rating)) > 0.2:
                            found.append((re.findall(r"[a-z']+|[!?.,]", text.lower())[:TOKENS], int(float(rating) > 0)))
    return found


def text(archive: Path) -> fw.Task:
    """Split at random, 80 / 10 / 10; the words are those of the training snippets."""
    read = snippets(archive)
    order = torch.randperm(len(read), generator=torch.Generator().manual_seed(0)).tolist()
    ends = 0, int(0.8 * len(read)), int(0.9 * len(read)), len(read)
    common = Counter(word for k in order[:ends[1]] for word in read[k][0]).most_common(WORDS - 2)
    known = {word: k for k, (word, _) in enumerate(common, 2)}
    words, shown = torch.zeros(len(read), TOKENS, dtype=torch.long), torch.zeros(len(read), TOKENS, dtype=torch.bool)
    liked = torch.tensor([read[k][1] for k in order])
    for row, k in enumerate(order):
        ids = [known.get(word, 1) for word in read[k][0]]
        words[row, :len(ids)], shown[row, :len(ids)] = torch.tensor(ids), True

    def split(part: int, train: bool = False) -> Callable[[], Iterator[Batch]]:
        start, stop = ends[part], ends[part + 1]
        return lambda: batches(stop - start, 64, lambda index: (
            (words[start + index], shown[start + index]), liked[start + index]), train)

    return fw.Task(train=split(0, True), calibration=split(0), validation=split(1), test=split(2),
                   loss=F.cross_entropy, score=right)


def right(network: Any, split: Iterator[Batch]) -> float:
    """Share of right answers, in %."""
    good = count = 0
    with torch.no_grad():
        for inputs, y in split:
            good, count = good + int((network(*inputs).argmax(1) == y).sum()), count + len(y)
    return 100 * good / count
