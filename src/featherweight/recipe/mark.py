"""What a job is, in plain data and in words: by this a folder's state is known to belong to it, or to another one."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from featherweight import __version__, deploy
from featherweight.network import Network
from featherweight.network.file.digest import digest
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps.content import content
from featherweight.steps.fingerprint import canonical
from featherweight.task import Batch, Task, described

#: of a job's state, as ``fingerprint.json`` says it
JOB_FORMAT = 5
#: formats that are gone on from no more -> the version that wrote them
OLD_JOB_FORMATS = {1: "0.1", 2: "0.2.0.dev0", 3: "0.2.0.dev0", 4: "0.2.0"}
#: batches of each split that are compared
FIRST = 2
#: splits that are compared before the work; the test split is read, and compared, at its end
EARLY = ("train", "calibration", "validation")


def job_mark(network: Network, task: Task, steps: Iterable[Any], target: str, batches: Mapping[str, list[Batch]],
             **options: Any) -> dict[str, Any]:
    """The mark of a job: what its results depend on. batches: the first ones of each split."""
    package = deploy.target(target).package
    return {
        "format": JOB_FORMAT, "recipe": canonical(tuple(steps)), "network": digest(network), "target": target,
        **options,
        "versions": {"featherweight": __version__, "python": platform.python_version(), "torch": str(torch.__version__),
                     package: metadata.version(package)},
        "loss": function_mark(task.loss), "score": function_mark(task.score), "score_name": task.score_name,
        **{split: split_mark(batches[split], task, split) if split in batches else None for split in EARLY}}


# ---- data

def first_batches(task: Task, split: str, seed: int) -> list[Batch]:
    """The first batches of a split, of a pass whose global random generators begin at ``seed``."""
    with generators_kept():
        seed_all(seed_from(seed, "first batches", split))
        return list(task.batches(split, FIRST))


def split_mark(batches: Iterable[Batch], task: Task, split: str) -> dict[str, Any]:
    """Inputs and targets of the first batches by digest, and what they look like; and what the whole split is."""
    held = list(batches)
    return {"inputs": content([given for given, _ in held]), "targets": content([target for _, target in held]),
            "form": [f"{_form(given)} -> {_form(target)}" for given, target in held],
            "whole": content(getattr(task, split))}


def _form(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_form(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_form, value))})"
    return described(value) if isinstance(value, Tensor) else type(value).__name__


# ---- functions

def function_mark(given: Any) -> str | None:
    """A function by its name and by what it does."""
    if given is None:
        return None
    kind = given if hasattr(given, "__qualname__") else type(given)
    return f"{kind.__module__}.{kind.__qualname__} {content(given)[:16]}"


# ---- in words

def differences(found: Mapping[str, Any], mark: Mapping[str, Any]) -> dict[str, str]:
    """What of ``mark`` is another in ``found``, each with how; "" where the name says all."""
    return {key: _said(key, found.get(key), mark[key]) for key in mark if found.get(key) != mark[key]}


def _said(key: str, was: Any, now: Any) -> str:
    if key in (*EARLY, "test"):
        return _split_said(key, was, now)
    if key == "versions" and isinstance(was, Mapping):
        return ", ".join(f"{name} {was.get(name, 'none')} -> {now.get(name, 'none')}"
                         for name in dict.fromkeys((*was, *now)) if was.get(name) != now.get(name))
    if key in ("loss", "score") and isinstance(was, str) and isinstance(now, str):
        old, new = was.partition(" ")[0], now.partition(" ")[0]
        return f"{old} -> {new}" if old != new else f"{new} is written otherwise than it was"
    plain = all(isinstance(v, (str, int, float, bool)) for v in (was, now)) and key != "network"
    return f"{was!r} -> {now!r}" if plain else ""


def _split_said(split: str, was: Any, now: Any) -> str:
    if not isinstance(was, Mapping) or not isinstance(now, Mapping):
        return "there is one now" if now else "there is none now"
    if was.get("form") != now.get("form"):
        return f"its first batches were {was.get('form')} and are {now.get('form')}"
    other = [what for what in ("inputs", "targets") if was.get(what) != now.get(what)]
    if not other:
        return "its first batches are the same, but not what gives the rest: the data, or the function that reads it"
    return f"its first batches have other {' and other '.join(other)}"


__all__ = ["EARLY", "FIRST", "JOB_FORMAT", "OLD_JOB_FORMATS", "differences", "first_batches", "function_mark",
           "job_mark", "split_mark"]
