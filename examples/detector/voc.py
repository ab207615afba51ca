"""Pictures and boxes in VOC's form: a folder of yours, or one that is drawn here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

COUNT = {"train": 160, "val": 40, "test": 40}
SIDES, KINDS = ("xmin", "ymin", "xmax", "ymax"), ("disc", "ring", "square")


def folder() -> Path:
    """What the environment's VOC names (Annotations, ImageSets/Main, JPEGImages); else a folder of drawn shapes."""
    if "VOC" in os.environ:
        return Path(os.environ["VOC"])
    if not Path("shapes").exists():
        draw(Path("shapes"))
    return Path("shapes")


def names(place: Path) -> list[str]:
    """The classes of the training split, in the order of their names."""
    return sorted({thing.findtext("name", "") for stem in stems(place, "train") for thing in objects(place, stem)})


def stems(place: Path, split: str) -> list[str]:
    return (place / f"ImageSets/Main/{split}.txt").read_text().split()


def objects(place: Path, stem: str) -> list[ElementTree.Element]:
    return ElementTree.parse(place / f"Annotations/{stem}.xml").findall("object")


def read(place: Path, split: str, wide: int, high: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images uint8 [n, 3, high, wide]; of each the boxes [k, 4] as x0, y0, x1, y1 in its pixels, and labels [k]."""
    from PIL import Image

    kinds, images, targets = names(place), [], []
    for stem in stems(place, split):
        picture = Image.open(place / f"JPEGImages/{stem}.jpg").convert("RGB")
        scale = torch.tensor([wide / picture.width, high / picture.height]).repeat(2)
        images.append(torch.from_numpy(np.array(picture.resize((wide, high)))).permute(2, 0, 1))
        found = objects(place, stem)
        boxes = [[float(thing.findtext(f"bndbox/{side}", "0")) for side in SIDES] for thing in found]
        targets.append({"boxes": torch.tensor(boxes).reshape(-1, 4) * scale,
                        "labels": torch.tensor([kinds.index(thing.findtext("name", "")) for thing in found])})
    return torch.stack(images), targets


def draw(place: Path) -> None:
    """Writes discs, rings and squares on a noisy ground, 2 to 6 a picture of 256 x 192, and where they are."""
    from PIL import Image

    r = np.random.default_rng(0)
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (place / part).mkdir(parents=True)
    for split, count in COUNT.items():
        for number in range(count):
            image, shapes = drawn(r)
            Image.fromarray(image).save(place / f"JPEGImages/{split}{number}.jpg", quality=95)
            written(shapes, place / f"Annotations/{split}{number}.xml")
        (place / f"ImageSets/Main/{split}.txt").write_text("\n".join(f"{split}{n}" for n in range(count)))


def drawn(r: np.random.Generator) -> tuple[np.ndarray[Any, Any], list[tuple[str, tuple[int, ...]]]]:
    """One picture, and the (kind, box) of each shape in it."""
    y, x = np.mgrid[:192, :256]
    image, shapes = np.full((192, 256, 3), r.uniform(60, 120, 3)), []
    for _ in range(r.integers(2, 7)):
        kind, size = str(r.choice(KINDS)), int(r.integers(10, 26))
        cx, cy = int(r.integers(size, 256 - size)), int(r.integers(size, 192 - size))
        far = np.hypot(x - cx, y - cy)
        inside = {"disc": far <= size, "ring": (far <= size) & (far > 0.6 * size),
                  "square": np.maximum(abs(x - cx), abs(y - cy)) <= size}[kind]
        image = np.where(inside[..., None], r.uniform(130, 250, 3), image)
        shapes.append((kind, (cx - size, cy - size, cx + size, cy + size)))
    return np.clip(image + r.normal(0, 20, image.shape), 0, 255).astype(np.uint8), shapes


def written(shapes: list[tuple[str, tuple[int, ...]]], file: Path) -> None:
    root = ElementTree.Element("annotation")
    for kind, box in shapes:
        thing = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(thing, "name").text = kind
        sides = ElementTree.SubElement(thing, "bndbox")
        for side, value in zip(SIDES, box, strict=True):
            ElementTree.SubElement(sides, side).text = str(value)
    ElementTree.ElementTree(root).write(file)
