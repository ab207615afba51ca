"""Scores: ``score(predict, batches)`` in percent, higher is better. ``predict`` is a Network or a deployed file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.task.batches import Batch, Predict, call
from featherweight.task.boxes import IOUS, Detected, Truth, average_precision

#: where the values to be judged stand, in a mapping of outputs
KEYS = ("logits", "out", "output", "scores", "prediction")


def main_output(output: Any) -> Tensor:
    """The tensor to be judged: the output itself, the first of a tuple, or of a mapping what is called as in KEYS,
    else its first tensor. Raises TaskError if there is none.

    Example:
        >>> fw.scores.main_output({"loss": torch.zeros(()), "logits": torch.ones(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = [output[k] for k in KEYS if k in output] + list(output.values())
    elif not isinstance(output, (tuple, list)):
        output = [getattr(output, k) for k in KEYS if hasattr(output, k)]
    for item in output:
        if isinstance(item, Tensor):
            return item
    raise TaskError("the network's output holds no tensor to be scored; write a score(predict, batches) of your own")


def _check_classes(target: Tensor, classes: int, ignore: int | None = None) -> None:
    """Raises TaskError where a target is neither one of the network's classes nor ``ignore``."""
    odd = ~((target >= 0) & (target < classes))
    if ignore is not None:
        odd &= target != ignore
    if bool(odd.any()):
        beside = "" if ignore is None else f" and is not {ignore} (ignored)"
        raise TaskError(f"the target {target[odd][0].item()} lies outside 0..{classes - 1}{beside}; expected one of "
                        f"the network's {classes} classes, counted from 0")


def _nothing(batches: Iterable[Batch], otherwise: str = "") -> TaskError:
    """What is to be said where a pass gave nothing to score."""
    split = getattr(batches, "split", "validation")
    return TaskError(f"there was nothing to score: the {split} split gave no batches{otherwise}; Task({split}=...) "
                     "must start a fresh pass with batches in it at every call")


def _top(predict: Predict, batches: Iterable[Batch], k: int) -> float:
    right = seen = 0
    with torch.no_grad():
        for inputs, target in batches:
            logits = main_output(call(predict, inputs))
            labels = torch.as_tensor(target).to(logits.device)
            if logits.dim() < 2 or labels.shape != (*logits.shape[:1], *logits.shape[2:]):
                raise TaskError(f"top-{k} compares logits [n, classes] with targets [n]; got {list(logits.shape)} and "
                                f"{list(labels.shape)}")
            _check_classes(labels, logits.shape[1])
            best = logits.topk(min(k, logits.shape[1]), dim=1).indices
            right += int((best == labels.unsqueeze(1)).any(dim=1).sum())
            seen += labels.numel()
    if not seen:
        raise _nothing(batches)
    return 100.0 * right / seen


def top1(predict: Predict, batches: Iterable[Batch]) -> float:
    """Share of samples, in percent, whose largest logit is the target's. Logits [n, classes], targets [n] integers
    (or [n, classes, h, w] and [n, h, w]: the share of pixels). Raises TaskError for a target that is no class.

    Example:
        >>> fw.scores.top1(lambda x: x, [(torch.eye(4), [0, 1, 2, 0])])
        75.0
    """
    return _top(predict, batches, 1)


def top5(predict: Predict, batches: Iterable[Batch]) -> float:
    """Share of samples, in percent, with the target among the five largest logits.

    Example:
        >>> fw.scores.top5(lambda x: x, [(torch.arange(6.0).repeat(2, 1), [1, 0])])
        50.0
    """
    return _top(predict, batches, 5)


def mean_iou(predict: Predict, batches: Iterable[Batch], ignore: int = 255) -> float:
    """Mean over classes of intersection over union of predicted and true pixels, in percent.

    Logits [n, classes, h, w], targets [n, h, w] integers; pixels with the target ``ignore`` are left out. One confusion
    matrix over all batches; classes that occur in neither are left out of the mean.

    Example:
        >>> logits = torch.eye(2)[:, :, None]                                 # [n, classes, h, w] = [1, 2, 2, 1]
        >>> fw.scores.mean_iou(lambda x: x, [(logits[None], torch.tensor([[[0], [1]]]))])
        100.0
    """
    matrix: Tensor | None = None
    with torch.no_grad():
        for inputs, target in batches:
            logits = main_output(call(predict, inputs)).cpu()
            truth = torch.as_tensor(target).long().cpu()
            classes = logits.shape[1]
            if truth.shape != (*logits.shape[:1], *logits.shape[2:]):
                raise TaskError(f"mean IoU compares logits [n, classes, h, w] with targets [n, h, w]; got "
                                f"{list(logits.shape)} and {list(truth.shape)}")
            kept = truth != ignore
            _check_classes(truth, classes, ignore)
            pairs = truth[kept] * classes + logits.argmax(dim=1)[kept]
            counts = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
            matrix = counts if matrix is None else matrix + counts
    if matrix is None or not int(matrix.sum()):
        raise _nothing(batches, ", or every pixel is ignored")
    both = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return 100.0 * float((both[union > 0] / union[union > 0]).mean())


def numbers(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """The outputs of a regression and its targets, in one shape."""
    given = main_output(output)
    wanted = torch.as_tensor(target).to(given)
    if wanted.shape != given.shape and wanted.numel() == given.numel():
        wanted = wanted.view(given.shape)
    if wanted.shape != given.shape:
        classes = "" if wanted.dim() != 1 or given.dim() != 2 else (
            "; where the targets are classes write fw.Task.classification(...), and in a file words, or 0, 1, 2, ... "
            "without a gap: other numbers are taken for amounts")
        raise TaskError(f"regression compares outputs {list(given.shape)} with targets {list(wanted.shape)}; both must "
                        f"have one shape{classes}")
    return given, wanted


def explained(predict: Predict, batches: Iterable[Batch]) -> float:
    """R^2 in percent: 100 (1 - squared error / variance of the targets), over all numbers of all batches.

    Example:
        >>> fw.scores.explained(lambda x: x, [(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))])
        100.0
    """
    error, total, squares, count = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for inputs, target in batches:
            given, wanted = (t.double() for t in numbers(call(predict, inputs), target))
            error += float((given - wanted).square().sum())
            total, squares, count = total + float(wanted.sum()), squares + float(wanted.square().sum()), \
                count + wanted.numel()
    if not count:
        raise _nothing(batches)
    variance = squares - total ** 2 / count
    return 100 * (1 - error / variance) if variance > 0 else 0.0


def tokens(output: Any, target: Any, shift: bool) -> tuple[Tensor, Tensor]:
    """Logits [n, t, vocabulary] and the tokens wanted there [n, t]."""
    logits, wanted = main_output(output), torch.as_tensor(target)
    if logits.dim() != 3 or wanted.shape != logits.shape[:2]:
        raise TaskError(f"language compares logits [n, t, vocabulary] with targets [n, t]; got {list(logits.shape)} "
                        f"and {list(wanted.shape)}")
    return (logits[:, :-1], wanted[:, 1:]) if shift else (logits, wanted)


def right_tokens(predict: Predict, batches: Iterable[Batch], shift: bool = True, ignore: int = -100) -> float:
    """Share of the tokens that count whose largest logit is theirs, in percent. shift: the target of a place is the
    token after it.

    Example:
        >>> logits = torch.eye(3)[None]                                       # [n, t, vocabulary] = [1, 3, 3]
        >>> fw.scores.right_tokens(lambda x: x, [(logits, torch.tensor([[0, 1, 2]]))], shift=False)
        100.0
    """
    right = seen = 0
    with torch.no_grad():
        for inputs, target in batches:
            logits, wanted = tokens(call(predict, inputs), target, shift)
            _check_classes(wanted, logits.shape[2], ignore)
            counts = wanted.to(logits.device) != ignore
            right += int(((logits.argmax(2) == wanted.to(logits.device)) & counts).sum())
            seen += int(counts.sum())
    if not seen:
        raise _nothing(batches, ", or no token counts")
    return 100.0 * right / seen


def mean_ap(predict: Predict, batches: Iterable[Batch], decode: Callable[[Any], Any] | None = None,
            ious: tuple[float, ...] = IOUS) -> float:
    """Mean average precision over classes and the IoUs that count as a hit, in percent; COCO's mAP (all sizes, at most
    100 boxes an image and class).

    Targets: a {"boxes": [k, 4], "labels": [k]} for each image. decode: of the model's output, a {"boxes", "scores",
    "labels"} for each image; None where it is that. Raises TaskError for anything else.

    Example:
        >>> truth = [{"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}]
        >>> near = [{**truth[0], "boxes": torch.tensor([[0.0, 0.0, 4.0, 3.0]]), "scores": torch.ones(1)}]
        >>> fw.scores.mean_ap(lambda x: near, [(torch.zeros(1, 3, 8, 8), truth)], ious=(0.5, 0.9))
        50.0
    """
    found: list[Detected] = []
    truths: list[Truth] = []
    with torch.no_grad():
        for inputs, targets in batches:
            output = call(predict, inputs)
            given = output if decode is None else decode(output)
            if not isinstance(given, (list, tuple)) or len(given) != len(targets):
                raise TaskError(f"mean AP wants of {len(targets)} images as many {{boxes, scores, labels}}; got a "
                                f"{type(given).__name__}{f' of {len(given)}' if hasattr(given, '__len__') else ''}: "
                                "write Task.detection(decode=...)")
            found += [Detected.of(one) for one in given]
            truths += [Truth.of(one) for one in targets]
    if not any(len(truth.labels) for truth in truths):
        raise _nothing(batches, ", or no image has a box")
    return 100 * average_precision(found, truths, ious)


__all__ = ["explained", "main_output", "mean_ap", "mean_iou", "right_tokens", "top1", "top5"]
