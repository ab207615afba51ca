"""A task from images that lie in one folder for each class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.task.bounds import DRAWN, NORM, Numbers, check_lists, check_options
from featherweight.task.splits import parted, passes
from featherweight.task.task import Task

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
#: what the folders of the splits may be called
FOLDERS = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test", "testing")}
#: Pillow's modes of 16 bits a pixel, and the formats whose "I" holds 16 bits; Pillow clips them where it converts them
DEEP, DEEP_FORMATS = ("I;16", "I;16B", "I;16L", "I;16N"), ("PNG", "PPM")
SIZES = {"size": Numbers(224, least=1, whole=True), "resize": Numbers(256, least=1, whole=True, none="8/7 of size")}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  #: of ImageNet


def images(folder: str | Path, *, size: int = 224, resize: int | None = None, mean: Sequence[float] = MEAN,
           std: Sequence[float] = STD, batch: int = 32, mirror: bool = True, validation: float = 0.1,
           test: float = 0.1, seed: int = 0) -> Task:
    """Classification of the images in ``folder``: one folder for each class, or of such folders one for each split
    (train, val, test; those that are not there are drawn from train with ``seed``). Classes are in the order of their
    names.

    The shorter side becomes ``resize`` (None: 8/7 of ``size``), ``size`` x ``size`` of the middle is taken, floats 0..1
    are normalized by ``mean`` and ``std``, one number a channel (one number: grey images). mirror: training images are
    mirrored half of the time. Grey images of 16 bits are scaled to 8. An orientation in EXIF is not applied, as
    torchvision's ImageFolder does not. Needs Pillow: pip install 'featherweight[vision]'. Raises TaskError where a
    class or a split has no images, and for images of floats or of 32 bits, whose range is not known.

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
    check_options("fw.task.images", SIZES | DRAWN, size=size, resize=resize, batch=batch, validation=validation,
                  test=test, seed=seed)
    check_lists("fw.task.images", NORM, mean=mean, std=std)
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
        with _opened(path) as file:
            image = _eight_bits(file, path).convert(self.mode)
        scale = self.resize / min(image.size)
        wide, high = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((wide, high), module.Resampling.BILINEAR)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)), dtype=np.float32) / 255
        found = torch.from_numpy(pixels).reshape(self.size, self.size, -1).permute(2, 0, 1)
        return ((found - self.mean) / self.std).contiguous()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An image of Pillow's; what Pillow raises while it is read is told as a TaskError."""
    module = pillow()
    try:
        with module.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, module.DecompressionBombError) as error:
        raise TaskError(f"{path} is no image that Pillow reads: {error}; save it anew, or take it out") from error


def _eight_bits(image: Any, path: Path) -> Any:
    """The same image in a mode whose numbers are 0..255."""
    if image.mode in DEEP or (image.mode == "I" and image.format in DEEP_FORMATS):
        return pillow().fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "signed or 32-bit integers"
        raise TaskError(f"{path} holds {kind}, whose black and white are not known; expected 8 or 16 bits: save pixels "
                        "0..1 by Image.fromarray((pixels * 255).astype(\"uint8\")).save(...)")
    return image


def classes(folder: str | Path) -> list[str]:
    """The names of the classes of a folder of images, in order."""
    train = _parts(Path(folder))["train"]
    return sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith("."))


def least_side(folder: str | Path) -> int:
    """The shorter side in pixels of the smallest of the classes' first images."""
    sides: list[int] = []
    for path in {kind: path for path, kind in reversed(_listed(Path(folder))["train"])}.values():
        with _opened(path) as image:
            sides.append(min(image.size))
    return min(sides)


def _parts(root: Path) -> dict[str, Path]:
    """Split -> the folder that holds its classes; "train" is always there."""
    if not root.is_dir():
        raise TaskError(f"{root}: no such folder; expected a folder with one folder of images for each class")
    parts = {split: part for split, given in FOLDERS.items()
             if (part := next((root / name for name in given if (root / name).is_dir()), None)) is not None}
    if "train" in parts:
        return parts
    named = {name for given in FOLDERS.values() for name in given}
    held = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if held and named.issuperset(held):
        raise TaskError(f"{root} holds {' and '.join(held)}, and no train; expected {root}/train/CLASS/name.jpg beside "
                        f"them, or write fw.task.images({str(root / held[-1])!r}), which draws the splits from there")
    return {"train": root}


def _listed(root: Path) -> dict[str, list[tuple[Path, int]]]:
    """Split -> the images in its folder, each with its class."""
    names, parts = classes(root), _parts(root)
    found = {split: _images(part, names) for split, part in parts.items()}
    if not found["train"]:
        raise TaskError(f"{root} holds no images in folders of classes ({', '.join(names) or 'no folders'}); expected "
                        f"{root}/CLASS/name.jpg, or {root}/train/CLASS/name.jpg")
    held = {number for _, number in found["train"]}
    empty = [parts[split] for split, own in found.items() if not own]
    empty += [parts["train"] / name for number, name in enumerate(names) if number not in held]
    if empty:
        raise TaskError(f"{empty[0]} holds no images; expected files of {', '.join(SUFFIXES)}, or no such folder: "
                        "classes are those of train, and a split without a folder is drawn from train")
    return found


def _found(root: Path, validation: float, test: float, seed: int) -> dict[str, list[tuple[Path, int]]]:
    """The same, with the splits that have no folder drawn from train."""
    found = _listed(root)
    for split, share in (("test", test), ("validation", validation)):
        if split not in found and share:
            whole, own = found["train"], parted(len(found["train"]), share, 0.0, seed)
            found |= {split: [whole[i] for i in own["validation"]], "train": [whole[i] for i in own["train"]]}
    return found


def _images(part: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    others = sorted(p.name for p in part.iterdir() if p.is_dir() and p.name not in names and not p.name.startswith("."))
    if others:
        raise TaskError(f"{part} has {others[0]!r}, which is no class of the training images: {', '.join(names)}")
    return [(path, number) for number, name in enumerate(names) for path in sorted((part / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES]


__all__ = ["classes", "images"]
