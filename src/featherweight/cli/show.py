"""Tables for people.

Names come from models and files of strangers: whatever is printed goes through ``printable`` or ``row``, which show
control characters as escapes and take no markup from a text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from featherweight.measure import LayerFigures, Measurement
from featherweight.report import tables, units

out = Console()
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = 140  # into a file or a pipe: wide enough for module paths
err = Console(stderr=True)
#: a line break, and the spaces of figures (none of them lets a line break, thin between thousands)
SPACES = "\n\u00a0\u2009"


def printable(text: object) -> str:
    """A text as it may be shown: all but printable characters, spaces and line breaks as escapes (ESC as \\x1b)."""
    return "".join(c if c.isprintable() or c in SPACES else c.encode("unicode_escape").decode() for c in str(text))


def row(table: Table, *cells: str) -> None:
    """Adds a row to a table, each cell as plain text."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def line(text: object) -> None:
    """One line of a result, as plain text."""
    out.print(Text(printable(text)), soft_wrap=True)


def document(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1))


def comparison(first: Measurement, last: Measurement, title: str) -> Table:
    """Before and after, one row a measure."""
    table = Table(title=Text(printable(title)), title_justify="left", header_style="bold")
    for head in ("", "before", "after", "change"):
        table.add_column(head, justify="left" if head in ("", "change") else "right")
    for name, kind, before, after, change in tables.changes(first.to_dict(), last.to_dict()):
        if before is not None or after is not None:
            row(table, name, units.amount(kind, before), units.amount(kind, after), change)
    if last.score is not None:
        row(table, f"{last.score_name} ({last.split})", units.score(first.score), units.score(last.score),
            units.difference(first.score, last.score))
    return table


def measurement(m: Measurement) -> Table:
    """One network's figures."""
    table = Table(show_header=False)
    latency = m.latency
    for name, text in (
            ("parameters", units.amount("count", m.params)),
            ("zeros", f"{100 * (1 - m.nonzeros / m.params):.1f} %" if m.params else units.NONE),
            ("MACs a sample", units.amount("count", m.macs) + (" at least" if m.uncounted else "")),
            ("network file", units.amount("bytes", m.network_bytes)),
            (f"deployed file ({m.target})", units.amount("bytes", m.file_bytes)),
            ("archive", units.amount("bytes", m.archive_bytes)),
            ("latency", units.NONE if latency is None else
             f"{units.amount('seconds', latency.median_s)} (quartiles {units.amount('seconds', latency.q1_s)}, "
             f"{units.amount('seconds', latency.q3_s)}; batch {latency.batch}, {latency.threads} thread(s), floats in "
             f"{latency.precision})"),
            ("peak memory", units.amount("bytes", m.memory_bytes)),
            (f"{m.score_name} ({m.split})", units.score(m.score)),
            ("file against PyTorch", units.NONE if m.agreement is None else
             f"{m.agreement.max_rel:.1e}, {'within' if m.agreement.ok else 'ABOVE'} {m.agreement.tolerance:.0e}"),
            *(("not counted", name) for name in m.uncounted)):
        if text != units.NONE:
            row(table, name, text)
    return table


def layers(rows: Sequence[LayerFigures]) -> Table:
    """Layer by layer; what is not said of a weight's type is float32."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in ("module", "operator", "weight", "output"):
        table.add_column(head, overflow="fold")  # nothing is cut off where the terminal is narrow
    scales = [units.unit("count", [getattr(r, key) for r in rows]) for key in ("params", "macs")]
    for head, (_, name) in zip(("params", "MACs"), scales, strict=True):
        table.add_column(f"{head} ({name})" if name else head, justify="right", no_wrap=True)
    for r in rows:
        kind = "" if r.dtype in ("float32", None) else f" {r.dtype}"
        weight = "" if r.shape is None else f"{'×'.join(map(str, r.shape))}{kind}"
        operator = r.operator.removeprefix("aten.").partition(".")[0]
        row(table, r.path or "(top)", operator, weight, "×".join(map(str, r.output or ())),
            units.number(r.params, scales[0][0]), units.number(r.macs, scales[1][0]))
    return table
