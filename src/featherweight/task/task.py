"""What a network is for: how to feed it, train it, calibrate it and score it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from featherweight.errors import FeatherweightError, TaskError
from featherweight.task import losses, scores
from featherweight.task.batches import Batch, Predict
from featherweight.task.boxes import Stacked
from featherweight.task.nests import described, has_nan, tensors
from featherweight.task.pairs import Loader, pairs

Split = Callable[[], Iterable[Batch]]
SPLITS = ("train", "calibration", "validation", "test")


class Pass(Iterator[Batch]):
    """One pass over a split, which knows its name and which batch it gave last, from 0; -1 before the first."""

    def __init__(self, split: str, batches: Iterator[Batch]) -> None:
        self.split, self.number, self.batches = split, -1, batches

    def __next__(self) -> Batch:
        batch = next(self.batches)
        self.number += 1
        return batch

    def __str__(self) -> str:
        return f"the {self.split} split" + (f", batch {self.number}" if self.number >= 0 else "")


@dataclass(frozen=True)
class Task:
    """Data and judgement. The four splits are kept apart by who may read them.

    Each split is a function that starts a fresh pass over batches ``(inputs, target)``, or whatever can be gone through
    anew (a DataLoader, a list); ``inputs`` is a tensor, a tuple or a dict. Arrays of numpy become tensors, those of
    float64 float32. ``train`` feeds Fits (reshuffle inside the function if wanted), ``calibration`` feeds plans
    (ranges, scores), ``validation`` measures every step and guides choices, ``test`` is read once, by the final
    measurement.

    loss: ``loss(output, target)`` -> scalar tensor.
    score: ``score(predict, batches)`` -> float, higher is better; ``predict`` is the Network or the deployed file.

    Example:
        >>> batches = [(images, torch.arange(32) % 4)]
        >>> task = fw.Task(calibration=lambda: batches, validation=lambda: batches, score=fw.scores.top1)
        >>> task.has("test")
        False
    """

    train: Split | Iterable[Batch] | None = None
    calibration: Split | Iterable[Batch] | None = None
    validation: Split | Iterable[Batch] | None = None
    test: Split | Iterable[Batch] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    score: Callable[[Predict, Iterable[Batch]], float] | None = None
    score_name: str = "score"

    def has(self, split: str) -> bool:
        return getattr(self, split) is not None

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        """A fresh pass over ``split``, at most ``limit`` batches of it.

        Raises TaskError for a split that was not given, cannot be gone through, gives no pairs or inputs that are NaN,
        or raises an error itself.
        """
        return Pass(split, self._checked(split, limit))

    def _checked(self, split: str, limit: int | None) -> Iterator[Batch]:
        for index, batch in enumerate(itertools.islice(_told(self.start(split), split), limit)):
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise TaskError(
                    f"the {split} split gave {type(batch).__name__}; expected pairs (inputs, target), "
                    "target None where there is none"
                )
            inputs, target = tensors(batch[0]), tensors(batch[1])
            if has_nan(inputs):
                raise TaskError(f"batch {index} of the {split} split has inputs that are NaN; look at that data")
            yield inputs, target

    def start(self, split: str) -> Iterable[Batch]:
        """What a pass over ``split`` goes through, as the user gave it; it has a length if that has one."""
        if split not in SPLITS:
            raise TaskError(f"no split named {split!r}; expected one of {', '.join(SPLITS)}")
        given = getattr(self, split)
        if given is None:
            raise TaskError(
                f"this needs the task's {split} split and none was given; write Task({split}=lambda: my_loader, ...)"
            )
        if isinstance(given, Iterator):
            raise TaskError(f"the {split} split is a {type(given).__name__}, which can be gone through only once; "
                            f"write Task({split}=lambda: my_batches(), ...), or give a list or a DataLoader")
        try:
            made = given() if callable(given) else given
        except Exception as error:
            raise TaskError(f"your {split} split raised {type(error).__name__}: {error}") from error
        if not isinstance(made, Iterable) and not hasattr(made, "__getitem__"):
            raise TaskError(f"the {split} split gives a {type(made).__name__}; expected batches (inputs, target): a "
                            "DataLoader, a list, or a function that starts a pass over them")
        batches: Iterable[Batch] = made
        return batches

    def require(self, *names: str) -> None:
        """Raises a TaskError naming the first of ``names`` (splits, "loss", "score") that was not given."""
        for name in names:
            if getattr(self, name) is None:
                raise TaskError(f"this needs the task's {name} and none was given; write Task({name}=..., ...)")

    # ---- the common kinds
    @classmethod
    def classification(cls, train: Loader | None = None, validation: Loader | None = None, *,
                       calibration: Loader | None = None, test: Loader | None = None, label_smoothing: float = 0.0,
                       k: int = 1) -> Self:
        """One class for each sample: cross entropy, and the share of right answers (among the ``k``, 1 or 5, largest).

        train, validation, test: DataLoaders, Hugging Face ones too, lists, or functions that start a pass; batches are
            (inputs, target), (input, input, ..., target), or mappings with "labels". calibration: None takes ``train``.
        The logits are found in the model's outputs as ``fw.scores.main_output`` finds them. Raises TaskError for
        another k.

        Example:
            >>> loader = [(images, torch.arange(32) % 4)]
            >>> task = fw.Task.classification(loader, loader)
            >>> task.score_name, task.score(network, task.batches("validation")) <= 100
            ('top-1 %', True)
        """
        if k not in (1, 5):
            raise TaskError(f"classification(k={k}); expected 1 or 5, or a score of your own: fw.Task(score=...)")
        loss = partial(losses.cross_entropy, label_smoothing=label_smoothing)
        score = scores.top1 if k == 1 else scores.top5
        return cls(**pairs(train, validation, calibration, test), loss=loss, score=score, score_name=f"top-{k} %")

    @classmethod
    def segmentation(cls, train: Loader | None = None, validation: Loader | None = None, *,
                     calibration: Loader | None = None, test: Loader | None = None, ignore: int = 255) -> Self:
        """One class for each pixel: cross entropy, and the mean intersection over union; ``ignore``: the target of
        pixels that do not count. Batches as in ``classification``, targets [n, h, w].

        Example:
            >>> maps = [(torch.randn(2, 3, 8, 8), torch.randint(5, (2, 8, 8)))]
            >>> fw.Task.segmentation(maps, maps).score_name
            'mean IoU %'
        """
        return cls(**pairs(train, validation, calibration, test),
                   loss=partial(losses.cross_entropy, ignore_index=ignore),
                   score=partial(scores.mean_iou, ignore=ignore), score_name="mean IoU %")

    @classmethod
    def regression(cls, train: Loader | None = None, validation: Loader | None = None, *,
                   calibration: Loader | None = None, test: Loader | None = None) -> Self:
        """Numbers: mean squared error, and the share of the targets' variance that is explained (R^2), in percent.
        Batches as in ``classification``, targets of the outputs' shape, or [n] for outputs [n, 1].

        Example:
            >>> rows = [(torch.randn(8, 4), torch.randn(8))]
            >>> fw.Task.regression(rows, rows).score_name
            'R^2 %'
        """
        return cls(**pairs(train, validation, calibration, test), loss=losses.squared_error, score=scores.explained,
                   score_name="R^2 %")

    @classmethod
    def language(cls, train: Loader | None = None, validation: Loader | None = None, *,
                 calibration: Loader | None = None, test: Loader | None = None, shift: bool = True,
                 ignore: int = -100) -> Self:
        """One token for each place: cross entropy, and the share of right tokens. Batches as in ``classification``,
        targets [n, t] for logits [n, t, vocabulary].

        shift: the target of a place is the token after it, as where targets are the inputs themselves (Hugging Face's
            causal models); False for masked models. ignore: targets that do not count.

        Example:
            >>> tokens = torch.randint(9, (2, 6))
            >>> loader = [{"input_ids": tokens, "labels": tokens}]
            >>> fw.Task.language(loader, loader).score_name
            'right tokens %'
        """
        return cls(**pairs(train, validation, calibration, test),
                   loss=partial(losses.token_loss, shift=shift, ignore=ignore),
                   score=partial(scores.right_tokens, shift=shift, ignore=ignore), score_name="right tokens %")


    @classmethod
    def detection(cls, train: Loader | None = None, validation: Loader | None = None, *,
                  calibration: Loader | None = None, test: Loader | None = None,
                  loss: Callable[[Any, Any], Tensor] | None = None, decode: Callable[[Any], Any] | None = None) -> Self:
        """Objects in images: mean average precision over IoU 0.5 to 0.95, as COCO has it, in percent.

        Batches are (images, targets): images [n, c, h, w] or a list of [c, h, w] of one size; of each image a target
            {"boxes": [k, 4] as x0, y0, x1, y1, "labels": [k]}. calibration: None takes ``train``.
        decode: makes, of what the model gives, a {"boxes", "scores", "labels"} for each image; None where the model
            gives that itself, as torchvision's detectors do. loss: of outputs and targets, for steps that train.

        Example:
            >>> truth = [{"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}]
            >>> task = fw.Task.detection([(torch.zeros(1, 3, 8, 8), truth)], [(torch.zeros(1, 3, 8, 8), truth)])
            >>> task.score(lambda x: [{**truth[0], "scores": torch.ones(1)}], task.batches("validation"))
            100.0
        """
        return cls(**{split: None if given is None else Stacked(given) for split, given in pairs(
            train, validation, calibration, test).items()}, loss=loss,
            score=partial(scores.mean_ap, decode=decode), score_name="mAP %")


@dataclass(frozen=True)
class ToldLoss:
    """The user's loss; an error in it says whose it is, and what it was given."""

    given: Callable[[Any, Any], Tensor]

    def __call__(self, output: Any, target: Any) -> Tensor:
        try:
            return self.given(output, target)
        except FeatherweightError:
            raise
        except Exception as error:
            without = "; give pairs (inputs, target) there, or leave out what takes the loss" if target is None else ""
            raise TaskError(f"your loss raised {type(error).__name__}: {error} (for an output {described(output)} and "
                            f"a target {described(target)}){without}") from error


@dataclass(frozen=True)
class ToldScore:
    """The user's score as a number; an error in it says whose it is, and at which batch of which split."""

    given: Callable[[Predict, Iterable[Batch]], float]

    def __call__(self, predict: Predict, batches: Iterable[Batch]) -> float:
        on = f" on {batches}" if isinstance(batches, Pass) else ""
        try:
            found = self.given(predict, batches)
        except FeatherweightError:
            raise
        except Exception as error:
            on = f" on {batches}" if isinstance(batches, Pass) else ""
            raise TaskError(f"your score function raised {type(error).__name__}: {error}{on}") from error
        try:
            if isinstance(found, str):
                raise TypeError
            return float(found)
        except (TypeError, ValueError) as error:
            raise TaskError(f"your score function gave {described(found)}{on}; expected a number, higher is better: "
                            "score(predict, batches) -> float") from error


def told(task: Task) -> Task:
    """The same task, with a loss and a score whose errors say whose they are."""
    loss, score = task.loss, task.score
    return replace(task, loss=loss if loss is None or isinstance(loss, ToldLoss) else ToldLoss(loss),
                   score=score if score is None or isinstance(score, ToldScore) else ToldScore(score))


def _told(batches: Iterable[Any], split: str) -> Iterator[Any]:
    """The same batches; an error in making them says whose it is, and at which batch."""
    number = 0
    try:
        for batch in batches:
            yield batch
            number += 1
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"your {split} split raised {type(error).__name__} at batch {number}: {error}") from error


__all__ = ["SPLITS", "Pass", "Split", "Task", "ToldLoss", "ToldScore", "told"]
