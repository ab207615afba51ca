"""Trials: combinations as they would ship, applied, exported, scored and timed, each kept in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featherweight import deploy, measure
from featherweight.errors import FeatherweightError
from featherweight.measure import Measurement
from featherweight.network import Network
from featherweight.recipe.files import seal, unsealed
from featherweight.recipe.recipe import aimed, plans_made
from featherweight.recipe.types import reloaded
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps import Context, Fit, Rewrite, Step
from featherweight.steps.fingerprint import canonical
from featherweight.task import Task

#: the figures of a trial, as ``Budget`` names them -> how a Measurement has them
COUNTED = {"file_bytes": "file_bytes", "archive_bytes": "archive_bytes", "macs": "macs", "memory": "memory_bytes"}
#: of an original's score, what counts as a small loss
POINTS = 0.01


@dataclass(frozen=True)
class Trial:
    """One combination, measured. what: in words. shares: figure -> what it costs of what the original costs. drop:
    points of the score that are lost. trained: whether it was trained after the cut; probe: whether that was the short
    training of trials. failed: why there is nothing to measure, else "".

    Example:
        >>> found = fw.search(network, task, fw.Budget(macs=0.9), families=("channels",), trials=2, seconds=0.01)
        >>> [trial.what for trial in found.trials]
        ['nothing', 'channels (90% MACs)']
    """

    what: str
    shares: Mapping[str, float]
    drop: float
    trained: bool = False
    failed: str = ""
    probe: bool = False

    def to_dict(self) -> dict[str, object]:
        """JSON-able values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Trials:
    """What all trials have in common. folder: where each leaves one file. seconds: timed for each of two files."""

    original: Network
    task: Task
    target: str
    folder: Path
    threads: int
    seed: int
    seconds: float
    memory: bool

    @property
    def split(self) -> str:
        """The split that all are scored on."""
        return "validation" if self.task.has("validation") else "calibration"

    def start(self) -> Measurement:
        """The original, measured or as it stands."""
        file = self.folder / "original.json"
        if file.exists():
            found: Measurement
            found, changed = unsealed(file, Measurement)
            if not changed:
                return found
        place = self.folder / "original"
        made = self._measured(self.original, "original", place, {})
        seal(file, made.to_dict(), [self._file(place)])
        return made

    @property
    def points(self) -> float:
        """What of the score counts as a small loss."""
        return POINTS * max(abs(self.start().score or 1.0), 1e-9)

    def taken(self, what: str, steps: Sequence[Step]) -> Trial:
        """A combination's trial, made or as it stands; a training among ``steps`` is a probe."""
        file = self.folder / f"{name_of(steps)}.json"
        if file.exists():
            known: Trial = unsealed(file, Trial)[0]
            return known
        try:
            made = self.of(what, self._measured(self.made(steps), what, self.folder / "now",
                                                {"original": self._file(self.folder / "original")}))
            made = dataclasses.replace(made, probe=any(isinstance(step, Fit) for step in steps))
        except FeatherweightError as error:
            made = Trial(what, {}, 0.0, failed=f"{type(error).__name__}: {error}")
        seal(file, made.to_dict(), [])
        shutil.rmtree(self.folder / "now", ignore_errors=True)
        return made

    def of(self, what: str, found: Measurement, trained: bool = False) -> Trial:
        """A measurement beside the original's."""
        start = self.start()
        shares = {name: getattr(found, held) / getattr(start, held) for name, held in COUNTED.items()
                  if getattr(found, held) is not None}
        shares["latency"] = 1 / found.ratios["original"].median
        drop = 0.0 if start.score is None or found.score is None else start.score - found.score
        return Trial(what, shares, drop, trained)

    def costs(self) -> dict[str, float]:
        """What the original costs."""
        start = self.start()
        known = {name: getattr(start, held) for name, held in COUNTED.items()}
        known["latency"] = None if start.latency is None else start.latency.median_s
        return {name: float(number) for name, number in known.items() if number is not None}

    def made(self, steps: Sequence[Step]) -> Network:
        """The original after ``steps``, as a job would make it; all but the last are taken up where they stand."""
        network = self.original
        for index, step in enumerate(steps, 1):
            places = [(self.folder / "networks" / name_of(steps[:i]), steps[i - 1]) for i in range(1, index + 1)]
            file = places[-1][0] / "network.fw"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                do = self._fitted if isinstance(step, Fit) else self._rewritten
                do(places, network, step).save(file)  # type: ignore[arg-type]
            network = reloaded(file, self.original)
        return network

    def _rewritten(self, places: Sequence[tuple[Path, Step]], network: Network, step: Rewrite) -> Network:
        with generators_kept():
            seed_all(seed_from(self.seed, "plan", len(places)))
            plan = aimed(step, self.target).plan(network, self.task)  # type: ignore[union-attr]
        plan.save(places[-1][0] / "plan.safetensors")
        return plan.apply(network)

    def _fitted(self, places: Sequence[tuple[Path, Step]], network: Network, step: Fit) -> Network:
        folder = places[-1][0]
        context = Context(original=self.original, workdir=folder, seed=seed_from(self.seed, "fit", len(places)),
                          plans=plans_made(places[:-1]))
        made = aimed(step, self.target).fit(network, self.task, context)  # type: ignore[union-attr]
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return made

    def _file(self, place: Path) -> Path:
        return place / f"model{deploy.target(self.target).suffix}"

    def _measured(self, network: Network, what: str, place: Path, beside: Mapping[str, Path]) -> Measurement:
        with generators_kept():
            seed_all(seed_from(self.seed, "measure", self.split))
            return measure.measure(network, self.task, self.target, self.split, what, place, self.threads, beside,
                                   archive=True, memory=self.memory, seconds=self.seconds)


def name_of(steps: Sequence[Step]) -> str:
    """What the files of a combination are called."""
    return hashlib.sha256(json.dumps(canonical(tuple(steps)), sort_keys=True).encode()).hexdigest()[:16]


class Watch:
    """How much of the time that a search may take is spent: 0..1 and beyond; 0 where there is no limit."""

    def __init__(self, minutes: float | None) -> None:
        self.began, self.seconds = time.monotonic(), float("inf") if minutes is None else 60 * minutes

    @property
    def spent(self) -> float:
        return (time.monotonic() - self.began) / self.seconds


__all__ = ["COUNTED", "Trial", "Trials", "Watch", "name_of"]
