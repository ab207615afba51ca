"""The report's tables, from the dicts of ``result.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from featherweight.measure import Ratio
from featherweight.report import units

Row = Mapping[str, Any]
#: rows and names beyond these are counted, not listed, so that the page stays small
MOST_LAYERS, MOST_NAMES = 600, 120


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


def layers(before: Sequence[Row], after: Sequence[Row]) -> str:
    """Module by module: the largest weight's shape and type, params, MACs and bytes, before and after."""
    old, new = _by_path(before), _by_path(after)
    paths = list(dict.fromkeys([*old, *new]))
    shown = paths[:MOST_LAYERS]
    rows = [(p, old.get(p), new.get(p)) for p in shown]
    columns = [
        Column("module", [f"<code>{escape(p or '(top)')}</code>" for p in shown], numeric=False),
        Column("operator", [escape(_operator(b or a)) for _, b, a in rows], numeric=False),
        Column("largest weight", [_arrow(_weight(b), _weight(a), a) for _, b, a in rows], numeric=False),
    ]
    for head, key, kind in (("params", "params", "count"), ("MACs", "macs", "count"), ("stored", "bytes", "bytes")):
        values = [r[key] for _, b, a in rows for r in (b, a) if r is not None]
        scale, name = units.unit(kind, values)
        cells = [_arrow(_figure(b, key, scale), _figure(a, key, scale), a) for _, b, a in rows]
        columns.append(Column(f"{head} ({name})" if name else head, cells))
    more = f"<p class=quiet>… and {len(paths) - len(shown)} more modules.</p>" if len(paths) > len(shown) else ""
    return table(columns, "module by module, before and after", tall=True) + more


def _by_path(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """One entry per module path: sums over its calls, and its largest weight."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault(str(row.get("path") or ""), {
            "operator": row.get("operator"), "params": 0, "macs": 0, "bytes": 0, "shape": None, "dtype": None,
            "size": 0, "weights": 0})
        for key in ("params", "macs", "bytes"):
            entry[key] = None if entry[key] is None or row.get(key) is None else entry[key] + row[key]
        entry["weights"] += row.get("shape") is not None
        if row.get("shape") is not None and (row.get("params") or 0) >= entry["size"]:
            entry |= {"shape": row["shape"], "dtype": row.get("dtype"), "size": row.get("params") or 0,
                      "operator": row.get("operator")}
    return found


def _figure(row: Row | None, key: str, scale: float) -> str | None:
    return None if row is None else units.number(row[key], scale)


def _operator(row: Row | None) -> str:
    name = str((row or {}).get("operator") or "").removeprefix("aten.")
    return name.partition(".")[0]


def _weight(row: Row | None) -> str | None:
    if row is None:
        return None
    if row["shape"] is None:
        return "no weight"
    more = f" +{row['weights'] - 1}" if row["weights"] > 1 else ""
    return f"{escape(' × '.join(map(str, row['shape'])))} {escape(str(row['dtype']))}{more}"


def _arrow(before: str | None, after: str | None, now: Row | None) -> str:
    if now is None:
        return f'<span class="gone">{before}</span>'
    if before is None:
        return f"<b>{after}</b>"
    return before if before == after else f'<span class="quiet">{before} →</span> <b>{after}</b>'


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
