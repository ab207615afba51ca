"""Boxes in images: overlaps, and the average precision of detections (COCO: Lin et al. 2014)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.task.batches import Batch

#: intersections over union from which a box is a hit
IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
#: boxes of an image and class that count, those of the highest scores
MOST = 100
#: recalls at which precision is read
RECALLS = np.linspace(0, 1, 101)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _arrays(given: Any, names: Sequence[str]) -> list[npt.NDArray[Any]]:
    if not isinstance(given, Mapping) or any(name not in given for name in names):
        what = ", ".join(given) if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise TaskError(f"an image has {what}; expected {', '.join(names)}")
    found = [torch.as_tensor(given[name]).detach().cpu().numpy() for name in names]
    boxes = found[0].reshape(-1, 4) if not found[0].size else found[0]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or any(len(other) != len(boxes) for other in found):
        raise TaskError(f"an image has {', '.join(f'{n} {list(f.shape)}' for n, f in zip(names, found, strict=True))}; "
                        "expected boxes [k, 4] as x0, y0, x1, y1, and k of the others")
    return [boxes.astype(np.float64), *found[1:]]


@dataclass(frozen=True)
class Truth:
    """The objects of an image: boxes [k, 4], labels [k]."""

    boxes: Floats
    labels: Ints

    @classmethod
    def of(cls, given: Any) -> Truth:
        """Of a mapping of tensors. Raises TaskError for another, and for crowds, which are not scored."""
        if isinstance(given, Mapping) and bool(torch.as_tensor(given.get("iscrowd", 0)).any()):
            raise TaskError("a target has boxes of crowds (iscrowd), which this score does not know; leave them out")
        boxes, labels = _arrays(given, ("boxes", "labels"))
        return cls(boxes, labels.astype(np.int64))


@dataclass(frozen=True)
class Detected:
    """The boxes that were found in an image, with scores [k] and labels [k]."""

    boxes: Floats
    scores: Floats
    labels: Ints

    @classmethod
    def of(cls, given: Any) -> Detected:
        """Of a mapping of tensors. Raises TaskError for another."""
        boxes, scores, labels = _arrays(given, ("boxes", "scores", "labels"))
        return cls(boxes, scores.astype(np.float64), labels.astype(np.int64))


def overlaps(a: Floats, b: Floats) -> Floats:
    """Intersections over union [n, m] of boxes [n, 4] and [m, 4]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both: Floats = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (a, b)]
    union = areas[0][:, None] + areas[1][None] - both
    return both / np.where(union > 0, union, 1.0)


def hits(iou: Floats, least: float) -> npt.NDArray[np.bool_]:
    """Which boxes, [n] in the order of their scores, hit an object of iou [n, m] that no earlier box took."""
    free, found = np.ones(iou.shape[1], dtype=bool), np.zeros(len(iou), dtype=bool)
    for i, row in enumerate(iou):
        best = int(np.where(free, row, -1.0).argmax()) if free.any() else -1
        if best >= 0 and row[best] >= least:
            free[best], found[i] = False, True
    return found


def precision_area(scores: Floats, right: npt.NDArray[np.bool_], objects: int) -> float:
    """The mean of the precision at ``RECALLS``, at each the highest that is reached there or beyond."""
    order = np.argsort(-scores, kind="mergesort")
    true = np.cumsum(right[order])
    precision = true / np.arange(1, len(order) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(true / objects, RECALLS, side="left")
    return float(np.concatenate([best, [0.0]])[np.minimum(places, len(best))].mean())


def average_precision(found: Sequence[Detected], truths: Sequence[Truth], ious: Sequence[float] = IOUS) -> float:
    """The mean over classes that occur and over ``ious``, 0..1."""
    areas = []
    for label in sorted({int(label) for truth in truths for label in truth.labels}):
        scores, overlap = [], []
        for one, truth in zip(found, truths, strict=True):
            mine = np.flatnonzero(one.labels == label)
            order = mine[np.argsort(-one.scores[mine], kind="mergesort")][:MOST]
            scores.append(one.scores[order])
            overlap.append(overlaps(one.boxes[order], truth.boxes[truth.labels == label]))
        objects = sum(int((truth.labels == label).sum()) for truth in truths)
        areas += [precision_area(np.concatenate(scores), np.concatenate([hits(o, least) for o in overlap]), objects)
                  for least in ious]
    return float(np.mean(areas))


@dataclass(frozen=True)
class Stacked:
    """A split whose lists of images are stacked to [n, c, h, w]."""

    given: Callable[[], Iterable[Batch]]

    def __call__(self) -> Iterator[Batch]:
        for inputs, target in self.given():
            if isinstance(inputs, (list, tuple)) and all(isinstance(i, Tensor) and i.dim() == 3 for i in inputs):
                if len({i.shape for i in inputs}) > 1:
                    raise TaskError(f"the images of a batch have sizes {', '.join(str(list(i.shape)) for i in inputs)};"
                                    " resize them to one, or give batches of one image")
                inputs = torch.stack(list(inputs))
            yield inputs, target


__all__ = ["IOUS", "Detected", "Stacked", "Truth", "average_precision"]
