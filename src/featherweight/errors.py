"""The errors that featherweight raises: one base, small leaves.

Every message says what was given, what was expected, and the line to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeatherweightError(Exception):
    """Base of every error that the library raises on purpose.

    Example:
        >>> try:
        ...     fw.load("missing.fw")
        ... except fw.errors.FeatherweightError as error:
        ...     print(type(error).__name__)
        FileError
    """


class CaptureError(FeatherweightError):
    """A model could not be captured as a graph.

    Example:
        >>> fw.capture(nn.Flatten(), "no tensor")
        Traceback (most recent call last):
        featherweight.errors.CaptureError: ...
    """


class InputError(FeatherweightError):
    """A network was called with inputs that do not fit its signature.

    Example:
        >>> network(images[:, :, :5])
        Traceback (most recent call last):
        featherweight.errors.InputError: ...
    """


class FileError(FeatherweightError):
    """A file is not what it should be: truncated, damaged, of another format or hostile.

    Example:
        >>> fw.load("missing.fw")
        Traceback (most recent call last):
        featherweight.errors.FileError: ...
    """


class RecipeError(FeatherweightError):
    """A recipe, a step or its options make no sense (together).

    Example:
        >>> fw.Recipe([fw.quantize.Quantize(), fw.prune.Channels(macs=0.5)])
        Traceback (most recent call last):
        featherweight.errors.RecipeError: ...
    """


class PlanError(FeatherweightError):
    """A plan does not fit the network it is applied to.

    Example:
        >>> from dataclasses import replace
        >>> plan = fw.prune.Channels(macs=0.5).plan(network, task)
        >>> replace(plan, keep={"7": (0,)}).apply(network)
        Traceback (most recent call last):
        featherweight.errors.PlanError: ...
    """


class ExportError(FeatherweightError):
    """A network could not be exported to a runtime, or ran differently there.

    Example:
        >>> fw.deploy.target("cupboard")
        Traceback (most recent call last):
        featherweight.errors.ExportError: ...
    """


class Untimed(FeatherweightError):
    """Files wait to be timed on a device that is not this machine; the message says what to do.

    Example:
        >>> folder = "device"
        >>> count = fw.balance.bench_table(network, task, folder)
        >>> fw.prune.Channels(latency=0.5, times=folder).plan(network, task)
        Traceback (most recent call last):
        featherweight.errors.Untimed: ...
    """


class TaskError(FeatherweightError):
    """The task lacks what a step needs: a split, a loss, a score.

    Example:
        >>> fw.recover.Train().fit(network, fw.Task(), fw.steps.Context())
        Traceback (most recent call last):
        featherweight.errors.TaskError: ...
    """


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A sentence naming the closest of ``known`` to ``given``, else all of them.

    Example:
        >>> fw.errors.did_you_mean("int9", ["int8", "uint8", "fp16"])
        "did you mean 'int8'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
