"""The batches of any loader as pairs (inputs, target)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from featherweight.errors import TaskError
from featherweight.task.batches import Batch

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


def pairs(train: Loader | None, validation: Loader | None, calibration: Loader | None,
          test: Loader | None) -> dict[str, Pairs | None]:
    """The splits of a task by name; the training batches calibrate where there are no others to do it."""
    given = {"train": train, "calibration": train if calibration is None else calibration, "validation": validation,
             "test": test}
    return {split: None if loader is None else Pairs(loader, split) for split, loader in given.items()}


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


__all__ = ["Loader", "Pairs", "paired", "pairs"]
