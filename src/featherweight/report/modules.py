"""The report's table of modules: weights, parameters, latency, MACs and bytes, before and after, with bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from featherweight.report import units
from featherweight.report.tables import Column, table

Row = Mapping[str, Any]
#: rows beyond these are counted, not listed, so that the page stays small
MOST = 600
#: head, key, kind of unit, whether bars are drawn
FIGURES = (("params", "params", "count", False), ("latency", "seconds", "seconds", True),
           ("MACs", "macs", "count", True), ("stored", "bytes", "bytes", True))


def modules(before: Sequence[Row], after: Sequence[Row], between: Sequence[float] = ()) -> str:
    """Module by module: the largest weight's shape and type, and the figures before and after. Batch norms that were
    folded away are counted below. between: seconds of the kernels between layers at both ends."""
    old, new = by_path(before), by_path(after)
    folded = [p for p in old if p not in new and operator(old[p]).startswith("batch_norm")]
    paths = [p for p in dict.fromkeys([*old, *new]) if p not in folded]
    shown = paths[:MOST]
    rows = [(old.get(p), new.get(p)) for p in shown]
    columns = [
        Column("module", [f"<code>{escape(p or '(top)')}</code>" for p in shown], numeric=False),
        Column("operator", [escape(operator(b or a)) for b, a in rows], numeric=False),
        Column("largest weight", [_arrow(_weight(b), _weight(a), a) for b, a in rows], numeric=False),
    ]
    for head, key, kind, drawn in FIGURES:
        values = [r[key] for pair in rows for r in pair if r is not None and r[key] is not None]
        if key == "seconds" and not any(values):
            continue
        scale, name = units.unit(kind, values)
        top = max(values, default=0) or 1
        cells = [_arrow(_figure(b, key, scale), _figure(a, key, scale), a) + (_bars(b, a, key, top) if drawn else "")
                 for b, a in rows]
        columns.append(Column(f"{head} ({name})" if name else head, cells))
    return (table(columns, "module by module, before and after", tall=True)
            + _below(len(paths) - len(shown), len(folded), between))


def _below(more: int, folded: int, between: Sequence[float]) -> str:
    said = []
    if more:
        said.append(f"… and {more} more modules.")
    if folded:
        said.append(f"{folded} batch norm{'s were' if folded > 1 else ' was'} folded into the layer before.")
    if len(between) == 2 and any(between):
        scale, name = units.unit("seconds", between)
        said.append("Kernels between the layers (sums, pools, roundings, layouts): "
                    f"{units.number(between[0], scale)} → {units.number(between[1], scale)} {name}. Latencies of "
                    "layers are of the runtime's own profile, which adds a little to each kernel.")
    return f"<p class=quiet>{' '.join(said)}</p>" if said else ""


def by_path(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """One entry per module path: sums over its calls, and its largest weight."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault(str(row.get("path") or ""), {
            "operator": row.get("operator"), "params": 0, "macs": 0, "bytes": 0, "seconds": None, "shape": None,
            "dtype": None, "size": 0, "weights": 0})
        for key in ("params", "macs", "bytes"):
            entry[key] = None if entry[key] is None or row.get(key) is None else entry[key] + row[key]
        if row.get("seconds") is not None:
            entry["seconds"] = (entry["seconds"] or 0.0) + row["seconds"]
        entry["weights"] += row.get("shape") is not None
        if row.get("shape") is not None and (row.get("params") or 0) >= entry["size"]:
            entry |= {"shape": row["shape"], "dtype": row.get("dtype"), "size": row.get("params") or 0,
                      "operator": row.get("operator")}
    return found


def operator(row: Row | None) -> str:
    """An operator's name, shortly."""
    return str((row or {}).get("operator") or "").removeprefix("aten.").partition(".")[0]


def _figure(row: Row | None, key: str, scale: float) -> str | None:
    return None if row is None else units.number(row[key], scale)


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


def _bars(before: Row | None, after: Row | None, key: str, top: float) -> str:
    """Two bars, before and after, as shares of the longest."""
    wide = [round(100 * (row[key] or 0) / top, 1) if row is not None else 0 for row in (before, after)]
    return f'<span class=pair><i style="width:{wide[0]:g}%"></i><i style="width:{wide[1]:g}%"></i></span>'


__all__ = ["by_path", "modules", "operator"]
