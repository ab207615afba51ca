"""Measured figures by name, kept in a JSON file that several processes read and add to at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from featherweight.deploy import target as target_named
from featherweight.errors import FileError
from featherweight.files import written_whole
from featherweight.judge.time_them import device


def cache_folder() -> Path:
    """Where figures are kept: $FEATHERWEIGHT_CACHE, else ~/.cache/featherweight."""
    return Path(os.environ.get("FEATHERWEIGHT_CACHE") or Path.home() / ".cache" / "featherweight")


def place(target: str, threads: int) -> str:
    """What a latency depends on beside the network: kind of processor, runtime and its version, threads."""
    return device(target_named(target).package, threads)


class Figures:
    """``known``: name -> number, as the file at ``path`` held them, and what was added since.

    Raises FileError where the file is no such table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = self._held()

    def add(self, new: Mapping[str, float]) -> None:
        """Adds figures to the file at once; what other processes added meanwhile stays."""
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            held = self._held() | dict(new)
            with written_whole(self.path) as part:
                part.write_text(json.dumps(held, indent=0))
        self.known |= held

    def _held(self) -> dict[str, float]:
        if not self.path.exists():
            return {}
        try:
            return {str(k): float(v) for k, v in json.loads(self.path.read_text()).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise FileError(f"{self.path} is no table of latencies: {error}; remove it to have them measured again") \
                from error


__all__ = ["Figures", "cache_folder", "place"]
