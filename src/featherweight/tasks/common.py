"""Loss and score of the common kinds of task, around the user's own batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import TaskError
from featherweight.measure import scores
from featherweight.task import Batch, Predict, Task, call

#: what the target may be called in a batch that is a mapping
TARGETS = ("labels", "label", "targets", "target", "y")
#: whatever can be gone through anew, or a function that starts a pass
Loader = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Pairs:
    """The batches of a loader as pairs (inputs, target): of a tuple the last is the target, of a mapping (Hugging Face)
    what is called as in ``TARGETS``."""

    loader: Loader
    split: str

    def __call__(self) -> Iterator[Batch]:
        if isinstance(self.loader, Iterator):
            raise TaskError(f"the {self.split} batches are a {type(self.loader).__name__}, which can be gone through "
                            "only once; give a DataLoader, a list, or a function that starts a pass")
        for batch in self.loader() if callable(self.loader) else self.loader:
            yield paired(batch, self.split)


def paired(batch: Any, split: str) -> Batch:
    """One batch as (inputs, target). Raises TaskError where it holds no target that is known as one."""
    if isinstance(batch, Mapping):
        name = next((key for key in TARGETS if key in batch), None)
        if name is None:
            raise TaskError(f"a {split} batch has {', '.join(map(repr, batch))} and none of {', '.join(TARGETS)}; give "
                            "batches (inputs, target)")
        return {key: value for key, value in batch.items() if key != name}, batch[name]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise TaskError(f"a {split} batch is a {type(batch).__name__}; expected (inputs, target), or a mapping with "
                    f"{TARGETS[0]!r}")


def _task(train: Loader | None, validation: Loader | None, calibration: Loader | None, test: Loader | None,
          loss: Callable[[Any, Any], Tensor], score: Callable[[Predict, Iterable[Batch]], float], name: str) -> Task:
    def split(loader: Loader | None, which: str) -> Pairs | None:
        return None if loader is None else Pairs(loader, which)

    return Task(split(train, "train"), split(train if calibration is None else calibration, "calibration"),
                split(validation, "validation"), split(test, "test"), loss, score, name)


def classification(train: Loader | None = None, validation: Loader | None = None, *, calibration: Loader | None = None,
                   test: Loader | None = None, label_smoothing: float = 0.0, k: int = 1) -> Task:
    """One class for each sample: cross entropy, and the share of right answers (among the ``k``, 1 or 5, largest).

    train, validation, test: DataLoaders, Hugging Face ones too, lists, or functions that start a pass; batches are
        (inputs, target), (input, input, ..., target), or mappings with "labels". calibration: None takes ``train``.
    The logits are found in the model's outputs as ``fw.scores.main_output`` finds them.

    Example:
        >>> loader = [(images, torch.arange(32) % 4)]
        >>> task = fw.tasks.classification(loader, loader)
        >>> task.score_name, task.score(network, task.batches("validation")) <= 100
        ('top-1 %', True)
    """
    if k not in (1, 5):
        raise TaskError(f"classification(k={k}); expected 1 or 5, or a score of your own: fw.Task(score=...)")
    return _task(train, validation, calibration, test,
                 partial(cross_entropy, label_smoothing=label_smoothing), scores.top1 if k == 1 else scores.top5,
                 f"top-{k} %")


def segmentation(train: Loader | None = None, validation: Loader | None = None, *, calibration: Loader | None = None,
                 test: Loader | None = None, ignore: int = 255) -> Task:
    """One class for each pixel: cross entropy, and the mean intersection over union; ``ignore``: pixels that do not
    count. Batches as in ``classification``, targets [n, h, w].

    Example:
        >>> maps = [(torch.randn(2, 3, 8, 8), torch.randint(5, (2, 8, 8)))]
        >>> fw.tasks.segmentation(maps, maps).score_name
        'mean IoU %'
    """
    return _task(train, validation, calibration, test, partial(cross_entropy, ignore_index=ignore),
                 partial(scores.mean_iou, ignore=ignore), "mean IoU %")


def regression(train: Loader | None = None, validation: Loader | None = None, *, calibration: Loader | None = None,
               test: Loader | None = None) -> Task:
    """Numbers: mean squared error, and the share of the targets' variance that is explained (R^2), in percent. Batches
    as in ``classification``, targets of the outputs' shape, or [n] for outputs [n, 1].

    Example:
        >>> rows = [(torch.randn(8, 4), torch.randn(8))]
        >>> fw.tasks.regression(rows, rows).score_name
        'R^2 %'
    """
    return _task(train, validation, calibration, test, squared_error, explained, "R^2 %")


def language(train: Loader | None = None, validation: Loader | None = None, *, calibration: Loader | None = None,
             test: Loader | None = None, shift: bool = True, ignore: int = -100) -> Task:
    """One token for each place: cross entropy, and the share of right tokens. Batches as in ``classification``, targets
    [n, t] for logits [n, t, vocabulary]. shift: the target of a place is the token after it, as where targets are the
    inputs themselves (Hugging Face's causal models); False for masked models. ignore: targets that do not count.

    Example:
        >>> tokens = torch.randint(9, (2, 6))
        >>> loader = [{"input_ids": tokens, "labels": tokens}]
        >>> fw.tasks.language(loader, loader).score_name
        'right tokens %'
    """
    return _task(train, validation, calibration, test, partial(token_loss, shift=shift, ignore=ignore),
                 partial(right_tokens, shift=shift, ignore=ignore), "right tokens %")


# ---- losses and scores
def cross_entropy(output: Any, target: Any, **options: Any) -> Tensor:
    """Of the logits in an output, [n, classes, ...], and targets [n, ...]."""
    return functional.cross_entropy(scores.main_output(output), torch.as_tensor(target), **options)


def squared_error(output: Any, target: Any) -> Tensor:
    """Mean squared difference."""
    given, wanted = _numbers(output, target)
    return functional.mse_loss(given, wanted)


def _numbers(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    given = scores.main_output(output)
    wanted = torch.as_tensor(target).to(given)
    if wanted.shape != given.shape and wanted.numel() == given.numel():
        wanted = wanted.view(given.shape)
    if wanted.shape != given.shape:
        raise TaskError(f"regression compares outputs {list(given.shape)} with targets {list(wanted.shape)}; both must "
                        "have one shape")
    return given, wanted


def explained(predict: Predict, batches: Iterable[Batch]) -> float:
    """R^2 in percent: 100 (1 - squared error / variance of the targets), over all numbers of all batches."""
    error, total, squares, count = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for inputs, target in batches:
            given, wanted = (t.double() for t in _numbers(call(predict, inputs), target))
            error += float((given - wanted).square().sum())
            total, squares, count = total + float(wanted.sum()), squares + float(wanted.square().sum()), \
                count + wanted.numel()
    if not count:
        raise TaskError("there was nothing to score: the split gave no batches")
    variance = squares - total ** 2 / count
    return 100 * (1 - error / variance) if variance > 0 else 0.0


def _tokens(output: Any, target: Any, shift: bool) -> tuple[Tensor, Tensor]:
    """Logits [n, t, vocabulary] and the tokens wanted there [n, t]."""
    logits, wanted = scores.main_output(output), torch.as_tensor(target)
    if logits.dim() != 3 or wanted.shape != logits.shape[:2]:
        raise TaskError(f"language compares logits [n, t, vocabulary] with targets [n, t]; got {list(logits.shape)} "
                        f"and {list(wanted.shape)}")
    return (logits[:, :-1], wanted[:, 1:]) if shift else (logits, wanted)


def token_loss(output: Any, target: Any, shift: bool = True, ignore: int = -100) -> Tensor:
    """Cross entropy of tokens."""
    logits, wanted = _tokens(output, target, shift)
    return functional.cross_entropy(logits.flatten(0, 1), wanted.to(logits.device).flatten(), ignore_index=ignore)


def right_tokens(predict: Predict, batches: Iterable[Batch], shift: bool = True, ignore: int = -100) -> float:
    """Share of the tokens that count whose largest logit is theirs, in percent."""
    right = seen = 0
    with torch.no_grad():
        for inputs, target in batches:
            logits, wanted = _tokens(call(predict, inputs), target, shift)
            counts = wanted.to(logits.device) != ignore
            right += int(((logits.argmax(2) == wanted.to(logits.device)) & counts).sum())
            seen += int(counts.sum())
    if not seen:
        raise TaskError("there was nothing to score: the split gave no batches, or no token counts")
    return 100.0 * right / seen


__all__ = ["Loader", "Pairs", "classification", "language", "paired", "regression", "segmentation"]
