"""Files of a job: written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from featherweight.errors import FileError
from featherweight.files import written_whole

#: what to write where a file of a job's state is damaged
OVER = "write compress(..., resume=False) to start over"


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
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read ({error}); {OVER}") from error
