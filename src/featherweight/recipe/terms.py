"""What the loss of a training was the sum of, epoch by epoch, kept beside its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from featherweight.errors import FileError
from featherweight.recipe.writing import OVER, read_json, write_json

#: called with (what, done, total, figures) as work goes on
Tell = Callable[[str, float, float, Mapping[str, float]], None]
FILE = "terms.json"
TOOK = "took.json"  #: seconds that the step worked
#: figures of a training that are no terms of its loss
OTHERS = ("images_per_s",)


@dataclass(frozen=True)
class Terms:
    """A listener that passes progress on, and keeps the mean of each term over each of ``epochs`` epochs in ``folder``.

    A resumed training goes on with the same file, and writes the epoch in which it was killed again.
    """

    folder: Path
    epochs: int
    write: bool
    tell: Tell

    def __call__(self, what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        self.tell(what, done, total, figures)
        epoch = done * self.epochs / total if total else 0.0
        if self.write and self.epochs and abs(epoch - round(epoch)) * total < 0.5 * self.epochs and "loss" in figures:
            rows = read(self.folder)
            rows[str(round(epoch))] = {name: float(value) for name, value in figures.items() if name not in OTHERS}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / FILE, rows)


def read(folder: Path) -> dict[str, dict[str, float]]:
    """Epoch, from 1, as text -> the loss and its terms by name; nothing where no training was followed. Raises
    FileError for a file that is none."""
    file = folder / FILE
    if not file.exists():
        return {}
    try:
        return TypeAdapter(dict[str, dict[str, float]]).validate_python(read_json(file))
    except ValidationError as error:
        raise FileError(f"{file} is damaged ({error.errors()[0]['msg']}); {OVER}") from error


def curves(folder: Path) -> dict[str, list[float]]:
    """The loss and each of its terms by name, a number an epoch."""
    rows = [row for _, row in sorted(read(folder).items(), key=lambda item: int(item[0]))]
    return {name: [row[name] for row in rows if name in row] for name in (rows[0] if rows else {})}


def note_time(folder: Path, seconds: float) -> float:
    """Keeps how long the step whose folder this is has worked; gives the same."""
    write_json(folder / TOOK, seconds)
    return seconds


def time_of(folder: Path) -> float | None:
    """What ``note_time`` kept; None where nothing was. Raises FileError for a file that is none."""
    file = folder / TOOK
    if not file.exists():
        return None
    found = read_json(file)
    if not isinstance(found, float | int) or isinstance(found, bool):
        raise FileError(f"{file} holds no number of seconds; {OVER}")
    return float(found)


def by_epoch(progress: Tell, epochs: int | None) -> Tell:
    """A listener that tells ``progress`` of a training's epoch, from 1, too; ``progress`` itself without epochs."""
    if not epochs:
        return progress

    def tell(what: str, done: float, total: float, facts: Mapping[str, float]) -> None:
        epoch = min(epochs, 1 + int(max(done - 1, 0) * epochs // max(total, 1)))
        progress(what, done, total, {**facts, "epoch": epoch})

    return tell
