"""``quantize.Ladder`` and ``quantize.Mixed`` as version 0.1 had them: all options of ``Quantize`` beside their own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from featherweight.balance.ladder import Ladder as LadderStep
from featherweight.balance.mixed import Mixed as MixedStep
from featherweight.quantize.step import Quantize

T = TypeVar("T", LadderStep, MixedStep)


def Ladder(*args: Any, **options: Any) -> LadderStep:
    """``balance.Ladder(Quantize(...), score_drop=...)`` from options without a step inside."""
    return _with_step(LadderStep, args, options)


def Mixed(*args: Any, **options: Any) -> MixedStep:
    """``balance.Mixed(Quantize(...), bytes=...)`` from options without a step inside; ``ends`` is None if not said."""
    return _with_step(MixedStep, args, options, ends=None)


def _with_step(cls: type[T], args: tuple[Any, ...], options: dict[str, Any], **usual: Any) -> T:
    inner: list[str] = [f.name for f in fields(Quantize)]
    names = [*inner, *(f.name for f in fields(cls) if f.name != "step")]
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & options.keys():
        raise TypeError(f"{cls.__name__} takes {len(names)} options, each once; {len(args)} were given by place and "
                        f"{', '.join(options) or 'none'} by name")
    given = usual | given | options
    step = Quantize(**{n: v for n, v in given.items() if n in inner})
    return cls(step, **{n: v for n, v in given.items() if n not in inner})


__all__ = ["Ladder", "Mixed"]
