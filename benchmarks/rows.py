"""Result files of the benchmarks: ``results/NAME.json`` holds, for every arm, all rows that were ever measured.

``{"rows": {arm: [oldest row, ..., newest row]}}``. A row says when (``date``, UTC), of which ``commit`` ("+": changed
since) and on which ``device`` it was measured, so that a trend can be drawn; tables show the newest. Rows from before
this was kept have no date: they count as oldest, and an arm may hold one without a list around it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from featherweight.files import written_whole

RESULTS = Path(__file__).parent / "results"
#: what a row's figures come from; changes elsewhere (in results, in docs) are none of the code measured
MEASURED = ("src", "examples", ":(glob)benchmarks/*.py")

Row = dict[str, Any]


def machine() -> Row:
    return {"processor": processor(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
            "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def stamp() -> Row:
    """When, of which commit and on which device; a row measured elsewhere than on the processor says its own device."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "device": processor()}


def commit() -> str:
    """The commit of the code that is measured, with "+" where it was changed since; "" outside of a repository."""
    try:
        return _git("rev-parse", "--short=9", "HEAD") + "+" * bool(_git("status", "--porcelain", "--", *MEASURED))
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(["git", "-C", root, *words], check=True, capture_output=True, text=True).stdout.strip()


def histories(path: Path) -> dict[str, list[Row]]:
    """Arm -> its rows, oldest first, of a result file of any age; nothing where there is no file."""
    held = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    given = held["rows"] if "rows" in held else held["models"]
    return {arm: sorted(rows if isinstance(rows, list) else [rows], key=lambda r: r.get("date", ""))
            for arm, rows in given.items()}


def newest(path: Path) -> dict[str, Row]:
    """Arm -> its newest row."""
    return {arm: rows[-1] for arm, rows in histories(path).items()}


class Rows:
    """The rows of one file. Several processes may add to it: it is read again, under a lock, before it is written."""

    def __init__(self, file: str | Path, again: bool = bool(os.environ.get("AGAIN"))) -> None:
        """file: within ``results/``, or a path. again (environment: AGAIN=1): rows from before now do not count as
        there, so that a script that leaves out what it has a row of measures every arm once more. The environment's
        ARMS="first arm;second*" names those (globs) that may be measured; all others count as there."""
        self.path = RESULTS / file
        self.arms = [arm for arm in os.environ.get("ARMS", "").split(";") if arm]
        self.since = stamp()["date"] if again else ""

    def __contains__(self, arm: str) -> bool:
        if self.arms and not any(fnmatchcase(arm, wanted) for wanted in self.arms):
            return True
        return any(row.get("date", "") >= self.since for row in histories(self.path).get(arm, ()))

    def __getitem__(self, arm: str) -> Row:
        return newest(self.path)[arm]

    def newest(self) -> dict[str, Row]:
        return newest(self.path)

    def add(self, arm: str, row: Row) -> None:
        """Appends one row, with when, of what and where it was measured, its threads and versions."""
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held = histories(self.path)
            held.setdefault(arm, []).append({**stamp(), **row, "machine": machine()})
            with written_whole(self.path) as part:
                part.write_text(json.dumps({"rows": held}, indent=1) + "\n")
