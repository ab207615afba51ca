"""What distillation brought: a job's result beside that of the same job without a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from featherweight.report import tables, units

Row = Mapping[str, Any]
#: options of a training that name what works beside it
OBJECTIVES = ("distill", "beside")
FAMILY = "distill."


def brought(result: Row, others: Sequence[Row]) -> str:
    """A table with the scores of ``result`` and of every other result whose recipe differs in what is learned from a
    teacher alone; "" where there is none.

    The scores are those of the validation split after each training that differs and after each later step, and those
    of the test split at the end, where both were scored.
    """
    blocks = [_rows(result, other) for other in others if _same(result, other)]
    rows = [row for block in blocks for row in block]
    if not rows:
        return ""
    columns = [tables.Column(head, [row[i] for row in rows], i > 1) for i, head in enumerate(
        ("step", "split", "with a teacher", "without", "difference"))]
    return tables.table(columns, "what distillation brought")


def taught(step: Row) -> bool:
    """Whether a step of a recipe learns from a teacher."""
    return step.get("distill") is not None or any(_objective(one) for one in step.get("beside") or ())


def _objective(one: Any) -> bool:
    return isinstance(one, Mapping) and str(one.get("kind", "")).startswith(FAMILY)


def _plain(step: Row) -> dict[str, Any]:
    """A step without what it learns from a teacher."""
    rest = {key: value for key, value in step.items() if key not in OBJECTIVES}
    beside = [one for one in step.get("beside") or () if not _objective(one)]
    return rest | ({"beside": beside} if beside else {})


def _same(result: Row, other: Row) -> bool:
    """Whether two jobs differ in their teachers alone, of which the first has more."""
    ours, theirs = result.get("recipe") or [], other.get("recipe") or []
    return ([_plain(s) for s in ours] == [_plain(s) for s in theirs]
            and sum(map(taught, ours)) > sum(map(taught, theirs)))


def _rows(result: Row, other: Row) -> list[list[str]]:
    """Cells of each step from the first that differs on, and of the test split."""
    ours, theirs = result.get("recipe") or [], other.get("recipe") or []
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True), 1) if a != b)
    trails = [list(r.get("trail") or [])[first:] for r in (result, other)]
    rows = [_row(tables.step_name(a, first + i), a, b) for i, (a, b) in enumerate(zip(*trails, strict=False))]
    ends = [(r.get("final") or {}).get("after") or {} for r in (result, other)]
    return [*rows, _row("at the end", *ends)] if all(ends) else rows


def _row(name: str, ours: Row, theirs: Row) -> list[str]:
    a, b = ours.get("score"), theirs.get("score")
    return [escape(name), escape(str(ours.get("split") or "")), units.score(a), units.score(b),
            units.difference(b, a)]


__all__ = ["brought", "taught"]
