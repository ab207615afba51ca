"""Trials: combinations as they would ship, applied, exported, scored and timed, each kept in a file.

A combination is made ready first (planned, exported, scored), wherever that is done and in whatever order; then it is
timed, by the one process that searches, while no other works on its behalf.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from featherweight import deploy, measure
from featherweight.balance.combine.bench import inputs_of
from featherweight.balance.combine.budget import lost
from featherweight.errors import FeatherweightError, Untimed
from featherweight.judge.elsewhere import Elsewhere
from featherweight.measure import Measurement
from featherweight.measure.deployed import Deployed
from featherweight.network import Network
from featherweight.recipe.files import seal, unsealed
from featherweight.recipe.recipe import aimed, plans_made
from featherweight.recipe.types import reloaded
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps import Context, Fit, Rewrite, Step
from featherweight.steps.fingerprint import canonical
from featherweight.task import Task

#: the figures of a trial, as ``Budget`` names them -> how a Measurement has them
FIELDS = {"file_bytes": "file_bytes", "archive_bytes": "archive_bytes", "macs": "macs", "memory": "memory_bytes"}
#: says that a combination is ready, and holds what it came to
READY = "ready.json"
#: combinations, each in words and as steps
Many = Sequence[tuple[str, Sequence[Step]]]
#: of an original's score, what counts as a small loss
POINTS = 0.01


@dataclass(frozen=True)
class Trial:
    """One combination, measured. what: in words. shares: figure -> what it costs of what the original costs. drop:
    points of the score that are lost. trained: whether it was trained after the cut; probe: whether that was the short
    training of trials. failed: why there is nothing to measure, else "". shipped: whether it was measured as it ships.

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
    shipped: bool = False

    def to_dict(self) -> dict[str, object]:
        """JSON-able values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Ready:
    """A combination that lies exported in its folder: all figures but the latency, or why there are none; and the
    seconds that it took."""

    measured: Measurement | None
    failed: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Trials:
    """What all trials have in common. folder: where each leaves one file. seconds: timed for each of two files.

    device: where latencies come from, None for this machine. workers: make many combinations ready at once; None makes
    each when it is asked for. ahead: so many that may be asked for are made ready together.
    """

    original: Network
    task: Task
    target: str
    folder: Path
    threads: int
    seed: int
    seconds: float
    memory: bool
    device: Elsewhere | None = None
    workers: Callable[[Trials, Many], None] | None = None
    ahead: int = 1

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
        made = self._measured(self.original, "original", place)
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
        ready, place = self.ready(what, steps), self.place(steps)
        if ready.measured is None:
            made = Trial(what, {}, 0.0, failed=ready.failed)
        else:
            made = dataclasses.replace(self.of(what, self._timed(ready.measured, place), self._file(place)),
                                       probe=any(isinstance(step, Fit) for step in steps))
        seal(file, made.to_dict(), [])
        shutil.rmtree(place, ignore_errors=True)
        return made

    def of(self, what: str, found: Measurement, file: Path, trained: bool = False) -> Trial:
        """A measurement of the deployed ``file`` beside the original's. Raises Untimed where its latency is not known
        yet."""
        start = self.start()
        shares = {name: getattr(found, held) / getattr(start, held) for name, held in FIELDS.items()
                  if getattr(found, held) is not None}
        if self.device is None:
            shares["latency"] = 1 / found.ratios["original"].median
        else:
            self._carried([file])
            shares["latency"] = self.device.share(self._file(self.folder / "original"), file)
        return Trial(what, shares, lost(start, found), trained)

    def costs(self) -> dict[str, float]:
        """What the original costs."""
        start = self.start()
        known = {name: getattr(start, held) for name, held in FIELDS.items()}
        known["latency"] = None if start.latency is None else start.latency.median_s
        if self.device is not None:
            self._carried([])
            known["latency"] = self.device.seconds(self._file(self.folder / "original"))
        return {name: float(number) for name, number in known.items() if number is not None}

    # ---- made ready
    def expect(self, many: Iterable[tuple[str, Sequence[Step]]], sure: bool) -> None:
        """Told, before the first of ``many`` is asked for, what may be asked for after it. What is not ``sure`` is made
        ready for a device, as the way there is long, but not by workers: all would wait for what is mostly in vain."""
        likely = iter(many)
        first = next(likely)
        if (self.workers is None and self.device is None) or self._known(first[1]):
            return
        more = self.ahead - 1 if sure or self.device is not None else 0
        batch = [first, *(one for one in itertools.islice(likely, more) if not self._known(one[1]))]
        if self.workers is not None:
            self.workers(self, [one for one in batch if not (self.place(one[1]) / READY).exists()])
        if self.device is not None:
            made = [steps for what, steps in batch if self._is_ready(what, steps)]
            self._carried([self._file(self.place(steps)) for steps in made])

    def _is_ready(self, what: str, steps: Sequence[Step]) -> bool:
        """Made ready, unless its layers wait for a device, or it failed."""
        try:
            return self.ready(what, steps).measured is not None
        except Untimed:
            return False

    def ready(self, what: str, steps: Sequence[Step]) -> Ready:
        """A combination made ready, or as it stands."""
        place = self.place(steps)
        file = place / READY
        if file.exists():
            known: Ready
            known, changed = unsealed(file, Ready)
            if not changed:
                return known
        began = time.monotonic()
        try:
            found = Ready(self._scored(self.made(steps), what, place))
        except Untimed:
            raise
        except FeatherweightError as error:
            found = Ready(None, f"{type(error).__name__}: {error}")
        found = dataclasses.replace(found, seconds=time.monotonic() - began)
        place.mkdir(parents=True, exist_ok=True)
        runtime = deploy.target(self.target)
        seal(file, dataclasses.asdict(found), runtime.files(self._file(place)) if found.measured is not None else [])
        return found

    def place(self, steps: Sequence[Step]) -> Path:
        """The folder of a combination that is made ready."""
        return self.folder / "ahead" / name_of(steps)

    def _known(self, steps: Sequence[Step]) -> bool:
        return (self.folder / f"{name_of(steps)}.json").exists()

    def _carried(self, files: Sequence[Path]) -> None:
        """Puts files that the device did not time into its folder, with the original."""
        first = self._file(self.folder / "original")
        assert self.device is not None
        new = [file for file in files if not self.device.has(first, file)]
        if new or not self.device.has(first, first):
            self.device.add_networks(first, new, inputs_of(self.original, self.task, self.split))

    def made(self, steps: Sequence[Step]) -> Network:
        """The original after ``steps``, as a job would make it; all but the last are taken up where they stand."""
        from filelock import FileLock

        network, places = self.original, list[tuple[Path, Step]]()
        for index, step in enumerate(steps, 1):
            places.append((self.folder / "networks" / name_of(steps[:index]), step))
            file = places[-1][0] / "network.fw"
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_suffix(".lock")):  # several workers may want one beginning
                if not file.exists():
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

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        with generators_kept():
            seed_all(seed_from(self.seed, "measure", self.split))
            yield

    def _measured(self, network: Network, what: str, place: Path) -> Measurement:
        with self._seeded():
            return measure.measure(network, self.task, self.target, self.split, what, place, self.threads,
                                   archive=True, memory=self.memory, seconds=self.seconds)

    def _scored(self, network: Network, what: str, place: Path) -> Measurement:
        """Exported and scored, all figures but the latency."""
        place.mkdir(parents=True, exist_ok=True)
        deployed = Deployed(network, self.task, deploy.target(self.target), place, self.threads)
        with self._seeded():
            sizes = deployed.save(), deployed.export()
            with deployed.running() as runner:
                return deployed.measurement(runner, self.split, what, *sizes, archive=True, memory=self.memory)

    def _timed(self, found: Measurement, place: Path) -> Measurement:
        """Timed beside the original, where latencies are this machine's."""
        if self.device is not None:
            return found
        deployed = Deployed(self.original, self.task, deploy.target(self.target), place, self.threads)
        with self._seeded(), deployed.running() as runner:
            timed = deployed.timed(runner, self.split, {"original": self._file(self.folder / "original")}, self.seconds)
        return dataclasses.replace(found, latency=timed.latencies[""], beside={"original": timed.latencies["original"]},
                                   ratios={"original": timed.ratio("original", "")})


def name_of(steps: Sequence[Step]) -> str:
    """What the files of a combination are called."""
    return hashlib.sha256(json.dumps(canonical(tuple(steps)), sort_keys=True).encode()).hexdigest()[:16]


__all__ = ["FIELDS", "Many", "Ready", "Trial", "Trials", "name_of"]
