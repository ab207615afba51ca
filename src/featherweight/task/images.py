"""A task from images that lie in one folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.task.splits import parted, passes
from featherweight.task.task import Task

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
#: what the folders of the splits may be called
FOLDERS = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test", "testing")}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  #: of ImageNet


def images(folder: str | Path, *, size: int = 224, resize: int | None = None, mean: Sequence[float] = MEAN,
           std: Sequence[float] = STD, batch: int = 32, mirror: bool = True, validation: float = 0.1,
           test: float = 0.1, seed: int = 0) -> Task:
    """Classification of the images in ``folder``: one folder for each class, or of such folders one for each split
    (train, val, test; those that are not there are drawn from train with ``seed``). Classes are in the order of their
    names.

    The shorter side becomes ``resize`` (None: 8/7 of ``size``), ``size`` x ``size`` of the middle is taken, floats 0..1
    are normalized by ``mean`` and ``std``, one number a channel (one number: grey images). mirror: training images are
    mirrored half of the time. Needs Pillow: pip install 'featherweight[vision]'. Raises TaskError where there are no
    images.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> for name in ("cat", "dog"):
        ...     for k in range(10):
        ...         Path(f"pets/{name}").mkdir(parents=True, exist_ok=True)
        ...         Image.new("RGB", (20, 16), (k, 0, 0)).save(f"pets/{name}/{k}.png")
        >>> task = fw.task.images("pets", size=8, batch=4)
        >>> next(task.batches("train"))[0].shape
        torch.Size([4, 3, 8, 8])
    """
    pillow()
    root = Path(folder)
    found = _found(root, validation, test, seed)
    form = ImageForm(size, resize or round(size * 8 / 7), tuple(mean), tuple(std))

    def split(name: str, training: bool = False) -> Any:
        files = found[name]

        def make(index: Sequence[int]) -> tuple[Tensor, Tensor]:
            flips = torch.rand(len(index)) < 0.5 if training and mirror else torch.zeros(len(index), dtype=torch.bool)
            read = [form.read(files[i][0]) for i in index]
            return (torch.stack([x.flip(2) if flip else x for x, flip in zip(read, flips, strict=True)]),
                    torch.tensor([files[i][1] for i in index]))

        return passes(torch.arange(len(files)), batch, make, training)

    other = {name: split(name) for name in ("validation", "test") if name in found}
    return Task.classification(split("train", True), calibration=split("train"), **other)


def pillow() -> Any:
    """Pillow's module for images. Raises TaskError where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise TaskError("images are read by Pillow, which is not here; write pip install 'featherweight[vision]'"
                        ) from error
    return Image


class ImageForm:
    """How an image becomes a tensor."""

    def __init__(self, size: int, resize: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        if resize < size or len(mean) != len(std) or len(mean) not in (1, 3):
            raise TaskError(f"size={size}, resize={resize}, mean={mean}, std={std}; expected resize of at least size, "
                            "and 1 or 3 numbers in mean and std each")
        self.size, self.resize, self.mode = size, resize, "RGB" if len(mean) == 3 else "L"
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def read(self, path: Path) -> Tensor:
        """[channels, size, size]."""
        module = pillow()
        try:
            with module.open(path) as file:
                image = file.convert(self.mode)
        except OSError as error:
            raise TaskError(f"{path} is no image that Pillow reads: {error}") from error
        scale = self.resize / min(image.size)
        wide, high = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((wide, high), module.Resampling.BILINEAR)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)), dtype=np.float32) / 255
        found = torch.from_numpy(pixels).reshape(self.size, self.size, -1).permute(2, 0, 1)
        return ((found - self.mean) / self.std).contiguous()


def classes(folder: str | Path) -> list[str]:
    """The names of the classes of a folder of images, in order."""
    root = Path(folder)
    if not root.is_dir():
        raise TaskError(f"{root}: no such folder; expected a folder with one folder of images for each class")
    train = next((root / name for name in FOLDERS["train"] if (root / name).is_dir()), root)
    return sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith("."))


def least_side(folder: str | Path) -> int | None:
    """The shorter side in pixels of the smallest of the classes' first images; None where there are no images."""
    root, names = Path(folder), classes(folder)
    train = next((root / name for name in FOLDERS["train"] if (root / name).is_dir()), root)
    firsts = {kind: path for path, kind in reversed(_listed(train, names))}
    sides = []
    for path in firsts.values():
        with pillow().open(path) as image:
            sides.append(min(image.size))
    return min(sides, default=None)


def _found(root: Path, validation: float, test: float, seed: int) -> dict[str, list[tuple[Path, int]]]:
    """Split -> its images, each with its class."""
    names = classes(root)
    parts = {split: part for split, given in FOLDERS.items()
             if (part := next((root / name for name in given if (root / name).is_dir()), None)) is not None}
    found = {split: _listed(part, names) for split, part in (parts if "train" in parts else {"train": root}).items()}
    if not found["train"]:
        raise TaskError(f"{root} holds no images in folders of classes ({', '.join(names) or 'no folders'}); expected "
                        f"{root}/CLASS/name.jpg, or {root}/train/CLASS/name.jpg")
    for split, share in (("test", test), ("validation", validation)):
        if split not in found and share:
            whole, own = found["train"], parted(len(found["train"]), share, 0.0, seed)
            found |= {split: [whole[i] for i in own["validation"]], "train": [whole[i] for i in own["train"]]}
    return found


def _listed(part: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    others = sorted(p.name for p in part.iterdir() if p.is_dir() and p.name not in names and not p.name.startswith("."))
    if others:
        raise TaskError(f"{part} has {others[0]!r}, which is no class of the training images: {', '.join(names)}")
    return [(path, number) for number, name in enumerate(names) for path in sorted((part / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES]


__all__ = ["classes", "images"]
