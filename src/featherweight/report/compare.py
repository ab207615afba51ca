"""``compared``: several jobs on one page, beside one another."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

from featherweight.report import charts, tables, units

Row = Mapping[str, Any]

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title · featherweight</title><style>$style</style></head>
<body><main><header><h1>$title</h1></header>
$charts<section><h2>Figures</h2>$figures</section><section><h2>Steps</h2>$steps</section>$footer
</main></body></html>
""")


def compared(results: Mapping[str, Row]) -> str:
    """The text of one HTML file (nothing is fetched) that shows jobs side by side: the result of each, by the name that
    it is given under, with its ratios to its own original.

    Latencies of different jobs were not taken in the same rounds; machines are named where they differ. Scores are
    those of the split that every step was scored on.

    Example:
        >>> page = fw.report.compared({"a": result.to_dict(), "b": result.to_dict()})
        >>> "2 jobs" in page
        True
    """
    ends = {name: _ends(held) for name, held in results.items()}
    machines = {str(found) for held in results.values() if (found := (held.get("machine") or {}).get("processor"))}
    caution = "Latencies of different jobs were not taken in the same rounds."
    if len(machines) > 1:
        caution += f" They ran on different processors: {', '.join(sorted(machines))}."
    return PAGE.substitute(
        title=escape(f"{len(results)} jobs: {', '.join(results)}"[:120]),
        style=resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"),
        charts=_charts(ends), figures=_figures(ends), steps=_steps(results),
        footer=f"<footer><p>{escape(caution)}</p></footer>")


def _ends(held: Row) -> tuple[Row, Row]:
    trail = list(held.get("trail") or []) or [{}]
    return trail[0], trail[-1]


def _charts(ends: Mapping[str, tuple[Row, Row]]) -> str:
    """Every job's result, numbered, by size and by latency against the score."""
    figures = []
    for title, kind, value in (("File size", "bytes", lambda m: m.get("file_bytes")),
                               ("Latency", "seconds", tables.latency_s)):
        rows = [(i, name, value(last), last.get("score")) for i, (name, (_, last)) in enumerate(ends.items(), 1)]
        scale, unit = units.unit(kind, [row[2] for row in rows])
        markers = [charts.Marker(x / scale, float(y), i, name) for i, name, x, y in rows
                   if x is not None and y is not None]
        if len(markers) > 1:
            score = next(str(last.get("score_name")) for _, last in ends.values() if last.get("score") is not None)
            drawn = charts.scatter(markers, f"{title.lower()} ({unit})", score, title, joined=False)
            figures.append(f"<figure><figcaption>{escape(f'{title} against {score}')}</figcaption>{drawn}</figure>")
    return f'<section><h2>Trade-offs</h2><div class="charts">{"".join(figures)}</div></section>' if figures else ""


def _figures(ends: Mapping[str, tuple[Row, Row]]) -> str:
    names = [f"{i}&ensp;{escape(name)}" for i, name in enumerate(ends, 1)]
    columns = [tables.Column("job", names, numeric=False)]
    scores = [last.get("score") for _, last in ends.values()]
    if any(score is not None for score in scores):
        kinds = list(dict.fromkeys(str(last.get("score_name")) for _, last in ends.values()))
        columns.append(tables.Column(" / ".join(kinds), [
            f"{units.score(last.get('score'))}<small>{units.difference(first.get('score'), last.get('score'))}</small>"
            for first, last in ends.values()]))
    changes = [tables.changes(first, last) for first, last in ends.values()]
    for row in zip(*changes, strict=True):
        title, kind = row[0][0], row[0][1]
        if any(after is not None for _, _, _, after, _ in row):
            columns.append(tables.Column(title, [f"{escape(units.amount(kind, after))}<small>{escape(said)}</small>"
                                                 for _, _, _, after, said in row]))
    return tables.table(columns, "the results of the jobs")


def _steps(results: Mapping[str, Row]) -> str:
    parts = []
    for i, (name, held) in enumerate(results.items(), 1):
        trail = [tables.step_name(m, k) for k, m in enumerate(held.get("trail") or [])][1:]
        flags = "".join(f"<br>flag: {escape(str(flag))}" for flag in held.get("flags") or [])
        parts.append(f"<li><b>{i} {escape(name)}</b> {escape(str(held.get('model') or ''))}: "
                     f"{escape(' → '.join(trail)) or 'no step'}{flags}</li>")
    return f'<ul class="notes">{"".join(parts)}</ul>'


__all__ = ["compared"]
