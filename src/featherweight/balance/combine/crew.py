"""Combinations made ready by several workers of Ray, on this machine or a cluster whose machines all see the folder.

Workers only plan, apply, export and score; what is tried, and how long it takes, is this process's alone, and nobody
works while it times. So the number of workers changes no answer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featherweight.balance.combine.trials import Many, Trials
from featherweight.errors import RecipeError
from featherweight.network import load
from featherweight.network.file.allowed import beyond, target_name
from featherweight.recipe.types import named_types
from featherweight.steps import Rewrite
from featherweight.task import Task

#: combinations that are made ready together, for each worker
EACH = 2
#: how often a worker that was lost is replaced, before this process does the work itself
AGAIN = 2


@dataclass(frozen=True)
class Kit:
    """All that a worker needs. file: the original network; types, operators: what it is loaded with. torch_threads:
    sums in another number of threads are rounded otherwise, and decide otherwise."""

    file: Path
    types: dict[str, type]
    operators: tuple[str, ...]
    task: Task
    target: str
    folder: Path
    threads: int
    seed: int
    memory: bool
    torch_threads: int

    @classmethod
    def of(cls, trials: Trials) -> Kit:
        """What workers of a search need; the network is written for them."""
        file = (trials.folder / "networks" / "original.fw").resolve()
        file.parent.mkdir(parents=True, exist_ok=True)
        trials.original.save(file)
        operators = beyond(target_name(node.target) for node in trials.original.calls())
        return cls(file, named_types(trials.original), tuple(operators), trials.task, trials.target,
                   trials.folder.resolve(), trials.threads, trials.seed, trials.memory, torch.get_num_threads())

    def trials(self) -> Trials:
        """The trials as the one that searches has them, but for what times them."""
        network: Any = load(self.file, types=self.types, operators=self.operators)
        return Trials(network, self.task, self.target, self.folder, self.threads, self.seed, 0.0, self.memory)


@dataclass(frozen=True)
class Crew:
    """Workers of Ray. kit: a reference to their ``Kit``."""

    ray: Any
    kit: Any

    def __call__(self, trials: Trials, many: Many) -> None:
        """Makes all of ``many`` ready. What is lost with a worker is done again by another one, and at last here."""
        work = self.ray.remote(max_retries=AGAIN)(_made_ready)
        waiting = {work.remote([self.kit], what, tuple(steps)): (what, steps) for what, steps in many}
        for reference, (what, steps) in waiting.items():
            try:
                self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from error
            except self.ray.exceptions.RayError:
                trials.ready(what, steps)


@contextmanager
def crew_of(workers: int, trials: Trials) -> Iterator[Crew]:
    """So many workers: of the cluster that ``ray.init`` was called for (or RAY_ADDRESS names), else on this machine.
    Raises RecipeError where Ray is not installed, or the task cannot be sent."""
    try:
        import ray
    except ImportError as error:
        raise RecipeError(f"search was given workers={workers}, which needs Ray ({error}); write "
                          "pip install 'featherweight[ray]', or leave workers out") from error
    own = not ray.is_initialized()
    if own:
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        ray.init(**local, log_to_driver=False, logging_level="error")
    try:
        yield Crew(ray, _sent(ray, Kit.of(trials)))
    finally:
        if own:
            ray.shutdown()


def _sent(ray: Any, kit: Kit) -> Any:
    try:
        return ray.put(kit)
    except Exception as error:  # whatever the pickling of the user's own objects raises
        raise RecipeError(f"the task cannot be sent to workers: {error}; let its splits be functions, or lists of "
                          "tensors, rather than open files, generators or cached functions") from error


def _made_ready(kit: Sequence[Any], what: str, steps: tuple[Rewrite, ...]) -> None:
    """Runs in a worker."""
    _opened(kit[0]).ready(what, steps)


@functools.lru_cache(maxsize=1)
def _opened(reference: Any) -> Trials:
    import ray

    kit: Kit = ray.get(reference)
    torch.set_num_threads(kit.torch_threads)
    return kit.trials()


__all__ = ["AGAIN", "EACH", "Crew", "Kit", "crew_of"]
