"""Fuzzing: structured mutations of every kind of file that may come from strangers, checksums made anew.

    python tests/attacks/fuzz.py [--minutes 30] [--only NAME] [--seed 0] [--keep tests/attacks]

A worker process makes case after case from its number alone and opens it; the parent watches. A worker that dies, or
sits on one case for long, leaves the case's number: the case is made once more and kept as a file, which
``tests/test_attacks.py`` opens from then on. So is a case that raised an error of another kind than the library's.
Prints executions, findings, and how many cases got through each loader.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
from cases import FIRST, KINDS, SHARES

from featherweight.errors import FeatherweightError

PATIENCE = 20.0  #: seconds of a processor on one case
MEMORY = 8 << 30  #: bytes of address space of a worker
ROUND = 10_000  #: cases of a worker, after which a fresh one takes over


def work(place: str, first: int, step: int, only: str | None, found: Any) -> None:
    """Opens case after case; writes the number of the one at hand to ``place``."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mark = os.open(place, os.O_WRONLY)
    tally: Counter[str] = Counter()
    told: set[str] = set()  # a pipe that nobody reads meanwhile holds few of one kind
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    KINDS["operator"].opener(FIRST)  # what torch imports when shapes are asked for
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for number in range(first, first + step):
            os.pwrite(mark, struct.pack("<q", number), 0)
            kind = kind_of(number, only)
            try:
                outcome = "opened" if KINDS[kind].open(Random(number), Path(folder)) else "refused"
            except FeatherweightError:
                outcome = "refused"
            except Exception:
                outcome, text = "WRONG ERROR", traceback.format_exc()[-1500:]
                if kind not in told:
                    told.add(kind)
                    found.put(("wrong", number, text))
            tally[f"{kind} {outcome}"] += 1
    found.put(("done", first + step, tally))


def kind_of(number: int, only: str | None) -> str:
    return only or SHARES[number % len(SHARES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case, in billions")
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--keep", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    end, number, findings, opened = time.monotonic() + 60 * options.minutes, options.seed * 10**9, 0, Counter()
    start, seen = number, set()
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.NamedTemporaryFile() as place:
        while time.monotonic() < end:
            os.pwrite(place.fileno(), struct.pack("<q", number), 0)
            worker = context.Process(target=work, args=(place.name, number, ROUND, options.only, found))
            worker.start()
            reason = watched(worker, place.fileno(), end)
            at = struct.unpack("<q", os.pread(place.fileno(), 8, 0))[0]
            while not found.empty():
                what, which, text = found.get()
                if what == "done":
                    opened += text
                elif (last := text.strip().splitlines()[-1][:60]) not in seen:
                    seen.add(last)
                    findings += 1
                    print(f"case {which} ({kind_of(which, options.only)}): another kind of error\n{text}", flush=True)
                    keep(options, which)
            if reason:
                findings += 1
                print(f"case {at} ({kind_of(at, options.only)}): {reason}", flush=True)
                keep(options, at)
            number = at + 1
            print(f"{number - start} executions, {findings} findings", flush=True)
    print(f"executions {number - start}; findings {findings}; {dict(sorted(opened.items()))}")
    return 1 if findings else 0


def watched(worker: Any, place: int, end: float) -> str:
    """Waits for a worker; why it did not end by itself, "" if it did or its time was over."""
    case, began = None, 0.0
    while worker.is_alive():
        worker.join(0.5)
        now, spent = os.pread(place, 8, 0), seconds(worker.pid)
        if now != case:
            case, began = now, spent
        if worker.is_alive() and (spent - began > PATIENCE or time.monotonic() > end):
            worker.kill()
            worker.join()
            return f"hangs for {spent - began:.0f} s" if spent - began > PATIENCE else ""
    return f"the process died with {worker.exitcode}" if worker.exitcode else ""


def seconds(process: int) -> float:
    """What a process has used of a processor: its own clock stands still while others have the machine."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def keep(options: argparse.Namespace, number: int) -> None:
    """Writes a case as a file beside the attacks; it is made, not opened."""
    kind = kind_of(number, options.only)
    path = options.keep / f"{kind}_{number}{KINDS[kind].suffix}"
    KINDS[kind].write(Random(number), path)
    print(f"kept as {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
