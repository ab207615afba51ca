"""Files are written whole or not at all: into a neighbour first, which then takes the place of the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives the path to write to; what was written replaces ``path`` at the end, and is removed if an error came.

    The file gets the usual rights (by the process's umask), whatever the writer chose.
    """
    whole = Path(path)
    part = whole.with_name(whole.name + ".part")
    try:
        yield part
        os.umask(mask := os.umask(0o077))
        part.chmod(0o666 & ~mask)
        part.replace(whole)
    finally:
        part.unlink(missing_ok=True)
