"""Tasks from a CSV file: numbers in columns, or texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import TaskError, did_you_mean
from featherweight.task.bounds import COUNT, DRAWN, check_options
from featherweight.task.sheet import Sheet, sheet
from featherweight.task.splits import parted, passes
from featherweight.task.task import Task

#: texts -> tensors by name, each [n, t]
Tokenizer = Callable[..., Mapping[str, Any]]


def table(path: str | Path, target: str, *, columns: Sequence[str] | None = None, batch: int = 64,
          validation: float = 0.1, test: float = 0.1, seed: int = 0) -> Task:
    """Rows of numbers from a CSV file with a line of names: ``target`` is a number (regression) or a word
    (classification, the words in order; whole numbers are classes where they are few and are 0, 1, 2, ... without a
    gap); ``columns``: the others that are read, None for all that hold numbers.

    Columns are moved and scaled to mean 0 and deviation 1 of the training rows; empty cells count as the mean. Splits
    are drawn with ``seed``. Inputs are [n, columns]. A column is one of numbers where nearly all of its cells are;
    raises TaskError with the line of a cell that is none, or that 32 bits do not hold.

    Example:
        >>> from pathlib import Path
        >>> lines = "\\n".join(f"{k},{k % 3},{'high' if k > 20 else 'low'}" for k in range(40))
        >>> _ = Path("rows.csv").write_text("a,b,level\\n" + lines)
        >>> task = fw.task.table("rows.csv", "level", batch=8)
        >>> [t.shape for t in next(task.batches("train"))]
        [torch.Size([8, 2]), torch.Size([8])]
    """
    check_options("fw.task.table", DRAWN, batch=batch, validation=validation, test=test, seed=seed)
    held = sheet(path, target)
    numeric = [c for c in held.columns if c != target and held.numeric(c)]
    used = numeric if columns is None else list(columns)
    if isinstance(columns, str) or target in used:
        raise TaskError(f"table(columns={columns!r}, target={target!r}); expected a list of names without the target: "
                        f"write columns={numeric[:2]}")
    for column in used:
        if column not in numeric:
            raise TaskError(f"{path} has no numbers in a column {column!r}; {did_you_mean(str(column), numeric)}")
    if not used:
        raise TaskError(f"{path} has no column of numbers beside {target!r}; for texts write "
                        f"fw.task.texts({str(path)!r}, text=..., target={target!r}, tokenizer=...)")
    own = parted(len(held.lines), validation, test, seed)
    values = torch.tensor([held.numbers(c, ", or an empty cell where it is missing", True) for c in used],
                          dtype=torch.float64).T
    train = values[own["train"]]
    mean = train.nanmean(0)
    std = (train - mean).square().nanmean(0).sqrt()
    values = ((values - mean) / torch.where(std > 0, std, 1.0)).nan_to_num().float()
    targets, kinds = _targets(held, target)

    def split(name: str, shuffled: bool = False) -> Any:
        return passes(own[name], batch, lambda i: (values[i], targets[i]), shuffled)

    make = Task.classification if kinds else Task.regression
    return make(split("train", True), split("validation"), calibration=split("train"),
                test=split("test") if "test" in own else None)


def texts(path: str | Path, target: str, *, text: str = "text", tokenizer: str | Tokenizer, length: int = 128,
          pad: str = "length", batch: int = 32, validation: float = 0.1, test: float = 0.1, seed: int = 0) -> Task:
    """Texts from a CSV file with a line of names: the column ``text``, and in ``target`` a word (classification) or a
    number (regression).

    tokenizer: the name or folder of one of transformers, or a function (texts, padding=, truncation=, max_length=,
    return_tensors="pt") -> tensors by name. length: tokens at most. pad: to that "length", or to the "longest" text of
    a batch, which a network of free length takes. Splits are drawn with ``seed``.

    Example:
        >>> from pathlib import Path
        >>> lines = "\\n".join(f"{'good' if k % 2 else 'bad'} film,{k % 2}" for k in range(40))
        >>> _ = Path("films.csv").write_text("text,liked\\n" + lines)
        >>> def tokens(texts, max_length, **options):
        ...     rows = [[len(word) for word in one.split()][:max_length] for one in texts]
        ...     return {"input_ids": torch.tensor([row + [0] * (max_length - len(row)) for row in rows])}
        >>> task = fw.task.texts("films.csv", "liked", tokenizer=tokens, length=4, batch=8)
        >>> next(task.batches("train"))[0]["input_ids"].shape
        torch.Size([8, 4])
    """
    if pad not in ("length", "longest"):
        raise TaskError(f"texts(pad={pad!r}); expected 'length' or 'longest'")
    check_options("fw.task.texts", DRAWN | {"length": COUNT}, length=length, batch=batch, validation=validation,
                  test=test, seed=seed)
    held = sheet(path, target, text)
    cut = _tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    own = parted(len(held.lines), validation, test, seed)
    targets, kinds = _targets(held, target)

    def made(index: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        found = cut([held.columns[text][i] for i in index], padding="max_length" if pad == "length" else True,
                    truncation=True, max_length=length, return_tensors="pt")
        return dict(found), targets[list(index)]

    def split(name: str, shuffled: bool = False) -> Any:
        return passes(own[name], batch, made, shuffled)

    make = Task.classification if kinds else Task.regression
    return make(split("train", True), split("validation"), calibration=split("train"),
                test=split("test") if "test" in own else None)


def words(path: str | Path, target: str) -> list[str]:
    """The classes of a CSV file's target, in order; none where it is a number."""
    return _targets(sheet(path, target), target)[1]


def _tokenizer(name: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TaskError(f"tokenizer={name!r} is one of transformers, which is not here; write pip install "
                        "transformers, or give a function") from error
    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TaskError(f"transformers has no tokenizer {name!r}: {str(error).splitlines()[0]}; without a network give "
                        "the folder of a saved one") from error
    return found


def _targets(held: Sheet, target: str) -> tuple[Tensor, list[str]]:
    """The targets, and the words that classes stand for; integers of few kinds are classes too."""
    given = held.columns[target]
    if held.numeric(target):
        values = held.numbers(target, "; leave the row out, or write words in all rows where they are classes", False)
        few = sorted({int(v) for v in values}) if all(v.is_integer() for v in values) else []
        if few != list(range(len(few))) or len(few) > max(20, len(values) // 10):
            return torch.tensor(values), []
        return torch.tensor([int(v) for v in values]), [str(v) for v in few]
    kinds = sorted(set(given))
    return torch.tensor([kinds.index(value) for value in given]), kinds


__all__ = ["table", "texts", "words"]
