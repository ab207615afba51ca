"""What a function, a module or an object is known by: another mark for all that changes what it does, and no other."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import featherweight as fw
from featherweight.errors import RecipeError
from featherweight.steps.content import content
from featherweight.steps.fingerprint import canonical
from test_recipe import Scale, batches, squeeze, task, tiny

WEIGHT = 1.0


class Scoring:
    """A score with state of its own."""

    def __init__(self, by: Any, times: int = 1) -> None:
        self.by, self.times = by, times

    def __call__(self, predict: Any, given: Any) -> float:
        return float(np.sum(self.by)) * self.times + sum(0.0 for _ in given)


class Scaled(nn.Module):
    """Plain attributes decide what it gives."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.inner.by = by  # type: ignore[assignment]
        nn.init.ones_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) * self.inner.by


@dataclass(frozen=True)
class Options:
    by: Any


def closing(over: Any) -> Callable[[], Any]:
    return lambda: over


def named(weight: float) -> Callable[[], float]:
    """A function of a global."""
    space = {"__name__": __name__, "W": weight}
    exec("def inner():\n    return W\ndef outer():\n    return inner() + 1", space)
    return space["outer"]  # type: ignore[return-value]


def rows(by: float, count: int = 6) -> TensorDataset:
    return TensorDataset(torch.arange(count), torch.full((count,), by))


def kind_with(by: float) -> Any:
    class Own:
        def __call__(self) -> float:
            return 0.0

    Own.__call__ = named(by)  # type: ignore[method-assign, assignment]
    return Own()


MAKERS: dict[str, Callable[[Any], Any]] = {
    "a number closed over": closing, "a list closed over": lambda by: closing([by]),
    "a dict closed over": lambda by: closing({"by": by}), "a set closed over": lambda by: closing({by, 7.0}),
    "an array closed over": lambda by: closing(np.array([by])), "objects in an array": lambda by: closing(
        np.array([by, "text"], dtype=object)),
    "a tensor in a list": lambda by: closing([torch.tensor([by])]), "a nest": lambda by: closing([{"a": [(by,)]}]),
    "a function closed over": lambda by: closing(closing([by])), "a global, through another function": named,
    "an attribute": Scoring, "a list as attribute": lambda by: Scoring([by]),
    "a method": lambda by: Scoring(by).__call__,
    "a function that is cached": lambda by: functools.cache(closing(by)),
    "a partial": lambda by: functools.partial(closing, by), "options": lambda by: Options([by]),
    "a module's plain attribute": Scaled, "the code of a class": kind_with,
    "a list": lambda by: [(torch.zeros(2), torch.tensor(by))], "a loader": lambda by: DataLoader(rows(by), 2),
    "the length of a loader": lambda by: DataLoader(rows(0.0, int(by) + 3), 2),
    "a part": lambda by: Subset(rows(by), [1, 2]), "another part": lambda by: Subset(rows(0.0), [int(by)]),
    "parts": lambda by: ConcatDataset([rows(0.0), rows(by)]),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_changes_what_is_done_has_another_mark(make: Callable[[Any], Any]) -> None:
    assert content(make(1.0)) == content(make(1.0))
    assert content(make(1.0)) != content(make(2.0))


def test_what_fills_while_a_job_runs_makes_no_difference() -> None:
    seen: list[int] = []

    def counting() -> int:
        seen.append(1)
        return len(seen)

    score, own = Scoring(2.0), [np.random.default_rng(0)]
    marks = content(counting), content(score), content(closing(own))
    counting()
    score.times = 5
    assert (content(counting), content(score)) == marks[:2]
    assert content(closing([np.random.default_rng(1)])) == marks[2], "a generator is known by its kind"


def test_what_holds_itself() -> None:
    held: list[Any] = [1]
    held.append(held)
    node = Scoring(1.0)
    node.by = node
    assert content(held) != content([1])
    assert content(node) != content(Scoring(1.0))


def test_the_same_in_another_process() -> None:
    code = "import test_content as t\nprint(*(t.content(make(1.0)) for make in t.MAKERS.values()))"
    paths = [str(Path(__file__).parent), str(Path(fw.__file__).parents[1])]
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(paths)}).stdout
    assert found.split() == [content(make(1.0)) for make in MAKERS.values()]


# ---- what a folder's state belongs to

def corrected() -> Iterator[Any]:
    """The labels of all batches but the first two are others."""
    for number, (x, y) in enumerate(batches(3)):
        yield x, y if number < 2 else 2 - y


def teacher(by: float) -> Any:
    return fw.recover.Train(epochs=1, beside=(fw.distill.Logits(teacher=Scaled(by)),))


def stored(by: float, folder: Path) -> Any:
    """A teacher in a file of the same name."""
    fw.capture(Scaled(by).eval(), torch.zeros(2, 4)).save(folder / "teacher.fw")
    return fw.recover.Train(epochs=1, beside=(fw.distill.Logits(teacher=str(folder / "teacher.fw")),))


def test_a_score_or_data_behind_the_first_batches_that_changed_are_refused(tmp_path: Path) -> None:
    squeeze(tiny(), task(score=Scoring([1.0])), fw.Recipe([Scale()]), out=tmp_path / "score")
    with pytest.raises(RecipeError, match="other: score"):
        squeeze(tiny(), task(score=Scoring([5.0])), fw.Recipe([Scale()]), out=tmp_path / "score")
    squeeze(tiny(), task(), fw.Recipe([Scale()]), out=tmp_path / "data")
    with pytest.raises(RecipeError, match=r"other: validation.*first batches are the same, but not what gives"):
        squeeze(tiny(), task(validation=corrected), fw.Recipe([Scale()]), out=tmp_path / "data")


def test_teachers_are_known_by_what_they_do(tmp_path: Path) -> None:
    assert canonical(teacher(1.0)) == canonical(teacher(1.0))
    assert canonical(teacher(1.0)) != canonical(teacher(2.0))
    assert canonical(stored(1.0, tmp_path)) == canonical(stored(1.0, tmp_path))
    assert canonical(stored(1.0, tmp_path)) != canonical(stored(2.0, tmp_path))


def test_a_step_of_ones_own_is_known_by_its_code() -> None:
    first, second = canonical(Scale()), canonical(fw.prune.Weights(sparsity=0.5))
    assert len(first) == 3, "kind, options, code"
    assert len(second) == 2
