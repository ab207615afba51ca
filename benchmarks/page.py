"""What the sections of docs/results.md are written with."""

from __future__ import annotations

from typing import Any

from rows import Row

#: arm -> its newest row
Rows = dict[str, Row]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are figures."""
    return ["", "| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|",
            *("| " + " | ".join(r) + " |" for r in rows), ""]


def ms(latency: dict[str, Any] | None) -> str:
    if not latency:
        return ""
    return f"{latency['median_s'] * 1e3:.2f} ({latency['q1_s'] * 1e3:.2f} to {latency['q3_s'] * 1e3:.2f})"


def unique(rows: Rows, of: str) -> str:
    """What the rows say of themselves under ``of`` ("machine", "versions"), each way once."""
    return "; ".join(dict.fromkeys(", ".join(f"{k} {v}" for k, v in row[of].items()) for row in rows.values()))
