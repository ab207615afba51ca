"""The cells of a CSV file by column, and which of them are numbers."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import TaskError, did_you_mean

NUMBER = re.compile(r"\s*[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|inf|infinity)\s*", re.IGNORECASE)
LARGEST = torch.finfo(torch.float32).max
BLANK = ("", "nan")  #: what counts as no number in a column of numbers
#: what other programs write for a missing value: these cells do not decide whether a column is one of numbers
MISSING = (*BLANK, "na", "n/a", "null", "none", "?", "-")
NEARLY = 0.9  #: the share of numbers from which a column is one of numbers


@dataclass(frozen=True)
class Sheet:
    """columns: name -> its cells, one a row. lines: the line of the file on which each row begins."""

    path: Path
    columns: Mapping[str, Sequence[str]]
    lines: Sequence[int]

    def numeric(self, column: str) -> bool:
        """Whether nearly all cells of a column are numbers."""
        held = [cell for cell in self.columns[column] if cell.strip().lower() not in MISSING]
        return bool(held) and sum(NUMBER.fullmatch(cell) is not None for cell in held) >= NEARLY * len(held)

    def numbers(self, column: str, expected: str, blank: bool) -> list[float]:
        """A column of numbers. blank: cells in ``BLANK`` become NaN. Raises TaskError with the line of a cell that is
        no number which 32 bits hold."""
        found = []
        for line, cell in zip(self.lines, self.columns[column], strict=True):
            missing = blank and cell.strip().lower() in BLANK
            value = float(cell) if not missing and NUMBER.fullmatch(cell) else float("nan")
            if not missing and not abs(value) <= LARGEST:
                raise TaskError(f"{self.path}, line {line} has {cell[:40]!r} in {column!r}, a column of numbers; "
                                f"expected a number up to {LARGEST:.1e}{expected}")
            found.append(value)
        return found


def sheet(path: str | Path, *needed: str) -> Sheet:
    """What a CSV file with a line of names holds; rows without any cell filled are left out. Raises TaskError for what
    is no such file, and where a column of ``needed`` is not there or has an empty cell."""
    file = Path(path)
    if not file.is_file():
        raise TaskError(f"{file}: no such file; expected a CSV file with a line of names")
    (_, names), *rows = _read(file) or [(0, [])]
    for name in needed:
        if names and name not in names:
            raise TaskError(f"{file} has no column {name!r}; {did_you_mean(str(name), names)}")
    if not rows:
        raise TaskError(f"{file} has no rows; expected a line of names and rows below it")
    for line, row in rows:
        if len(row) != len(names):
            raise TaskError(f"{file}, line {line} has not {len(names)} cells, as the line of names has, but {len(row)}")
        if not all(row[names.index(name)] for name in needed):
            raise TaskError(f"{file}, line {line} has nothing in {' or '.join(map(repr, needed))}")
    held = [(name, cells) for name, *cells in zip(names, *(row for _, row in rows), strict=True) if name or any(cells)]
    twice = next((name for n, (name, _) in enumerate(held) if name in dict(held[:n])), None)
    if twice is not None:
        raise TaskError(f"{file} has two columns {twice!r}; give each a name of its own")
    return Sheet(file, dict(held), [line for line, _ in rows])


def _read(file: Path) -> list[tuple[int, list[str]]]:
    """The rows in which something stands, the names first, each with the line on which it begins."""
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.reader(opened)
        try:
            return list(_numbered(reader))
        except UnicodeDecodeError as error:
            raise TaskError(f"{file} is no text in UTF-8; save it so: in a spreadsheet as CSV UTF-8, in pandas by "
                            'frame.to_csv(path, encoding="utf-8")') from error
        except csv.Error as error:
            raise TaskError(f"{file}, line {reader.line_num} is no row of a CSV file: {error}; where cells are that "
                            "long, write csv.field_size_limit(10 ** 9) first") from error


def _numbered(reader: Any) -> Iterator[tuple[int, list[str]]]:
    begin = 1
    for row in reader:
        if any(row):
            yield begin, row
        begin = reader.line_num + 1


__all__ = ["Sheet", "sheet"]
