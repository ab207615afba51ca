"""The errors that featherweight raises: one base, small leaves.

Every message says what was given, what was expected, and the line to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeatherweightError(Exception):
    """Base of every error that the library raises on purpose."""


class CaptureError(FeatherweightError):
    """A model could not be captured as a graph."""


class InputError(FeatherweightError):
    """A network was called with inputs that do not fit its signature."""


class FileError(FeatherweightError):
    """A file is not what it should be: truncated, damaged, of another format or hostile."""


class RecipeError(FeatherweightError):
    """A recipe, a step or its options make no sense (together)."""


class PlanError(FeatherweightError):
    """A plan does not fit the network it is applied to."""


class ExportError(FeatherweightError):
    """A network could not be exported to a runtime, or ran differently there."""


class TaskError(FeatherweightError):
    """The task lacks what a step needs: a split, a loss, a score."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A sentence naming the closest of ``known`` to ``given``, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
