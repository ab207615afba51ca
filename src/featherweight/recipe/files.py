"""The folder from which a killed job goes on: whose it is, who works in it, and what of it can be trusted."""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from featherweight.errors import FileError, RecipeError
from featherweight.files import PART, checksum
from featherweight.recipe.mark import JOB_FORMAT, OLD_JOB_FORMATS, differences
from featherweight.recipe.writing import OVER, read_json, write_json

T = TypeVar("T")
SIGN = "fingerprint.json"
#: what leaves a ``result.json`` in a folder -> by what the folder is known to be its
JOBS = {"compress": f"state/{SIGN}", "search": "search.json", "tune": f"tune/{SIGN}"}
#: what a state that is being removed is called meanwhile
CLEARED = ".cleared-"
#: what files are called that were never finished
UNFINISHED = f"*-????????{PART}"


class Sealed(BaseModel):
    """A state file: a value, and the checksums of the files (by name, in the same folder) that it speaks of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    files: dict[str, str]
    value: Any


class Holder(BaseModel):
    """The process that works in a folder."""

    process: int
    machine: str


class State:
    """A folder with one subfolder a step: plans, ``network.fw`` and, last of all, ``decisions.json``; the deployed file
    and, last of all, ``measurement.json``; ``fingerprint.json`` says whose it is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.claimed = folder, False

    # ---- whose it is
    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder is this process's alone meanwhile. Raises RecipeError, naming the other process, where one works
        in it. The system lets go of a killed process's lock."""
        from filelock import FileLock, Timeout

        self.folder.parent.mkdir(parents=True, exist_ok=True)
        name = self.folder.with_name(f"{self.folder.name}.lock")
        who, lock = name.with_suffix(".holder"), FileLock(name, timeout=0)
        try:
            lock.acquire()
            while not name.exists():  # it was just removed by the one who had it
                lock.release()
                lock.acquire()
        except Timeout as error:
            raise RecipeError(f"{self.folder.parent} is being worked in by {_told(who)}; wait for it, or write "
                              "compress(..., out=another folder)") from error
        try:
            write_json(who, Holder(process=os.getpid(), machine=platform.node()).model_dump())
            yield
        finally:
            try:
                if self.claimed and not (self.folder / SIGN).exists():  # removed meanwhile: what came after is no state
                    shutil.rmtree(self.folder, ignore_errors=True)
                for file in (who, name):
                    with suppress(OSError):  # what is left of them stops nobody; what went wrong before is told
                        file.unlink()
            finally:
                lock.release()

    def claim(self, mark: Mapping[str, Any], resume: bool,
              again: Callable[[str], Any] = lambda split: None) -> tuple[str, ...]:
        """Takes the folder for the job ``mark``; gives the splits that could not be compared.

        again: gives the mark of a split that is read once more; a split that never gives the same first batches twice
        is compared by its form alone. Raises RecipeError if the folder holds another job's state, or that of another
        version, and ``resume``; FileError if it is damaged.
        """
        self._swept()
        sign = self.folder / SIGN
        if not sign.exists() and any(path for path in self._entries() if path.suffix != PART):
            raise RecipeError(f"{self.folder} holds files that are no state of a job; write another out=...")
        if sign.exists() and not resume:
            self.clear()
        self.claimed = True
        if sign.exists():
            return refused(self.folder.parent, self._readable(read_json(sign)), mark, again)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(sign, dict(mark))
        return ()

    def _entries(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _swept(self) -> None:
        """Removes what a killed process left half written or half removed."""
        for old in self.folder.parent.glob(f"{self.folder.name}{CLEARED}*"):
            shutil.rmtree(old)
        for part in (*self.folder.parent.glob(UNFINISHED), *self.folder.rglob(UNFINISHED)):
            part.unlink(missing_ok=True)
        for made in self.folder.glob("step_*/tmp*/"):
            shutil.rmtree(made)

    def clear(self) -> None:
        """Removes the state; in one move first, so that a kill leaves all of it or nothing that is taken for one."""
        gone = self.folder.with_name(f"{self.folder.name}{CLEARED}{uuid.uuid4().hex[:8]}")
        self.folder.rename(gone)
        shutil.rmtree(gone)

    def _readable(self, found: Any) -> Mapping[str, Any]:
        """Raises FileError, or RecipeError with what to do, where ``found`` is no fingerprint of this format."""
        form = found.get("format") if isinstance(found, Mapping) else None
        if not isinstance(form, int):
            raise FileError(f"{self.folder / SIGN} names no format of a job's state; {OVER}")
        if form != JOB_FORMAT:
            writer = f"version {OLD_JOB_FORMATS[form]}" if form in OLD_JOB_FORMATS else "a newer version"
            raise RecipeError(f"{self.folder.parent} holds the state of a job that {writer} of featherweight wrote "
                              f"(format {form}), from which this one cannot go on (it reads format {JOB_FORMAT}); "
                              "what is finished in it (result.json, network.fw, the plans) can be read. Go on with "
                              "that version, or write compress(..., out=another folder), or resume=False to start over")
        mark: Mapping[str, Any] = found
        return mark

    # ---- what is in it
    def place(self, index: int) -> Path:
        """The folder of step ``index``, which may not be there yet."""
        return self.folder / f"step_{index}"

    def step(self, index: int) -> Path:
        """The folder of step ``index``. Raises FileError where the state was removed meanwhile."""
        if not (self.folder / SIGN).exists():
            raise FileError(f"{self.folder} was removed while the job ran; call it again to start over")
        folder = self.place(index)
        folder.mkdir(exist_ok=True)
        return folder


def check_alone(folder: Path, kind: str, resume: bool) -> None:
    """Raises RecipeError where ``folder`` holds a job of another ``kind`` (in ``JOBS``), whose files would be written
    over, and ``resume``; without, it is that job's no more."""
    for other, name in JOBS.items():
        sign = folder / name
        if other == kind or not sign.exists():
            continue
        if resume:
            raise RecipeError(f"{folder} holds the state of another job (of {other}); write out=another folder, or "
                              "resume=False to start over")
        if sign.name == SIGN:
            state = State(sign.parent)
            with state.held():
                state.clear()
        sign.unlink(missing_ok=True)


def refused(folder: Path, found: Mapping[str, Any], mark: Mapping[str, Any],
            again: Callable[[str], Any]) -> tuple[str, ...]:
    """Raises RecipeError, with what is another and how, where ``found`` is another job's mark than ``mark``; gives the
    splits that could not be compared, because reading them ``again`` gives other batches each time."""
    others = differences(found, mark)
    unsteady = tuple(split for split in others if _same_form(found.get(split), mark[split])
                     and (other := again(split)) is not None and other != mark[split])
    for split in unsteady:
        del others[split]
    if others:
        how = "; ".join(f"{key}: {said}" for key, said in others.items() if said)
        raise RecipeError(f"{folder} holds the state of another job (other: {', '.join(others)})"
                          f"{f' ({how})' if how else ''}; write compress(..., out=another folder), or resume=False to "
                          "start over")
    return unsteady


def seal(path: Path, value: Any, files: Iterable[Path]) -> None:
    """Writes a state file; ``files`` lie below its folder and stand as they are to be found again."""
    sums = {file.relative_to(path.parent).as_posix(): checksum(file) for file in files}
    write_json(path, Sealed(files=sums, value=value).model_dump())


def unsealed(path: Path, shape: type[T] | Any) -> tuple[T, tuple[str, ...]]:
    """What ``seal`` wrote, as ``shape``; and the files that are no more as they were. Raises FileError for a state file
    that is none."""
    try:
        found = Sealed.model_validate(read_json(path))
        value: T = TypeAdapter(shape).validate_python(found.value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the whole"
        raise FileError(f"{path} is damaged ({where}: {problem['msg']}); {OVER}") from error
    changed = [name for name, known in found.files.items()
               if not (path.parent / name).is_file() or checksum(path.parent / name) != known]
    return value, tuple(changed)


def _told(who: Path) -> str:
    try:
        found = Holder.model_validate(read_json(who))
    except (FileError, ValidationError):
        return "another process"
    return f"process {found.process} on {found.machine}"


def _same_form(was: Any, now: Any) -> bool:
    return isinstance(was, Mapping) and isinstance(now, Mapping) and "form" in now and all(
        was.get(what) == now[what] for what in ("form", "whole"))


__all__ = ["JOBS", "JOB_FORMAT", "Holder", "Sealed", "State", "check_alone", "refused", "seal", "unsealed"]
