"""Combinations made ready by several workers of Ray, on this machine or a cluster whose machines all see the folder.

Workers only plan, apply, export and score; what is tried, and how long it takes, is this process's alone, and nobody
works while it times. So the number of workers changes no answer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featherweight.balance.combine.trials import Many, Trials
from featherweight.errors import RecipeError
from featherweight.judge.elsewhere import Unmeasured, given, known_here, times_of
from featherweight.judge.layer_times import TimedLayer
from featherweight.network import load
from featherweight.network.file.allowed import beyond, target_name
from featherweight.recipe.types import named_types
from featherweight.steps import Step
from featherweight.task import Task

#: combinations that are made ready together, for each worker
EACH = 4
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
        """What workers of a search need."""
        trials.start()
        file = (trials.folder / "original" / "network.fw").resolve()
        operators = beyond(target_name(node.target) for node in trials.original.calls())
        return cls(file, named_types(trials.original), tuple(operators), trials.task, trials.target,
                   trials.folder.resolve(), trials.threads, trials.seed, trials.memory, torch.get_num_threads())

    def trials(self) -> Trials:
        """The trials as the one that searches has them, but for what times them."""
        network: Any = load(self.file, types=self.types, operators=self.operators)
        return Trials(network, self.task, self.target, self.folder, self.threads, self.seed, 0.0, self.memory)


@dataclass(frozen=True)
class Workers:
    """Workers of Ray. kit: a reference to their ``Kit``."""

    ray: Any
    kit: Any

    def __call__(self, trials: Trials, many: Many) -> None:
        """Makes all of ``many`` ready. What is lost with a worker is done again by another one, and at last here.
        Layers whose latency a plan wants to know are timed here when nobody works, and the plan is made again."""
        work = self.ray.remote(max_retries=AGAIN)(_made_ready)
        while many:
            known = self.ray.put(known_here(trials.target))
            waiting = [work.remote([self.kit], known, what, tuple(steps)) for what, steps in many]
            asked = [self._done(trials, reference, *one) for reference, one in zip(waiting, many, strict=True)]
            layers = {key: layer for wanted in asked for key, layer in wanted.items()}
            if trials.device is not None:
                trials.device.add_layers(layers)
                return
            times_of(trials.target).times(list(layers.values()))
            many = [one for one, wanted in zip(many, asked, strict=True) if wanted]

    def _done(self, trials: Trials, reference: Any, what: str, steps: Sequence[Step]) -> Mapping[str, TimedLayer]:
        """Waits for one; gives the layers that must be timed before it can be."""
        try:
            wanted: Mapping[str, TimedLayer] = self.ray.get(reference)
            return wanted
        except self.ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except self.ray.exceptions.RayError:
            return _asking(trials, known_here(trials.target), what, steps)


@contextmanager
def workers_of(count: int, trials: Trials) -> Iterator[Workers]:
    """So many workers: of the cluster that ``ray.init`` was called for (or RAY_ADDRESS names), else on this machine.
    Raises RecipeError where Ray is not installed, or the task cannot be sent."""
    try:
        import ray
    except ImportError as error:
        raise RecipeError(f"search was given workers={count}, which needs Ray ({error}); write "
                          "pip install 'featherweight[ray]', or leave workers out") from error
    own = not ray.is_initialized()
    if own:
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": count, "include_dashboard": False}
        ray.init(**local, log_to_driver=False, logging_level="error")
    try:
        yield Workers(ray, _sent(ray, Kit.of(trials)))
    finally:
        if own:
            ray.shutdown()


def _sent(ray: Any, kit: Kit) -> Any:
    try:
        return ray.put(kit)
    except Exception as error:  # whatever the pickling of the user's own objects raises
        raise RecipeError(f"the task cannot be sent to workers: {error}; let its splits be functions, or lists of "
                          "tensors, rather than open files, generators or cached functions") from error


def _made_ready(kit: Sequence[Any], known: Mapping[str, float], what: str,
                steps: Sequence[Step]) -> Mapping[str, TimedLayer]:
    """Runs in a worker."""
    return _asking(_opened(kit[0]), known, what, steps)


def _asking(trials: Trials, known: Mapping[str, float], what: str, steps: Sequence[Step]) -> Mapping[str, TimedLayer]:
    """Makes a combination ready without timing; gives the layers that must be timed before that can be."""
    try:
        with given(known):
            trials.ready(what, steps)
    except Unmeasured as wanted:
        return wanted.layers
    return {}


@functools.lru_cache(maxsize=1)
def _opened(reference: Any) -> Trials:
    import ray

    kit: Kit = ray.get(reference)
    torch.set_num_threads(kit.torch_threads)
    return kit.trials()


__all__ = ["AGAIN", "EACH", "Kit", "Workers", "workers_of"]
