"""The folder of a search, and the trials in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from featherweight.balance.combine.trials import Trials
from featherweight.judge.elsewhere import Elsewhere
from featherweight.network import Network
from featherweight.recipe.files import State, check_alone
from featherweight.recipe.mark import EARLY, first_batches, job_mark, split_mark
from featherweight.recipe.trial import check_finite, tried
from featherweight.steps import Step
from featherweight.task import Task


@contextmanager
def folder_of(out: str | Path | None) -> Iterator[Path]:
    """The folder ``out``, or one that is gone at the end."""
    with nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory(prefix="featherweight-") as place:
        yield Path(place)


@contextmanager
def trials_of(network: Network, task: Task, target: str, folder: Path, memory: bool, resume: bool,
              device: Elsewhere | None = None, steps: Sequence[Step] = (), kind: str = "", *, threads: int, seed: int,
              seconds: float) -> Iterator[Trials]:
    """The trials in a folder, which is this process's alone meanwhile. device: where latencies come from. steps: tried
    on a batch, as before a job. kind: of the job (in ``JOBS``) that the folder around it is for, "" where none leaves a
    result there. Raises RecipeError where the folder holds those of another network, task or target, or the one around
    it another kind of job, TaskError for a task that does not fit the network."""
    check_finite(network, "the network to be compressed")
    begun = {split: first_batches(task, split, seed) for split in EARLY if task.has(split)}
    known, state = tried(network, task, begun, steps), State(folder)
    mark = job_mark(network, task, (), target, begun, seed=seed, threads=threads, seconds=seconds, memory=memory,
                    times=None if device is None else str(device.folder))
    if kind:
        check_alone(folder.parent, kind, resume)
    with state.held():
        state.claim(mark, resume,
                    lambda split: split_mark(first_batches(task, split, seed), task, split) if split in EARLY else None)
        yield Trials(network, known, target, folder, threads, seed, seconds, memory, device)


__all__ = ["folder_of", "trials_of"]
