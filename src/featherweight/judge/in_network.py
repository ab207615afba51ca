"""What networks cost in time that differ from a first one in a layer or two, measured whole in the runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from featherweight import deploy, measure
from featherweight.judge.figures import Figures, cache_folder, place
from featherweight.network import Network
from featherweight.network.file.digest import digest
from featherweight.task import Task

#: seconds that each file is timed for, and files that are timed in the same rounds as the first
SECONDS = 0.2
TOGETHER = 8
#: files -> median seconds of one call of each, timed side by side
Clock = Callable[[Mapping[str, Network]], dict[str, float]]


@dataclass(frozen=True)
class InNetwork:
    """Measures whole networks in ``target`` at batch one on ``threads`` threads.

    path: a JSON file that keeps what was measured, by what the networks are (their digests), processor, runtime, its
    version and threads; None takes in_network.json in $FEATHERWEIGHT_CACHE, else in ~/.cache/featherweight. clock: what
    times the files, for tests.
    """

    task: Task
    target: str = "onnxruntime"
    threads: int = 1
    path: Path | None = None
    clock: Clock | None = None

    def seconds(self, first: Network, others: Mapping[str, Callable[[], Network]]) -> dict[str, float]:
        """Name -> seconds of one call; "" is the first network.

        Each network is timed in the same rounds as the first, and what it takes of that counts: a slow minute hits
        both. others: name -> makes the network; a few are held at a time.
        """
        figures = Figures(self.path or cache_folder() / "in_network.json")
        clock, place_ = self.clock or self._timed, place(self.target, self.threads)
        own = f"{place_}{digest(first)}"
        shares: dict[str, float] = {}
        names = list(others)
        for start in range(0, max(1, len(names)), TOGETHER):
            some = names[start:start + TOGETHER]
            made = {name: others[name]() for name in some}
            keys = {name: f"{own} {digest(network)}" for name, network in made.items()}
            missing = {name: made[name] for name in some if keys[name] not in figures.known}
            if missing or own not in figures.known:
                taken = clock({"": first, **missing})
                figures.add({own: figures.known.get(own, taken[""]),
                             **{keys[name]: taken[name] / taken[""] for name in missing}})
            shares |= {name: figures.known[keys[name]] for name in some}
        whole = figures.known[own]
        return {"": whole, **{name: whole * share for name, share in shares.items()}}

    def _timed(self, networks: Mapping[str, Network]) -> dict[str, float]:
        """Median seconds of one call of each network's deployed file, in interleaved rounds."""
        runtime, runners = deploy.target(self.target), {}
        try:
            with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
                calls: dict[str, Callable[[], Any]] = {}
                for i, (name, network) in enumerate(networks.items()):
                    file = Path(folder) / f"{i}{runtime.suffix}"
                    runtime.export(network, file)
                    runners[name] = runtime.load(file, self.threads, like=network.signature)
                    args, kwargs = measure.sample_inputs(network, self.task, "calibration", limit=1)
                    calls[name] = partial(runners[name], *args, **kwargs)
                found = measure.interleave(calls, seconds=SECONDS * len(calls), threads=self.threads)
        finally:
            for runner in runners.values():
                runner.close()
        return {name: found[name].median_s for name in networks}


__all__ = ["InNetwork"]
