"""Recipes as TOML text: tables out of steps and steps out of tables."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.recipe.kinds import kinds
from featherweight.steps.kinds import kind_of, options

#: tables that a job file may have
TABLES = ("steps", "model", "task", "data", "compress", "goal")


def parse(source: str | Path) -> dict[str, Any]:
    """The tables of a TOML file (a Path, or a string that ends in ".toml") or text."""
    path, name = (Path(source) if is_path(source) else None), "the recipe"
    if path is not None:
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe; write one with [[steps]] tables")
        name = str(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8") if path is not None else str(source))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{name} is no TOML: {error}") from error
    for key in tables:
        if key not in TABLES:
            raise RecipeError(f"{name} has a table {key!r}; {did_you_mean(key, TABLES)}")
    steps = tables.get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise RecipeError(f'{name}: steps are no list of tables; write [[steps]] and kind = "prune.Channels" under it')
    return tables


def is_path(source: str | Path) -> bool:
    """Whether a source of TOML is a file's name rather than its text."""
    return isinstance(source, Path) or ("\n" not in source and source.endswith(".toml"))


def describe(step: Any, complete: bool = False) -> dict[str, Any]:
    """``{"kind": ..., option: ...}`` of a step: JSON-able, options at their defaults left out unless ``complete``.

    Raises RecipeError for what a text cannot hold: steps of one's own that are not registered, networks, functions.
    """
    kind = kind_of(step)
    if kind not in kinds():
        raise RecipeError(f"{type(step).__name__} is no registered kind; write fw.recipe.register('mine."
                          f"{type(step).__name__}', {type(step).__name__}) first")
    given = options(step, complete)
    return {"kind": kind, **{key: _plain(value, f"{kind}: {key}", complete) for key, value in given.items()}}


def _plain(value: Any, where: str, complete: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) in kinds().values():
            return describe(value, complete)
        return {key: _plain(item, where, complete) for key, item in options(value, complete).items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, complete) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, where, complete) for item in value]
    if value is None:
        return "none"
    if isinstance(value, (bool, int, float, str)):
        return value
    instead = "; give the path of a saved one instead" if isinstance(value, Network) else ""
    raise RecipeError(f"{where} is a {type(value).__name__}, which a recipe in TOML cannot hold{instead}")


def plain(value: Any) -> Any:
    """A value of an option as a job file has it. Raises RecipeError for what a text cannot hold."""
    return _plain(value, "a default", False)


def write(table: Mapping[str, Any]) -> str:
    """``key = value`` lines of one table."""
    return "".join(f"{_key(key)} = {_text(value)}\n" for key, value in table.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_text(v)}" for k, v in value.items()) + "}"
    raise RecipeError(f"a {type(value).__name__} ({value!r}) cannot be written as TOML")


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key)
    return key if bare else _text(key)
