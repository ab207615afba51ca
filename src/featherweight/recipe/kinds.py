"""Kinds of steps by name, and their options checked against the fields of their classes.

A kind is "family.Class": ``prune.Channels``, ``recover.Train``, ``distill.Logits``; the same in Python and TOML.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from featherweight.errors import RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.steps import Beside, Fit, Rewrite
from featherweight.steps.companion import gives_companions, is_beside
from featherweight.steps.kinds import REGISTERED, kind_of, options
from featherweight.steps.shipped import shipped

#: kinds of version 0.1 that had the options of a ``Quantize`` beside their own -> what they are now, around a step; and
#: what that step has where the table does not say it
FLAT: dict[str, tuple[str, dict[str, Any]]] = {"quantize.Ladder": ("balance.Ladder", {}),
                                               "quantize.Mixed": ("balance.Mixed", {"ends": "none"})}


def register(kind: str, cls: type) -> None:
    """Makes a step or objective of one's own known under ``kind`` ("mine.Step"), so that TOML may name it.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Twice(fw.steps.Fit):
        ...     def fit(self, network, task, context):
        ...         return network
        >>> fw.recipe.register("mine.Twice", Twice)
        >>> print(fw.Recipe([Twice()]).to_toml())
        [[steps]]
        kind = "mine.Twice"
    """
    if not is_kind(cls):
        raise RecipeError(f"{cls!r} is no frozen dataclass that is a Rewrite, a Fit or an objective (has start)")
    REGISTERED[kind] = cls


def is_kind(value: Any) -> bool:
    """Whether a class is a step, or stands beside a training."""
    return isinstance(value, type) and dataclasses.is_dataclass(value) and (
        issubclass(value, (Rewrite, Fit)) or gives_companions(value))


@cache
def _shipped() -> dict[str, type]:
    found = {}
    for family, module in shipped().items():
        for name in getattr(module, "__all__", ()):
            if is_kind(getattr(module, name)):
                found[f"{family}.{name}"] = getattr(module, name)
    return found


def kinds() -> dict[str, type]:
    """Every known kind -> its class.

    Example:
        >>> fw.recipe.kinds()["prune.Channels"] is fw.prune.Channels
        True
    """
    return {**_shipped(), **REGISTERED}


# ---- options

def build(table: Mapping[str, Any], where: str = "steps") -> Any:
    """The step or objective that a table ``{kind = "...", option = ...}`` describes.

    Raises RecipeError for an unknown kind or option (with the closest known one) and for values of a wrong type.
    """
    options = dict(table)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise RecipeError(f'{where}: a table without kind; write e.g. kind = "prune.Channels"')
    known = kinds()
    if kind in FLAT:
        kind, options = _around_a_step(kind, options)
    if kind not in known:
        raise RecipeError(f"{where}: unknown kind {kind!r}; {did_you_mean(kind, known)}")
    return make(known[kind], options, kind)


def _around_a_step(kind: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A kind of ``FLAT`` and its options as they are written now."""
    new, usual = FLAT[kind]
    inner = {f.name for f in dataclasses.fields(kinds()["quantize.Quantize"])}
    step = usual | {name: value for name, value in options.items() if name in inner}
    return new, {"step": {"kind": "quantize.Quantize", **step},
                 **{name: value for name, value in options.items() if name not in inner}}


def make(cls: type, options: Mapping[str, Any], name: str) -> Any:
    """An instance of the dataclass ``cls`` with these options, each checked against its field."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in options:
        if key not in fields:
            raise RecipeError(f"{name} has no option {key!r}; {did_you_mean(key, fields)}")
    missing = [f.name for f in fields.values() if f.name not in options and f.default is dataclasses.MISSING
               and f.default_factory is dataclasses.MISSING]
    if missing:
        raise RecipeError(f"{name} lacks {', '.join(missing)}; write e.g. {missing[0]} = ...")
    hints = _hints(cls)
    step = cls(**{key: _value(hints.get(key, Any), value, f"{name}: {key}") for key, value in options.items()})
    check = getattr(step, "check", None)
    if callable(check):
        check()
    return step


def validated(step: Any) -> Any:
    """The same step with its options checked (and lists made tuples); for what was written in Python."""
    cls = type(step)
    if not is_kind(cls):
        raise RecipeError(f"a recipe holds a {cls.__name__} ({str(step)[:80]}); expected frozen dataclasses that are "
                          "steps, e.g. fw.prune.Channels(macs=0.5) or fw.recover.Train(epochs=5)")
    given = {f.name: getattr(step, f.name) for f in dataclasses.fields(cls) if f.init}
    return make(cls, given, kind_of(step))


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls, include_extras=True)
    except (NameError, TypeError):  # a class made inside a function may name what only that function knows
        return {}


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as a field of type ``hint`` takes it: tables become steps or dataclasses, lists tuples."""
    value = _nested(hint, value, where)
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        choices = _choices(hint)
        hint_text = f"; {did_you_mean(value, choices)}" if isinstance(value, str) and choices else ""
        said = problem["msg"].removeprefix("Value error, ")
        said = said[:1].lower() + said[1:]
        raise RecipeError(f"{where} is {value!r}: {said}{hint_text}") from error


def _nested(hint: Any, value: Any, where: str) -> Any:
    members = _members(hint)
    if isinstance(value, str) and value == "none" and any(m in (Any, types.NoneType) for m in members):
        return None
    if isinstance(value, Mapping):
        if "kind" in value:
            return build(value, where)
        cls = next((m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)), None)
        if cls is not None:
            return make(cls, value, where)
        inner = next((get_args(m)[1] for m in members if len(get_args(m)) == 2 and _is_mapping(get_origin(m))), Any)
        return {key: _nested(inner, item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        inner = next((get_args(m)[0] for m in members if get_origin(m) in (tuple, list) and get_args(m)), Any)
        return tuple(_nested(inner, item, where) for item in value)
    return validated(value) if is_kind(type(value)) else value


def _is_mapping(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Mapping)


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, else the hint itself."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(m for h in get_args(hint) for m in _members(h))
    return (types.NoneType,) if hint is None else (hint,)


def _choices(hint: Any) -> list[str]:
    """The strings that a ``Literal`` in the hint allows."""
    return [c for m in _members(hint) for c in get_args(m) if isinstance(c, str)]


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_plain(hint), config=ConfigDict(arbitrary_types_allowed=True))


def _plain(hint: Any) -> Any:
    """The hint as pydantic can check it: protocols by their methods, dataclasses and our classes by ``isinstance``,
    numbers without True and False, which pydantic takes for 1 and 0."""
    if hint is Beside:
        return Annotated[Any, AfterValidator(_beside)]
    if hint in (int, float):
        return Annotated[hint, BeforeValidator(_number)]
    if isinstance(hint, type) and get_origin(hint) is None and (dataclasses.is_dataclass(hint) or hint is Network):
        return Annotated[Any, AfterValidator(lambda value: _instance(hint, value))]
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(_plain, get_args(hint)))]  # noqa: UP007
    if get_origin(hint) is tuple:
        return tuple[tuple(a if a is ... else _plain(a) for a in get_args(hint))]  # type: ignore[misc]
    if _is_mapping(get_origin(hint)) and len(get_args(hint)) == 2:
        return Mapping[get_args(hint)[0], _plain(get_args(hint)[1])]  # type: ignore[misc]
    return hint


def _instance(cls: type, value: Any) -> Any:
    if not isinstance(value, cls):
        raise ValueError(f"expected a {cls.__name__}")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _beside(value: Any) -> Any:
    if not is_beside(value):
        raise ValueError("expected an objective, e.g. distill.Logits(), or a rewrite, e.g. prune.Weights(sparsity=0.8)")
    return value


def line(step: Any) -> str:
    """The step as one writes it in Python: ``fw.prune.Channels(macs=0.5)``."""

    def text(value: Any) -> str:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return line(value)
        if isinstance(value, tuple):
            return f"({', '.join(map(text, value))}{',' if len(value) == 1 else ''})"
        return "network" if isinstance(value, Network) else repr(value)

    kind = kind_of(step)
    name = f"fw.{kind}" if kind in _shipped() else type(step).__name__
    return f"{name}({', '.join(f'{k}={text(v)}' for k, v in options(step).items())})"
