"""Result files of the benchmarks: named rows under ``results/``, each written as soon as it is measured."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from featherweight.files import written_whole

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    return {"processor": processor(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
            "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Rows:
    """The rows of one file. Several processes may add to it: it is read again, under a lock, before it is written."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / name

    def read(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self.read()

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.read()[name]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Writes one row, with the machine, its threads and the versions it was measured with."""
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = self.read()
            rows[name] = {**row, "machine": machine()}
            with written_whole(self.path) as part:
                part.write_text(json.dumps({"rows": rows}, indent=1))
