"""What a search tried: the front, what each family reaches alone, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from featherweight.report import charts
from featherweight.report.tables import Column, table

Row = Mapping[str, Any]
#: trials named in the table, beside the chosen one and the best of each family
FIGURES = {"latency": "latency", "file_bytes": "deployed file", "archive_bytes": "archive", "macs": "MACs",
           "memory": "memory"}


def roads(search: Row) -> str:
    """HTML of ``search``, as ``search.json`` has it: what each combination leaves of the original's figures, and what
    it loses of the score."""
    chosen: Row = search.get("chosen") or {}
    if not chosen:
        return ""
    alone: Mapping[str, Row] = search.get("alone") or {}
    named = [("chosen", chosen)]
    named += [(f"{name} alone", trial) for name, trial in alone.items() if not trial.get("failed")]
    figures = [name for name in FIGURES if name in (chosen.get("shares") or {})]
    columns = [Column("", [escape(name) for name, _ in named], numeric=False),
               Column("what", [escape(_told(trial)) for _, trial in named], numeric=False),
               *(Column(FIGURES[name], [_share(trial, name) for _, trial in named]) for name in figures),
               Column("score", [f"{0 - float(trial.get('drop') or 0):+.4g}" for _, trial in named])]
    missed = "".join(f"<p>Missed: {escape(name)}: {escape(str(how))}.</p>"
                     for name, how in (search.get("missed") or {}).items())
    count = len(search.get("trials") or [])
    return (f"<p>{count} combinations were measured. Figures are shares of the original's.</p>"
            f"{missed}{table(columns, 'What a search tried')}{_front(search, figures)}")


def _told(trial: Row) -> str:
    return f"{trial.get('what')}{', shortly trained' * bool(trial.get('probe'))}"


def _share(trial: Row, name: str) -> str:
    share = (trial.get("shares") or {}).get(name)
    return "–" if share is None else f"{float(share):.3f}"


def _front(search: Row, figures: Sequence[str]) -> str:
    """The trials of which no other is both cheaper and better, as a line from the cheapest on."""
    figure = search.get("minimize") if search.get("minimize") in figures else figures[0] if figures else None
    front = [trial for trial in search.get("front") or [] if figure in (trial.get("shares") or {})]
    if figure is None or len(front) < 2:
        return ""
    points = tuple((float(trial["shares"][figure]), -float(trial["drop"])) for trial in front)
    title = "What the score costs"
    drawing = charts.curves([charts.Line("front", points)], f"{FIGURES[figure]}, share of the original's",
                            "score, difference", title, origin=False)
    return f"<figure><figcaption>{title}</figcaption>{drawing}</figure>"


__all__ = ["roads"]
