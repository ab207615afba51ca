"""Files of a job: written whole or not at all, and the folder from which a killed job goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import FileError, RecipeError
from featherweight.files import written_whole

#: of a job's state, as ``fingerprint.json`` says it
JOB_FORMAT = 2
#: formats that are gone on from no more -> the version that wrote them
OLD_JOB_FORMATS = {1: "0.1"}


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def copy_file(source: Path, path: Path) -> None:
    """Copies a file, whole or not at all."""
    with written_whole(path) as part:
        shutil.copyfile(source, part)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote. Raises FileError for a file that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read ({error}); write compress(..., resume=False) to start over") from error


class State:
    """A folder with one subfolder a step: ``plan.safetensors``, ``decisions.json``, ``network.fw``, the deployed file
    and, last of all, ``measurement.json``; ``fingerprint.json`` says whose it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, mark: Mapping[str, Any], resume: bool) -> None:
        """Takes the folder for the job ``mark``. Raises RecipeError if it holds another's state, or that of another
        version, and ``resume``."""
        sign = self.folder / "fingerprint.json"
        if self.folder.exists() and any(self.folder.iterdir()) and not sign.exists():
            raise RecipeError(f"{self.folder} holds files that are no state of a job; write another out=...")
        if sign.exists() and not resume:
            shutil.rmtree(self.folder)
        if sign.exists():
            found = read_json(sign)
            self._readable(found)
            others = [key for key in mark if found.get(key) != mark[key]]
            if others:
                raise RecipeError(f"{self.folder.parent} holds the state of another job (other: {', '.join(others)}); "
                                  "write compress(..., out=another folder), or resume=False to start over")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(sign, mark)

    def _readable(self, found: Any) -> None:
        """Raises FileError, or RecipeError with what to do, where ``found`` is no fingerprint of this format."""
        form = found.get("format") if isinstance(found, Mapping) else None
        if not isinstance(form, int):
            raise FileError(f"{self.folder / 'fingerprint.json'} names no format of a job's state; write "
                            "compress(..., resume=False) to start over")
        if form != JOB_FORMAT:
            writer = f"version {OLD_JOB_FORMATS[form]}" if form in OLD_JOB_FORMATS else "a newer version"
            raise RecipeError(f"{self.folder.parent} holds the state of a job that {writer} of featherweight wrote "
                              f"(format {form}), from which this one cannot go on (it reads format {JOB_FORMAT}); "
                              "what is finished in it (result.json, network.fw, the plans) can be read. Go on with "
                              "that version, or write compress(..., out=another folder), or resume=False to start over")

    def step(self, index: int) -> Path:
        folder = self.folder / f"step_{index}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def done(self, count: int) -> int:
        """How many of the first ``count`` entries of the trail stand, without a gap."""
        for index in range(count):
            if not (self.folder / f"step_{index}" / "measurement.json").exists():
                return index
        return count
