"""``Gauge``: measures the steps of a job, keeps every figure as it is taken, and times all files in the same rounds."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.deploy import Target
from featherweight.measure import Latency, Measurement, Ratio
from featherweight.measure.deployed import Deployed
from featherweight.measure.timing import DISTURBED
from featherweight.network import Network
from featherweight.recipe.files import State, seal, unsealed
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.task import Task

#: called with (what, done, figures) as work goes on
Tell = Callable[[str, float, Mapping[str, float]], None]

#: seconds of a profile of one file, at most
PROFILE_S = 0.5


@dataclass(frozen=True)
class Rounds:
    """Latencies of files by name, and "a/b" -> the seconds of a divided by those of b in the same rounds."""

    latencies: dict[str, Latency]
    ratios: dict[str, Ratio]

    def beside(self, index: int, row: Measurement) -> Measurement:
        """The measurement of step ``index`` with its latency, and those of the original and of the step before."""
        if str(index) not in self.latencies:
            return row
        others = {name: str(of) for name, of, least in (("original", 0, 1), ("before", index - 1, 2))
                  if index >= least and str(of) in self.latencies}
        return dataclasses.replace(
            row, latency=self.latencies[str(index)],
            beside={name: self.latencies[other] for name, other in others.items()},
            ratios={name: self.ratios[f"{other}/{index}"] for name, other in others.items()})


@dataclass(frozen=True)
class Gauge:
    """What all measurements of a job have in common."""

    task: Task
    target: Target
    state: State
    threads: int
    seed: int
    seconds: float
    memory: bool
    tell: Tell

    @property
    def split(self) -> str:
        """The split that every step is scored on."""
        return "validation" if self.task.has("validation") else "calibration"

    def deployed(self, index: int) -> Path:
        """The deployed file of step ``index``."""
        return self.state.place(index) / f"model{self.target.suffix}"

    def files(self, index: int) -> tuple[Path, ...]:
        """The same, and what lies beside it."""
        return self.target.files(self.deployed(index))

    # ---- one step
    def taken(self, index: int, network: Network, name: str) -> Measurement:
        """All figures of step ``index`` but its latency, as they stand or taken now."""
        found = self._stored(index)
        if found is None:
            self.tell(f"measure {name}", index, {})
            found = self._measured(index, network, name)
            self.tell(f"measured {name}", index, figures(found))
        return found

    def _stored(self, index: int) -> Measurement | None:
        """What was measured before; None where that is not finished, or of another file than stands there now."""
        file = self.state.place(index) / "measurement.json"
        if not file.exists():
            return None
        found: Measurement
        found, changed = unsealed(file, Measurement)
        if changed:
            warnings.warn(f"{file.with_name(changed[0])} is not the file that was measured; it is exported and "
                          "measured anew", stacklevel=2)
            return None
        return found

    def _measured(self, index: int, network: Network, name: str) -> Measurement:
        folder = self.state.step(index)
        one = Deployed(network, self.task, self.target, folder, self.threads)
        held = self._parts(folder / "parts.json")
        if not held:
            if not index:
                one.save()
            held["bytes"] = [(folder / "network.fw").stat().st_size, one.export()]

        def kept(part: str, make: Callable[[], Any]) -> Any:
            if part not in held:
                held[part] = make()
                seal(folder / "parts.json", held, self.files(index))
            return held[part]

        with generators_kept(), one.running() as runner:
            seed_all(seed_from(self.seed, "measure", self.split))
            found = one.measurement(runner, self.split, name, *held["bytes"], archive=True, memory=self.memory,
                                    kept=kept)
        seal(folder / "measurement.json", found.to_dict(), self.files(index))
        (folder / "parts.json").unlink(missing_ok=True)
        return found

    def _parts(self, file: Path) -> dict[str, Any]:
        """What a killed measurement had found of the file that stands there."""
        if not file.exists():
            return {}
        found: dict[str, Any]
        found, changed = unsealed(file, dict[str, Any])
        return {} if changed else found

    # ---- all of them
    def on_test(self, network: Network, index: int) -> float | None:
        """The score of the deployed file of step ``index`` on the test split."""
        one = Deployed(network, self.task, self.target, self.state.place(index), self.threads)
        with generators_kept(), one.running() as runner:
            seed_all(seed_from(self.seed, "measure", "test"))
            return one.score(runner, "test")

    def profiled(self, index: int, network: Network) -> list[dict[str, Any]]:
        """The kernels of the deployed file of step ``index``, as plain data; none where the runtime tells none."""
        one = Deployed(network, self.task, self.target, self.state.place(index), self.threads)
        with generators_kept():
            return [dataclasses.asdict(k) for k in one.profiled(self.split, min(self.seconds, PROFILE_S))]

    def timed(self, trail: Sequence[Measurement], network: Network) -> tuple[list[Measurement], list[str]]:
        """The trail with the latencies of all deployed files, timed once, in the same rounds; and what is to be said of
        that. network: the last one, by which all are called."""
        last = len(trail) - 1
        chosen = list(range(len(trail)))
        if sum(m.file_bytes for m in trail) > available() / 2:
            chosen = sorted({0, last})
        found = self._rounds(chosen, network)
        rows = [found.beside(index, row) for index, row in enumerate(trail)]
        notes = [f"step {i} was not timed: the files of all steps do not fit into memory together"
                 for i in range(len(trail)) if i not in chosen]
        waiting = found.latencies[str(last)].waiting
        if waiting is not None and waiting > DISTURBED:
            notes.append(f"latencies were taken on a busy machine: for {100 * waiting:.0f} % of that time other "
                         "processes had the processor; time it again on a quiet one")
        return rows, notes

    def _rounds(self, chosen: Sequence[int], network: Network) -> Rounds:
        file, last = self.state.folder / "latency.json", chosen[-1]
        files = [f for index in chosen for f in self.files(index)]
        if file.exists():
            stored: Rounds
            stored, changed = unsealed(file, Rounds)
            if not changed and list(stored.latencies) == [str(i) for i in chosen]:
                return stored
        self.tell("measure latencies", last, {})
        one = Deployed(network, self.task, self.target, self.state.place(last), self.threads)
        with generators_kept(), one.running() as runner:
            timed = one.timed(runner, self.split, {str(i): self.deployed(i) for i in chosen[:-1]}, self.seconds,
                              lambda share: self.tell("latencies", share, {}))
        latencies = {str(i): timed.latencies[str(i) if i != last else ""] for i in chosen}
        pairs = {(a, b) for b in chosen[1:] for a in (0, b - 1) if a in chosen}
        ratios = {f"{a}/{b}": timed.ratio(str(a), str(b) if b != last else "") for a, b in sorted(pairs)}
        found = Rounds(latencies, ratios)
        seal(file, dataclasses.asdict(found), files)
        return found


def available() -> float:
    """Bytes of memory that are free; infinite where the system does not say (it is Linux's ``/proc/meminfo``)."""
    try:
        rows = (row.split() for row in Path("/proc/meminfo").read_text().splitlines())
        return next(1024.0 * int(row[1]) for row in rows if row[0] == "MemAvailable:")
    except (OSError, StopIteration, ValueError):
        return float("inf")


def figures(found: Measurement) -> dict[str, float]:
    """What a listener is told of a measurement."""
    told: dict[str, float] = {"params": found.params, "macs": found.macs, "file_bytes": found.file_bytes}
    if found.score is not None:
        told[found.score_name] = found.score
    return told
