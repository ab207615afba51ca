"""Jobs in processes of their own, and file systems of their own, for ``rough_ground.py``."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kills import job, outcome
from rows import Row

import featherweight as fw

CONTEXT = multiprocessing.get_context("fork")
ENDED = "ended"
#: seconds until a job is taken for one that hangs
LONG = 120.0


def quiet() -> None:
    """Nothing changes for the job."""


@dataclass(frozen=True)
class Ground:
    """The network of all jobs, and what a quiet job makes of it."""

    network: fw.Network
    wanted: tuple[bytes, bytes, object]

    def start(self, out: Path, before: Callable[[], None] = quiet) -> tuple[Any, Any]:
        """A job in a process of its own, which calls ``before`` first; and the end of a pipe that says what came."""
        hear, say = CONTEXT.Pipe(duplex=False)

        def work() -> None:
            before()
            try:
                job(self.network, out)
                say.send(ENDED)
            except BaseException as error:
                say.send(f"{type(error).__name__}: {error}")

        process = CONTEXT.Process(target=work)
        process.start()
        return process, hear

    def heard(self, process: Any, hear: Any, out: Path) -> str:
        """What came of a job, without the names of this machine."""
        process.join(LONG)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            return "hangs"
        text = hear.recv() if hear.poll() else f"died ({process.exitcode})"
        text = re.sub(r"process \d+ on \S+?(?=[,;: ])", "process N on HOST", text.replace(str(out), "out"))
        return text.replace(str(out.parent), "there")

    def run(self, out: Path, before: Callable[[], None] = quiet) -> str:
        return self.heard(*self.start(out, before), out)

    def mended(self, out: Path, *said: str) -> Row:
        """A row: what was said, and what the next call on good ground gives."""
        again = self.run(out)
        row = {"said": list(dict.fromkeys(said)), "again": again,
               "equal": again == ENDED and outcome(out) == self.wanted}
        bad = [s for s in said if s != ENDED and not hasattr(fw.errors, s.partition(":")[0])]
        if bad or not row["equal"]:
            raise SystemExit(f"not as it should be: {row}")
        return row


def until(there: Path, process: Any) -> None:
    """Waits for a file or folder that the job makes."""
    while not there.exists() and process.is_alive():
        time.sleep(0.005)


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def alone(script: str, out: Path) -> list[str]:
    """The command of a job in a Python of its own."""
    return [sys.executable, script, "--job", str(out)]


def last_words(running: subprocess.Popen[str], out: Path) -> str:
    """What came of such a job."""
    lines = running.communicate(timeout=LONG)[1].splitlines()
    told = (lines or ["died"])[-1].replace(str(out), "out").rpartition("errors.")[2]
    return ENDED if running.returncode == 0 else told
