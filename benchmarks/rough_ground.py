"""Jobs on rough ground: what is said when something gives way, and is the end that of a quiet job?

    python benchmarks/rough_ground.py

Arms: two processes in one folder; a disk that is full (a small tmpfs), from the start and from the first step on; a
limit on the length of files (``ulimit -f``); a folder that may only be read, from the start (a file system mounted so)
and from the first step on (its rights); a folder that is removed meanwhile; a clock that is wrong (dates of files in
the past or future between a kill and the next call; a clock that jumps while the job runs; processes that live in
other years, by libfaketime); eight threads that call one Network and one Runner.

Every job prunes, trains and rounds a small network for ONNX Runtime, in a process of its own. A row has what came of it
("ended", or the error with its words), and for what refused, the same of the call after the ground was mended; "equal"
says whether the network, the deployed file and ``result.json`` without times are then those of a quiet job. Anything
unequal, or an error that is not one of the library's, ends the script with an error. Mounting asks for root on Linux,
the arm of other years for FAKETIME_LIB (the path of libfaketime.so.1): arms that lack it are named. Results go into
benchmarks/results/rough_ground.json.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from ground import ENDED, Ground, alone, disk, last_words, remount, until
from kills import job, outcome
from rows import Row, Rows

import featherweight as fw
from test_recipe import tiny

#: the environment's variable with the path of libfaketime
LIBRARY = "FAKETIME_LIB"
YEAR = 365 * 86400.0


# ---- the arms: (ground, a folder for it) -> row

def two_processes(ground: Ground, folder: Path) -> Row:
    out = folder / "out"
    first = ground.start(out)
    until(out / "state" / "fingerprint.json", first[0])
    second = ground.run(out)
    return ground.mended(out, ground.heard(*first, out), second)


def full_from_the_start(ground: Ground, folder: Path) -> Row:
    with disk(folder / "disk", "16k") as there:
        said = ground.run(there / "out")
        remount(there, "size=64m")
        return ground.mended(there / "out", said)


def full_meanwhile(ground: Ground, folder: Path) -> Row:
    with disk(folder / "disk", "64m") as there:
        running = ground.start(there / "out")
        until(there / "out" / "state" / "step_1", running[0])
        with open(there / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        said = ground.heard(*running, there / "out")
        (there / "filler").unlink()
        return ground.mended(there / "out", said)


def limited_files(ground: Ground, folder: Path) -> Row:
    out, said = folder / "out", []
    for limit in (0, 512, 1024, 2048, 4096, 8192, 16384):
        said.append(ground.run(out, lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
    return ground.mended(out, *said)


def read_only_from_the_start(ground: Ground, folder: Path) -> Row:
    with disk(folder / "disk", "64m") as there:
        (there / "out").mkdir()
        remount(there, "ro")
        said = ground.run(there / "out")
        remount(there, "rw")
        return ground.mended(there / "out", said)


def read_only_meanwhile(ground: Ground, folder: Path) -> Row:
    out = folder / "out"
    lowered = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    running = subprocess.Popen([*lowered, *alone(__file__, out)], stderr=subprocess.PIPE, text=True)
    while not (out / "state" / "step_1").exists() and running.poll() is None:
        time.sleep(0.005)
    rights = {path: path.stat().st_mode for path in [out, *out.rglob("*")]}
    for path, mode in rights.items():
        path.chmod(mode & 0o555)
    said = last_words(running, out)
    for path, mode in rights.items():
        path.chmod(mode)
    return ground.mended(out, said)


def removed_meanwhile(ground: Ground, folder: Path) -> Row:
    said = []
    for number, made in enumerate(("state/fingerprint.json", "state/step_0", "state/step_1", "state/step_2",
                                   "state/step_3", "state/latency.json")):
        out = folder / str(number)
        running = ground.start(out)
        until(out / made, running[0])
        shutil.rmtree(out, ignore_errors=True)
        said.append(ground.heard(*running, out))
        row = ground.mended(out, *said)
    return row


def dates_of_files(ground: Ground, folder: Path) -> Row:
    said = []
    for number, moved in enumerate((-25 * YEAR, -YEAR, YEAR, 70 * YEAR)):
        out = folder / str(number)
        running = ground.start(out)
        until(out / "state" / "step_2", running[0])
        os.kill(running[0].pid, signal.SIGKILL)
        running[0].join()
        for path in [out, *out.rglob("*")]:
            os.utime(path, (time.time() + moved,) * 2)
        said.append(ground.run(out))
        row = ground.mended(out, *said)
    return row


def clock_that_jumps(ground: Ground, folder: Path) -> Row:
    """The system's clock as Python reads it: years to and fro at every question; monotonic clocks go on."""

    def wrong() -> None:
        true, asked = time.time, [0]

        def jumping() -> float:
            asked[0] += 1
            return true() + (-30 * YEAR, 40 * YEAR, 0.0)[asked[0] % 3]

        time.time = jumping
        time.time_ns = lambda: int(jumping() * 1e9)

    out = folder / "out"
    running = ground.start(out, wrong)
    until(out / "state" / "step_2", running[0])
    os.kill(running[0].pid, signal.SIGKILL)
    running[0].join()
    return ground.mended(out, ground.run(out, wrong), ground.run(folder / "whole", wrong))


def other_years(ground: Ground, folder: Path) -> Row:
    """A process that lives in 2005 and is killed, the next one in 2060."""
    said, out = [], folder / "out"
    for year in (2005, 2060):
        years = {"LD_PRELOAD": os.environ[LIBRARY], "FAKETIME": f"@{year}-01-01 00:00:00",
                 "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        running = subprocess.Popen(alone(__file__, out), stderr=subprocess.PIPE, text=True, env={**os.environ, **years})
        while not said and not (out / "state" / "step_2").exists() and running.poll() is None:
            time.sleep(0.005)
        if not said:
            running.kill()
        said.append(last_words(running, out))
    return ground.mended(out, *said[1:])


def eight_threads(ground: Ground, folder: Path) -> Row:
    inputs = [torch.randn(1 + i % 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(64)]
    network, runtime = ground.network, fw.deploy.target("onnxruntime")
    runtime.export(network, folder / "model.onnx")
    runner = runtime.load(folder / "model.onnx", like=network.signature)
    row: Row = {"threads": 8, "calls": 0, "wrong": 0}
    with torch.no_grad():
        for call in (network, runner):
            alone = [call(x) for x in inputs]
            with ThreadPoolExecutor(8) as pool:
                for _ in range(50):
                    for got, want in zip(pool.map(call, inputs), alone, strict=True):
                        row["calls"] += 1
                        row["wrong"] += not torch.equal(got, want)
    if row["wrong"]:
        raise SystemExit(f"not as it should be: {row}")
    return row


#: arm -> (what measures it, what it needs beside Python)
ARMS: dict[str, tuple[Callable[[Ground, Path], Row], str]] = {
    "two processes in one folder": (two_processes, ""),
    "a full disk": (full_from_the_start, "mount"), "a disk that fills up": (full_meanwhile, "mount"),
    "ulimit -f": (limited_files, ""),
    "a read-only folder": (read_only_from_the_start, "mount"),
    "a folder that becomes read-only": (read_only_meanwhile, "mount"),
    "a folder that is removed": (removed_meanwhile, ""),
    "dates of files": (dates_of_files, ""), "a clock that jumps": (clock_that_jumps, ""),
    "other years": (other_years, LIBRARY),
    "eight threads": (eight_threads, ""),
}


def has(need: str) -> bool:
    return not need or need in os.environ or (need == "mount" and os.geteuid() == 0 and shutil.which(need) is not None)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--job"]:
        job(tiny(), Path(sys.argv[2]))
        return
    rows, network = Rows("rough_ground.json"), tiny()
    with tempfile.TemporaryDirectory() as home:
        ground = Ground(network, (b"", b"", None))
        if ground.run(Path(home, "quiet")) != ENDED:
            raise SystemExit("the quiet job fails")
        ground = Ground(network, outcome(Path(home, "quiet")))
        for number, (arm, (measure, need)) in enumerate(ARMS.items()):
            if not has(need):
                print(f"{arm}: left out, it needs {need}", flush=True)
            elif arm not in rows:
                folder = Path(home, str(number))
                folder.mkdir()
                rows.add(arm, measure(ground, folder))
                print(arm, {k: v for k, v in rows[arm].items() if k not in ("machine", "date", "commit")}, flush=True)


if __name__ == "__main__":
    main()
