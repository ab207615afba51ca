"""A task from arrays in one ``.npz`` file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.task.bounds import DRAWN, NORM, check_lists, check_options
from featherweight.task.splits import SPLITS, parted, passes
from featherweight.task.task import Task

#: what the arrays of a split may be called behind x_ and y_
NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
PORTION = 256  #: samples that are made floats at a time


def arrays(npz: str | Path, *, batch: int = 64, mean: float | list[float] | None = None,
           std: float | list[float] | None = None, validation: float = 0.1, test: float = 0.1, seed: int = 0) -> Task:
    """Classification, or regression where targets are floats, of a file with arrays x and y, or x_train, y_train, and
    maybe x_validation and x_test; the splits that are not there are drawn from x, or from x_train, with ``seed``.

    Images of uint8 [n, h, w] or [n, h, w, channels] become floats 0..1 [n, channels, h, w]. mean, std: taken off and
    divided by, one number or one a channel; None: as in the training split, each channel for itself. Raises TaskError
    for files without these arrays, an x without its y, and arrays that do not hold real numbers.

    Example:
        >>> import numpy as np
        >>> np.savez("digits.npz", x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) % 10)
        >>> task = fw.task.arrays("digits.npz", batch=8)
        >>> next(task.batches("train"))[0].shape
        torch.Size([8, 1, 8, 8])
    """
    check_options("fw.task.arrays", DRAWN, batch=batch, validation=validation, test=test, seed=seed)
    check_lists("fw.task.arrays", NORM, mean=_listed(mean), std=_listed(std))
    path = Path(npz)
    if not path.is_file():
        raise TaskError(f"{path}: no such file; expected arrays saved by numpy.savez(\"{path.name}\", x=..., y=...)")
    pairs = _pairs(path)
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


def _pairs(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> its inputs (uint8, else float32) and targets (float32 or int64)."""
    with path.open("rb") as file:
        held = _held(path, file)
        pairs = {split: (_inputs(path, held, f"x{end}"), _wanted(path, held, f"y{end}"))
                 for split, end in _ends(path, held).items()}
    for split, (x, y) in pairs.items():
        if len(x) != len(y) or not len(x):
            raise TaskError(f"{path}: the inputs of {split} have {len(x)} samples and its targets {len(y)}; expected "
                            "as many, one at least")
    return pairs


def _held(path: Path, file: BinaryIO) -> NpzFile:
    try:
        held = np.load(file, allow_pickle=False)
    except Exception:
        held = None
    if not isinstance(held, NpzFile):
        raise TaskError(f"{path} is no whole .npz file; expected arrays saved by numpy.savez({path.name!r}, x=..., "
                        "y=...)")
    return held


def _ends(path: Path, held: Collection[str]) -> dict[str, str]:
    """Split -> what its arrays are called behind "x" and "y"."""
    found: dict[str, str] = {}
    for end, split in [("", "train"), *((f"_{name}", kind) for kind in SPLITS for name in NAMES[kind])]:
        own = [name for name in (f"x{end}", f"y{end}") if name in held]
        if len(own) == 1:
            raise TaskError(f"{path} has {own[0]} alone; expected x{end} and y{end}, or neither")
        if own and split in found:
            raise TaskError(f"{path} has x{found[split]} and x{end}, which are both {split}; expected one of them")
        if own:
            found[split] = end
    if "train" not in found:
        raise TaskError(f"{path} has {', '.join(held) or 'no arrays'}; expected x and y, or x_train and y_train")
    return found


def _array(path: Path, held: Mapping[str, Any], name: str, write: str) -> np.ndarray:
    """An array of real numbers [n, ...]. Raises TaskError for another one, with what to ``write``."""
    try:
        found = np.asarray(held[name])
    except Exception as error:
        raise TaskError(f"{path}: {name} cannot be read: it is damaged, or holds Python objects; expected an array of "
                        f"numbers saved by numpy.savez({path.name!r}, ...)") from error
    if found.dtype.kind not in "biuf" or not found.ndim:
        raise TaskError(f"{path}: {name} is {found.dtype}{list(found.shape)}; expected real numbers [n, ...]: write "
                        f"{name}={write}")
    return found


def _inputs(path: Path, held: Mapping[str, Any], name: str) -> Tensor:
    x = _array(path, held, name, f"np.asarray({name}, np.float32), np.stack([{name}.real, {name}.imag], 1) of complex")
    return torch.from_numpy(x if x.dtype == np.uint8 else x.astype(np.float32))


def _wanted(path: Path, held: Mapping[str, Any], name: str) -> Tensor:
    y = _array(path, held, name, f"np.unique({name}, return_inverse=True)[1]")
    return torch.from_numpy(y.astype(np.float32 if y.dtype.kind == "f" else np.int64))


def _images(x: Tensor) -> Tensor:
    """Images with their channels first; other arrays as they are."""
    if x.dtype != torch.uint8:
        return x
    if x.dim() == 3:
        return x[:, None]
    return x.permute(0, 3, 1, 2) if x.dim() == 4 and x.shape[3] <= 4 < x.shape[1] else x


def _floats(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def _listed(given: Any) -> Iterable[Any]:
    return given if isinstance(given, Iterable) else [] if given is None else [given]


def _norm(x: Tensor, mean: Any, std: Any) -> tuple[Tensor, Tensor]:
    """What is taken off and divided by, to be broadcast over a batch."""
    centre = _mean(x, lambda part: part)
    scale = _mean(x, lambda part: (part - centre).square()).sqrt()
    given = [found if one is None else torch.as_tensor(one, dtype=torch.float32).reshape(-1, *[1] * (x.dim() - 2))
             for one, found in ((mean, centre), (std, scale))]
    for name, one in zip(("mean", "std"), given, strict=True):
        if one.numel() not in (1, centre.numel()):
            raise TaskError(f"arrays(...) was given {one.numel()} numbers as {name}; expected one, or one for each of "
                            f"the {centre.numel()} channels of inputs {list(x.shape)}")
    return given[0], torch.where(given[1] > 0, given[1], 1.0)


def _mean(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of a function of all samples, each channel for itself."""
    over = [0, *range(2, x.dim())]
    total = torch.stack([of(_floats(part)).sum(over, keepdim=True, dtype=torch.float64)
                         for part in (x[at:at + PORTION] for at in range(0, len(x), PORTION))]).sum(0)
    return (total / (x.numel() / total.numel())).float()[0]


__all__ = ["arrays"]
