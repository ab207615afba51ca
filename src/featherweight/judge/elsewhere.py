"""A device that is not this machine: a folder that is carried there, its files timed by a script, and what came back.

``manifest.json`` says what is to be timed, ``time_them.py`` times it and leaves ``times.json``, which is a table of
latencies like that of this machine (``judge/figures``).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.deploy import target as target_named
from featherweight.errors import FileError, Untimed
from featherweight.files import checksum, written_whole
from featherweight.judge import time_them
from featherweight.judge.figures import Figures, cache_folder
from featherweight.judge.layer_times import SECONDS, SMALL, TimedLayer, Timer, Times, exported, time_all
from featherweight.judge.time_them import MANIFEST, NOTHING, RESULT, SCRIPT

FORMAT = 2
#: seconds that a network is timed for
NETWORK_S = 1.0
#: the device's name in a name of ``times.json``
DEVICE = re.compile(r".*? threads=\d+ ")
#: seconds of a multiply-accumulate, for a guess where nothing is known
GUESS = 1e-10


@dataclass(frozen=True)
class Elsewhere:
    """The folder of a device on which files for ``target`` are timed.

    Layers are called by their keys, whole networks by the SHA-256 of their files.
    """

    folder: Path
    target: str
    threads: int = 1

    def begin(self) -> None:
        """Writes the folder's script, and a manifest of nothing where there is none yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(time_them.__file__), self.folder / SCRIPT)
        if not (self.folder / MANIFEST).exists():
            runtime = target_named(self.target)
            self._write({"format": FORMAT, "target": self.target, "package": runtime.package, "threads": self.threads,
                         "precision": getattr(runtime, "precision", "f32"), "layer_s": SECONDS,
                         "network_s": NETWORK_S, "files": {}})

    def check(self) -> None:
        """Raises FileError where the folder is none of a device, or one of another target."""
        self._manifest()

    # ---- what came back
    @cached_property
    def known(self) -> dict[str, float]:
        """Name of a file, or of two beside one another -> the figure. Raises FileError where several devices, or
        another number of threads, are in the table."""
        self._manifest()
        named = {name: DEVICE.match(name) for name in Figures(self.folder / RESULT).known}
        devices = {found[0] if found else "?" for found in named.values()}
        if len(devices) > 1 or any(not d.endswith(f" threads={self.threads} ") for d in devices):
            raise FileError(f"{self.folder / RESULT} has times of {' and of '.join(sorted(d.strip() for d in devices))}"
                            f"; expected those of one device on {self.threads} threads: remove it, and have them timed "
                            "again on one")
        return {name[found.end():]: figure for (name, found), figure
                in zip(named.items(), Figures(self.folder / RESULT).known.values(), strict=True) if found}

    @property
    def device(self) -> str:
        """Processor, runtime and threads, as ``times.json`` says them; "" where nothing was timed."""
        names = list(Figures(self.folder / RESULT).known)
        found = DEVICE.match(names[0]) if names else None
        return found[0].strip() if found else ""

    def seconds(self, first: Path) -> float:
        """Seconds of the network that others are timed beside. Raises Untimed."""
        return self._figure(checksum(first))

    def share(self, first: Path, file: Path) -> float:
        """What a network takes of the seconds of the first one. Raises Untimed."""
        return 1.0 if checksum(file) == checksum(first) else self._figure(f"{checksum(first)} {checksum(file)}")

    def has(self, first: Path, file: Path) -> bool:
        """Whether a network was timed beside the first one."""
        own, other = checksum(first), checksum(file)
        return (own if own == other else f"{own} {other}") in self.known

    def _figure(self, name: str) -> float:
        if name not in self.known:
            raise self.untimed()
        return self.known[name]

    def waiting(self) -> int:
        """How many files are to be timed."""
        files = self._manifest()["files"]
        done = {name.rpartition(" ")[2] if "beside" in files.get(name.rpartition(" ")[2], {}) else name
                for name in (*self.known, NOTHING)}
        return len(files.keys() - done)

    def untimed(self) -> Untimed:
        """What to do now, in words."""
        return Untimed(f"{self.waiting()} files in {self.folder} are to be timed on the device: take the folder there, "
                       f"run python {SCRIPT} in it, bring its {RESULT} back into {self.folder}, and give the same "
                       "command again")

    # ---- what is to be timed
    def add_layers(self, layers: Mapping[str, TimedLayer]) -> None:
        """Layers by their keys; those that are there already are left alone."""
        runtime, entries, there = target_named(self.target), {}, self._manifest()["files"]
        place = self.folder / "layers"
        place.mkdir(exist_ok=True)
        for key, layer in {NOTHING: None, **layers}.items():
            if key not in there:
                file = place / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}{runtime.suffix}"
                item = exported(layer, runtime, file).signature.inputs[0]
                size = SMALL if layer is None else layer.input(1)
                entries[key] = {"file": self._name(file), "inputs": {item.name: ["float32", size]}}
        self._add(entries)

    def asked(self, layers: Mapping[str, TimedLayer]) -> Untimed:
        """Adds layers, and says what to do now."""
        self.add_layers(layers)
        return self.untimed()

    def add_networks(self, first: Path, files: Sequence[Path], inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Deployed files, to be timed beside the first one; inputs: by name, what each is run on."""
        runtime, entries = target_named(self.target), {}
        place = self.folder / "networks"
        place.mkdir(exist_ok=True)
        own = checksum(first)
        values = place / f"{own[:16]}.npz"
        if not values.exists():
            with written_whole(values) as part, part.open("wb") as file:
                arrays: Any = dict(inputs)
                np.savez(file, **arrays)
        for network in (first, *files):
            name = checksum(network)
            for held in runtime.files(network):
                shutil.copyfile(held, place / f"{name[:16]}{held.suffix}")
            entries[name] = {"file": f"networks/{name[:16]}{runtime.suffix}", "values": self._name(values),
                             "beside": own}
        self._add(entries)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def _add(self, entries: Mapping[str, Any]) -> None:
        found = self._manifest()
        self._write({**found, "files": {**found["files"], **entries}})

    def _write(self, manifest: Mapping[str, Any]) -> None:
        with written_whole(self.folder / MANIFEST) as part:
            part.write_text(json.dumps(manifest, indent=1))

    def _manifest(self) -> dict[str, Any]:
        """Raises FileError where the folder is none of a device, or one of another target."""
        path = self.folder / MANIFEST
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            held = (found["format"], found["target"], found["threads"], type(found["files"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FileError(f"{self.folder} is no folder of files to be timed ({error}); write "
                            f"featherweight bench-table MODEL --out {self.folder}") from error
        if held != (FORMAT, self.target, self.threads, dict):
            raise FileError(f"{path} is of format {held[0]}, for {held[1]} on {held[2]} threads; expected format "
                            f"{FORMAT}, {self.target} on {self.threads}: write featherweight bench-table MODEL "
                            f"--target {self.target} --out another folder")
        return found


class Unmeasured(Untimed):
    """Layers (by their keys) that the process which searches is to have timed, as this one may not time."""

    def __init__(self, layers: Mapping[str, TimedLayer]) -> None:
        super().__init__(layers)
        self.layers = layers


#: seconds of layers by key, where none may be timed: in a worker beside others
_GIVEN: ContextVar[Mapping[str, float] | None] = ContextVar("given", default=None)


@contextmanager
def given(known: Mapping[str, float]) -> Iterator[None]:
    """Nothing is timed meanwhile: layers of this machine take what is ``known``, and what is not raises Unmeasured."""
    token = _GIVEN.set(known)
    try:
        yield
    finally:
        _GIVEN.reset(token)


class TimesElsewhere:
    """What ``Times`` is for this machine: seconds of layers, as they are known. What is not is guessed by its
    multiply-accumulates and asked for, all at once, by ``settled``. ask: what is raised for it."""

    def __init__(self, known: Mapping[str, float], ask: Callable[[Mapping[str, TimedLayer]], Untimed]) -> None:
        self.known, self.ask = known, ask
        self.asked: dict[str, TimedLayer] = {}

    def times(self, layers: Sequence[TimedLayer]) -> list[float]:
        """Seconds of each layer."""
        self.asked |= {layer.key(): layer for layer in layers if layer.key() not in self.known}
        return [self.known.get(layer.key(), GUESS * sum(math.prod((*call.weight, *call.size))
                                                        for call in (layer, *layer.then))) for layer in layers]

    def settled(self) -> None:
        """Raises Untimed where a time was guessed."""
        if self.asked:
            raise self.ask(self.asked)


def times_of(target: str, threads: int = 1, times: str | Path | None = None, path: Path | None = None,
             timer: Timer | None = None) -> Times | TimesElsewhere:
    """The table of layer latencies: of this machine, in the file ``path`` (None: latency.json in $FEATHERWEIGHT_CACHE,
    else in ~/.cache/featherweight); or of the device of the folder ``times``."""
    held = _GIVEN.get()
    if times is not None:
        device = Elsewhere(Path(times), target, threads)
        return TimesElsewhere(device.known, device.asked if held is None else Unmeasured)
    if held is not None:
        return TimesElsewhere(held, Unmeasured)
    return Times(path or cache_folder() / "latency.json", target, threads, timer or time_all)


def known_here(target: str, threads: int = 1) -> dict[str, float]:
    """Seconds of this machine's layers by key, as far as they were measured."""
    table = Times(cache_folder() / "latency.json", target, threads, time_all)
    return {name.removeprefix(table.prefix): seconds for name, seconds in table.figures.known.items()
            if name.startswith(table.prefix)}


__all__ = ["Elsewhere", "TimesElsewhere", "Unmeasured", "given", "known_here", "times_of"]
