"""What the library's functions are given: a network, a task, a listener, a folder. A wrong one is told before any
work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.task import Task


def check_given(who: str, network: Any, task: Any, out: Any = None, progress: Any = None) -> None:
    """Raises RecipeError where ``who``, a function, was given something else than is meant."""
    check_network(who, network)
    check_task(who, task)
    check_progress(who, progress)
    check_out(who, out)


def check_network(who: str, given: Any) -> None:
    """Raises RecipeError where ``who``, a function, was given no captured network."""
    if not isinstance(given, Network):
        parts = getattr(given, "parts", None)
        instead = (f"one of its parts: assembly.parts[{next(iter(parts))!r}]" if parts else
                   "fw.capture(model, example_inputs) first")
        raise RecipeError(f"{who} takes a Network, not a {type(given).__name__}; {who} {instead}")


def check_task(who: str, given: Any) -> None:
    """Raises RecipeError where ``who`` was given no task."""
    if not isinstance(given, Task):
        raise RecipeError(f"{who} was given task={given!r}; expected a fw.Task, as in "
                          "fw.Task.classification(train, validation)")


def check_progress(who: str, given: Any) -> None:
    """Raises RecipeError where ``who`` was given a listener that cannot be called."""
    if given is not None and not callable(given):
        raise RecipeError(f"{who} was given progress={given!r}; expected a function of (what, done, total, figures), "
                          f"as in {who}(..., progress=print)")


def check_out(who: str, given: Any) -> None:
    """Raises RecipeError where ``who`` was given no name of a folder, or that of a file."""
    if given is None:
        return
    named = isinstance(given, (str, os.PathLike)) and "\0" not in str(given)
    file = next((place for place in (Path(given), *Path(given).parents) if place.exists() and not place.is_dir()),
                None) if named else None
    if not named or file is not None:
        why = f", and {file} is a file" if file is not None else ""
        raise RecipeError(f'{who} was given out={given!r}{why}; expected a folder, as in {who}(..., out="out")')


__all__ = ["check_given", "check_network", "check_out", "check_progress", "check_task"]
