"""Files are written whole or not at all: into a neighbour first, which then takes the place of the file."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    from safetensors import SafetensorError

    #: what a library raises where its file cannot be written
    REFUSED: tuple[type[Exception], ...] = (SafetensorError,)
except ModuleNotFoundError:  # archives are unpacked without it
    REFUSED = ()

#: how the name of a half-written neighbour ends
PART = ".part"


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives the path to write to; what was written replaces ``path`` at the end, and is removed if an error came.

    The file is on the disk before it takes its name, so that a power cut leaves the old file or the new one. Several
    processes may write one file at once; the last one's stands. The file gets the usual rights (by the process's
    umask), whatever the writer chose. Raises OSError where the system refuses to write: a full disk, a limit on the
    size of files, a folder that is gone or may not be written to.
    """
    whole = Path(path)
    if whole.is_dir():
        raise IsADirectoryError(f"{whole} is a folder; write the name of a file in it")
    part = whole.with_name(f"{whole.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{PART}")
    try:
        yield part
        os.umask(mask := os.umask(0o077))
        part.chmod(0o666 & ~mask)
        _sync(part)
        part.replace(whole)
        if os.name == "posix":
            _sync(whole.parent)
    except REFUSED as error:
        raise OSError(f"{whole} could not be written: {error}; what stood there before is unchanged") from error
    except OSError as error:
        if error.filename not in (part, str(part)):
            raise
        raise OSError(error.errno, error.strerror, str(whole)) from error
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
