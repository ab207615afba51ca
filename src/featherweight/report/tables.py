"""The report's tables, from the dicts of ``result.json``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from featherweight.measure import Ratio
from featherweight.report import units

Row = Mapping[str, Any]
#: names beyond these are counted, not listed, so that the page stays small
MOST_NAMES = 120


@dataclass(frozen=True)
class Column:
    """A table column: its head, its cells as HTML; numbers are set flush right."""

    head: str
    cells: Sequence[str]
    numeric: bool = True


def table(columns: Sequence[Column], label: str, tall: bool = False) -> str:
    """An HTML table that scrolls inside its own box."""
    heads = "".join(f'<th scope="col"{_kind(c)}>{escape(c.head)}</th>' for c in columns)
    rows = "".join("<tr>" + "".join(f"<td{_kind(c)}>{c.cells[i]}</td>" for c in columns) + "</tr>"
                   for i in range(len(columns[0].cells)))
    box = "scroll tall" if tall else "scroll"
    return (f'<div class="{box}" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
            f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>")


def _kind(column: Column) -> str:
    return ' class="n"' if column.numeric else ""


def latency_s(m: Row, key: str = "median_s") -> float | None:
    """A figure of a measurement's latency in seconds; None where none was measured."""
    found = (m.get("latency") or {}).get(key)
    return None if found is None else float(found)


def verdict(first: Row, last: Row) -> str:
    """Whether ``last`` is "faster" or "slower" than ``first`` beyond doubt, else "": by their paired ratios, which the
    measurement of a later step holds; where there are none, by quartiles that do not overlap."""
    ratio = (last.get("ratios") or {}).get("original")
    if ratio:
        return Ratio(**ratio).verdict
    old, new = first.get("latency") or {}, last.get("latency") or {}
    if None in (old.get("q1_s"), old.get("q3_s"), new.get("q1_s"), new.get("q3_s")):
        return ""
    return "faster" if new["q3_s"] < old["q1_s"] else "slower" if new["q1_s"] > old["q3_s"] else ""


def speed(first: Row, last: Row) -> str:
    """How much faster or slower ``last`` is, or that no difference was measured; "" where one was not timed."""
    before, after = latency_s(first), latency_s(last)
    if before is None or after is None:
        return ""
    return units.ratio(before, after, "faster", "slower") if verdict(first, last) else units.SAME


def changes(first: Row, last: Row) -> list[tuple[str, str, float | None, float | None, str]]:
    """(measure, kind of unit, before, after, the change in words) of both ends of a trail, for whoever shows them."""
    rows = (("deployed file", "bytes", "file_bytes", "smaller", "larger"),
            ("archive", "bytes", "archive_bytes", "smaller", "larger"),
            ("latency", "seconds", "", "", ""),
            ("MACs", "count", "macs", "fewer", "more"), ("parameters", "count", "params", "fewer", "more"),
            ("peak memory", "bytes", "memory_bytes", "smaller", "larger"))
    return [(title, kind, first.get(key), last.get(key), units.ratio(first.get(key), last.get(key), better, worse))
            if key else (title, kind, latency_s(first), latency_s(last), speed(first, last))
            for title, kind, key, better, worse in rows]


def step_name(m: Row, index: int) -> str:
    """What a row of the trail is called."""
    return str(m.get("step") or ("original" if index == 0 else f"step {index}"))


def scaled(kind: str, head: str, values: Sequence[float | None]) -> Column | None:
    """A column of numbers in one unit, its ratio to the first below each; None if nothing in it was measured."""
    if all(v is None for v in values):
        return None
    scale, name = units.unit(kind, values)
    cells = []
    for i, value in enumerate(values):
        first = values[0]
        note = f"{first / value:.2f} ×" if i and first and value else ""
        cells.append(f"{units.number(value, scale)}<small>{note}</small>")
    return Column(f"{head} ({name})" if name else head, cells)


def trail(measured: Sequence[Row]) -> str:
    """One row per step: what came out, in figures, each with its ratio to the untouched model."""
    names = [f"{i}&ensp;{escape(step_name(m, i))}" for i, m in enumerate(measured)]
    score_name = next((str(m.get("score_name")) for m in measured if m.get("score") is not None), "score")
    columns: list[Column | None] = [Column("step", names, numeric=False)]
    scores = [m.get("score") for m in measured]
    if any(s is not None for s in scores):
        moved = [units.difference(scores[0], s) if i else "" for i, s in enumerate(scores)]
        columns.append(Column(score_name, [f"{units.score(s)}<small>{d}</small>"
                                           for s, d in zip(scores, moved, strict=True)]))
    columns.append(scaled("bytes", "file", [m.get("file_bytes") for m in measured]))
    columns.append(_latency_column(measured))
    columns.append(scaled("count", "MACs", [m.get("macs") for m in measured]))
    columns.append(scaled("count", "params", [m.get("params") for m in measured]))
    columns.append(Column("zeros", [_zeros(m) for m in measured]))
    columns.append(scaled("bytes", "archive", [m.get("archive_bytes") for m in measured]))
    columns.append(scaled("bytes", "peak memory", [m.get("memory_bytes") for m in measured]))
    columns.append(Column("file vs PyTorch", [_agreement(m) for m in measured]))
    return table([c for c in columns if c is not None], "every step, measured")


def steps(measured: Sequence[Row], plans: Sequence[Row], seconds: Sequence[float | None] = ()) -> str:
    """What each step took and gave, beside the step before it."""
    if len(measured) < 2:
        return ""
    took = {int(p["step"]): p.get("seconds") for p in plans if p.get("step") is not None}
    took |= {i: value for i, value in enumerate(seconds, 1) if value is not None}
    pairs_ = list(itertools.pairwise(measured))
    score_name = next((str(m.get("score_name")) for m in measured if m.get("score") is not None), "")
    columns = [Column("step", [f"{i}&ensp;{escape(step_name(m, i))}" for i, m in enumerate(measured[1:], 1)], False),
               Column("took", [units.amount("seconds", took.get(i)) for i in range(1, len(measured))])]
    if score_name:
        columns.append(Column(score_name, [units.difference(a.get("score"), b.get("score")) or units.NONE
                                           for a, b in pairs_]))
    for head, key, better, worse in (("file", "file_bytes", "smaller", "larger"), ("MACs", "macs", "fewer", "more"),
                                     ("params", "params", "fewer", "more")):
        if any(m.get(key) is not None for m in measured):
            columns.append(Column(head, [units.ratio(a.get(key), b.get(key), better, worse) or units.NONE
                                         for a, b in pairs_]))
    if any(latency_s(m) is not None for m in measured):
        columns.append(Column("latency", [_faster(a, b) or units.NONE for a, b in pairs_]))
    return table(columns, "what each step took and gave")


def _faster(before: Row, after: Row) -> str:
    """The change of latency from one step to the next, as timed in the same rounds where it was."""
    ratio = (after.get("ratios") or {}).get("before")
    if ratio is None:
        return speed({**before, "ratios": {}}, {**after, "ratios": {}})
    if not Ratio(**ratio).verdict:
        return units.SAME
    return units.ratio(ratio["median"], 1.0, "faster", "slower")


def _latency_column(measured: Sequence[Row]) -> Column | None:
    column = scaled("seconds", "latency", [latency_s(m) for m in measured])
    if column is None:
        return None
    scale, name = units.unit("seconds", [latency_s(m) for m in measured])
    cells = []
    for i, m in enumerate(measured):
        same_rounds = (m.get("beside") or {}).get("original")
        start, median = {"latency": same_rounds} if same_rounds else measured[0], latency_s(m)
        first = latency_s(start)
        quartiles = "" if median is None else \
            f"{units.number(latency_s(m, 'q1_s'), scale)}…{units.number(latency_s(m, 'q3_s'), scale)}"
        faster = "" if not (i and first and median) else \
            f"{first / median:.2f} × · " if verdict(start, m) else f"{units.SAME} · "
        cells.append(f"{units.number(median, scale)}<small>{faster}{quartiles}</small>")
    return Column(f"latency ({name})", cells)


def _zeros(m: Row) -> str:
    if not m.get("params") or m.get("nonzeros") is None:
        return units.NONE
    return f"{100 * (1 - m['nonzeros'] / m['params']):.1f} %"


def _agreement(m: Row) -> str:
    found = m.get("agreement")
    if not found:
        return units.NONE
    verdict = "within" if found["ok"] else '<b class="bad">above</b>'
    return f"{found['max_rel']:.1e}<small>{verdict} {found['tolerance']:.0e}</small>"


def skipped(plans: Sequence[Row]) -> str:
    """What every plan left alone, grouped by the reason it gave."""
    groups: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        for item in plan.get("skipped") or ():
            paths = groups.setdefault((str(plan.get("kind")), str(item.get("reason"))), [])
            if str(item.get("path")) not in paths:
                paths.append(str(item.get("path")))
    if not groups:
        return "<p>No step left anything alone.</p>"
    parts = []
    for (kind, reason), paths in groups.items():
        names = ", ".join(f"<code>{escape(p or '(top)')}</code>" for p in paths[:MOST_NAMES])
        if len(paths) > MOST_NAMES:
            names += f" … and {len(paths) - MOST_NAMES} more"
        head = f"<b>{escape(reason)}</b> <span class=quiet>{escape(kind)}, {len(paths)}</span>"
        parts.append(f"<details{' open' if len(paths) <= 8 else ''}><summary>{head}</summary><p>{names}</p></details>")
    return "".join(parts)


def pairs(items: Mapping[str, Any], show: Callable[[Any], str] = str) -> str:
    """"name value" for each item, escaped for HTML."""
    return ", ".join(f"{escape(str(k))} {escape(show(v))}" for k, v in items.items())
