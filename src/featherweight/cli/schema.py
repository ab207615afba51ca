"""A JSON schema of job files, made from the classes that read them: editors complete and check by it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from featherweight.balance import Budget
from featherweight.balance.combine.axes import AXES
from featherweight.balance.combine.budget import FIGURES
from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.recipe import toml
from featherweight.recipe.job import Data, Model, Options
from featherweight.recipe.kinds import kinds
from featherweight.steps import Beside, Fit, Rewrite
from featherweight.steps.companion import gives_companions
from featherweight.task.arrays import arrays
from featherweight.task.images import images
from featherweight.task.table import table, texts

Schema = dict[str, Any]
DRAFT = "http://json-schema.org/draft-07/schema#"  #: what the editors' TOML plugins read
#: a type -> what JSON calls it
PLAIN: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}
#: what a [data] table names -> the functions that read it, whose options it may have
READERS: dict[str, tuple[Callable[..., Any], ...]] = {"images": (images,), "csv": (table, texts), "npz": (arrays,)}


def job_schema() -> Schema:
    """The JSON schema (draft 7) of ``job.toml``: its tables, every kind of step with its options, their types and what
    the docstrings say of them. Registered steps of one's own are in it."""
    known = kinds()
    steps = [name for name, cls in known.items() if issubclass(cls, (Rewrite, Fit))]
    beside = [name for name, cls in known.items() if gives_companions(cls)]
    definitions = {name: _kind(name, cls) for name, cls in known.items()}
    definitions |= {"any step": _of(steps), "any rewrite": _of([n for n in steps if issubclass(known[n], Rewrite)]),
                    "any beside": _of(beside)}
    return {"$schema": DRAFT, "title": "featherweight job", "type": "object", "additionalProperties": False,
            "required": ["model"],
            "oneOf": [{"required": ["task"]}, {"required": ["data"]}],
            "properties": {"model": _table(Model), "task": _table(Data), "data": _data(), "compress": _table(Options),
                           "goal": _goal(),
                           "steps": {"type": "array", "items": {"$ref": "#/definitions/any step"}}},
            "definitions": definitions}


def _goal() -> Schema:
    """Limits, and options of a search."""
    found = _table(Budget)
    limit = {"anyOf": [{"type": "number"}, {"type": "string"}]}
    properties = {**found["properties"], **dict.fromkeys(FIGURES, limit),
                  "minimize": {"enum": [*FIGURES, "score_drop"]}, "minutes": {"type": "number"},
                  "trials": {"type": "integer"}, "times": {"type": "string"}, "workers": {"type": "integer"},
                  "families": {"type": "array", "items": {"enum": list(AXES)}}}
    return {**found, "properties": properties}


def _of(names: list[str]) -> Schema:
    """One of these kinds; a table without a kind, or of another, is named by ``kind`` alone."""
    return {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": names}},
            "allOf": [{"if": {"properties": {"kind": {"const": name}}}, "then": {"$ref": f"#/definitions/{name}"}}
                      for name in names]}


def _kind(name: str, cls: type) -> Schema:
    held = _table(cls)
    return {**held, "properties": {"kind": {"const": name}, **held["properties"]},
            "required": ["kind", *held.get("required", [])]}


def _table(cls: type) -> Schema:
    """The table that stands for an instance of a dataclass."""
    fields = [f for f in dataclasses.fields(cls) if f.init]
    hints = _hints(cls)
    told = options_told(cls.__doc__ or "")
    properties = {f.name: {**hint(hints.get(f.name, Any)), **_default(f),
                           **({"description": told[f.name]} if f.name in told else {})} for f in fields}
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    return {"type": "object", "description": _first(cls.__doc__), "additionalProperties": False,
            "properties": properties, **({"required": required} if required else {})}


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except (NameError, TypeError):  # a class made inside a function may name what only that function knows
        return {}


def _default(field: dataclasses.Field[Any]) -> Schema:
    given = field.default
    if given is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return {}
        given = field.default_factory()
    try:
        return {"default": toml.plain(given)}
    except RecipeError:
        return {}


def _data() -> Schema:
    """One source and the options of what reads it."""
    tables = []
    for source, readers in READERS.items():
        properties: Schema = {source: {"type": "string", "description": _first(readers[0].__doc__)}}
        for reader in readers:
            told = options_told(reader.__doc__ or "")
            hints = get_type_hints(reader)
            for parameter in list(inspect.signature(reader).parameters.values())[1:]:
                properties[parameter.name] = {
                    **hint(hints[parameter.name]),
                    **({"description": told[parameter.name]} if parameter.name in told else {})}
        tables.append({"type": "object", "properties": properties, "additionalProperties": False,
                       "required": [source, *(["target"] if source == "csv" else [])]})
    return {"oneOf": tables}


def hint(given: Any) -> Schema:
    """What a value of this type looks like in a job file; what cannot be told takes anything."""
    origin, inner = get_origin(given), get_args(given)
    if origin is Annotated:
        return hint(inner[0])
    if given in PLAIN:
        return {"type": PLAIN[given]}
    if given is types.NoneType:
        return {"const": "none"}
    if given is Beside:
        return {"$ref": "#/definitions/any beside"}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [hint(one) for one in inner]}
    if origin in (tuple, list) or (isinstance(origin, type) and not issubclass(origin, Mapping) and len(inner) == 1):
        return {"type": "array", "items": hint(inner[0]) if inner else {}}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": hint(inner[1])}
    return _class(given)


def _class(given: Any) -> Schema:
    if not isinstance(given, type) or given is Network:
        return {}
    if given is Rewrite:
        return {"$ref": "#/definitions/any rewrite"}
    found = next((name for name, cls in kinds().items() if cls is given), None)
    return {} if found is None else {"$ref": f"#/definitions/{found}"}


# ---- what docstrings say
#: "name: ..." or "name, name: ..." at the start of a sentence
OPTION = re.compile(r"(?:^|(?<=[.;)] ))((?:[a-z_]\w*(?:, | or ))*[a-z_]\w*): ")


def options_told(text: str) -> dict[str, str]:
    """Option -> what a docstring says of it, as one line."""
    body = inspect.cleandoc(text).partition("\nExample:")[0]
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n(?=\S)", body):
        line = " ".join(paragraph.split())
        marks = list(OPTION.finditer(line))
        ends = [*(mark.start() for mark in marks[1:]), len(line)]
        for mark, end in zip(marks, ends[:len(marks)], strict=True):
            said = line[mark.end():end].strip()
            found |= dict.fromkeys(re.split(r", | or ", mark[1]), said)
    return found


def _first(text: str | None) -> str:
    """The first paragraph."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


__all__ = ["job_schema"]
