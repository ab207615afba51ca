"""A task from arrays in one ``.npz`` file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.task.splits import SPLITS, parted, passes
from featherweight.task.task import Task

#: what the arrays of a split may be called behind x_ and y_
NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


def arrays(npz: str | Path, *, batch: int = 64, mean: float | list[float] | None = None,
           std: float | list[float] | None = None, validation: float = 0.1, test: float = 0.1, seed: int = 0) -> Task:
    """Classification, or regression where targets are floats, of a file with arrays x and y, or x_train, y_train, and
    maybe x_validation and x_test; the splits that are not there are drawn from x, or from x_train, with ``seed``.

    Images of uint8 [n, h, w] or [n, h, w, channels] become floats 0..1 [n, channels, h, w]. mean, std: taken off and
    divided by, one number or one a channel; None: as in the training split, each channel for itself. Raises TaskError
    for files without these arrays.

    Example:
        >>> import numpy as np
        >>> np.savez("digits.npz", x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) % 10)
        >>> task = fw.task.arrays("digits.npz", batch=8)
        >>> next(task.batches("train"))[0].shape
        torch.Size([8, 1, 8, 8])
    """
    path = Path(npz)
    if not path.is_file():
        raise TaskError(f"{path}: no such file; expected arrays saved by numpy.savez(\"{path.name}\", x=..., y=...)")
    with np.load(path, allow_pickle=False) as held:
        found = {name: held[name] for name in held.files}
    pairs = _pairs(found, path)
    for name, share in (("validation", validation), ("test", test)):
        if name not in pairs and share:
            x, y = pairs["train"]
            own = parted(len(x), share, 0.0, seed)
            pairs[name] = x[own["validation"]], y[own["validation"]]
            pairs["train"] = x[own["train"]], y[own["train"]]
    inputs = {name: _images(x) for name, (x, _) in pairs.items()}
    centre, scale = _norm(inputs["train"], mean, std)

    def split(name: str, shuffled: bool = False) -> Any:
        x, y = inputs[name], pairs[name][1]
        return passes(torch.arange(len(x)), batch, lambda i: ((_floats(x[i]) - centre) / scale, y[i]), shuffled)

    make = Task.regression if pairs["train"][1].is_floating_point() else Task.classification
    other = {name: split(name) for name in ("validation", "test") if name in pairs}
    return make(split("train", True), calibration=split("train"), **other)


def _pairs(found: Mapping[str, np.ndarray], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    if "x" in found and "y" in found:
        found = {**found, "x_train": found["x"], "y_train": found["y"]}
    pairs = {}
    for split in SPLITS:
        name = next((n for n in NAMES[split] if f"x_{n}" in found and f"y_{n}" in found), None)
        if name is not None:
            x, y = found[f"x_{name}"], found[f"y_{name}"]
            if len(x) != len(y):
                raise TaskError(f"{path}: x_{name} has {len(x)} samples and y_{name} {len(y)}")
            pairs[split] = torch.from_numpy(x), torch.from_numpy(y.astype(np.float32 if y.dtype.kind == "f" else
                                                                          np.int64))
    if "train" not in pairs:
        raise TaskError(f"{path} has {', '.join(found) or 'no arrays'}; expected x and y, or x_train and y_train")
    return pairs


def _images(x: Tensor) -> Tensor:
    """Images with their channels first; other arrays as they are."""
    if x.dtype != torch.uint8:
        return x
    if x.dim() == 3:
        return x[:, None]
    return x.permute(0, 3, 1, 2) if x.dim() == 4 and x.shape[3] <= 4 < x.shape[1] else x


def _floats(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def _norm(x: Tensor, mean: Any, std: Any) -> tuple[Tensor, Tensor]:
    """What is taken off and divided by, to be broadcast over a batch."""
    over = [0, *range(2, x.dim())]
    some = _floats(x[:10_000]).double()
    own = some.mean(over), some.std(over, correction=0)
    given = [torch.as_tensor(found if one is None else one, dtype=torch.float32).reshape(-1, *[1] * (x.dim() - 2))
             for one, found in zip((mean, std), own, strict=True)]
    return given[0], torch.where(given[1] > 0, given[1], 1.0)


__all__ = ["arrays"]
