"""Numbers as people read them: one unit for a column, three significant digits, ratios that say their direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

#: what stands where nothing was measured
NONE = "–"
#: what stands where two timings leave open which file is faster
SAME = "no difference measured"
SCALES: dict[str, Sequence[tuple[float, str]]] = {
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "seconds": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "count": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")),
}


def unit(kind: str, values: Iterable[float | None]) -> tuple[float, str]:
    """(what to divide by, its name): the largest unit in which the median of the values is at least one."""
    known = sorted(abs(v) for v in values if v is not None and math.isfinite(v) and v)
    middle = known[len(known) // 2] if known else 0.0
    for scale, name in SCALES[kind]:
        if middle >= 0.9995 * scale:  # 999.7 kB are written as 1.00 MB
            return scale, name
    return SCALES[kind][-1]


def number(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
    """``value / scale`` with at least ``digits`` significant digits, thousands parted by a thin space."""
    if value is None or not math.isfinite(value):
        return NONE
    scaled = value / scale
    if scaled == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(float(f"{scaled:.{digits}g}")))))
    text = f"{scaled:,.{min(places, 6)}f}".replace(",", "\u2009")
    return text.rstrip("0").rstrip(".") if "." in text and value == int(value) and scale == 1 else text


def amount(kind: str, value: float | None) -> str:
    """A number with its unit."""
    scale, name = unit(kind, [value])
    return f"{number(value, scale)} {name}".strip() if value is not None else NONE


def score(value: float | None) -> str:
    """A score with two decimals."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.2f}"


def difference(before: float | None, after: float | None) -> str:
    """How far a score moved, with its sign."""
    if before is None or after is None:
        return ""
    return f"{after - before:+.2f}".replace("-", "−")


def ratio(before: float | None, after: float | None, better: str = "smaller", worse: str = "larger") -> str:
    """"2.1 × smaller", "1.3 × larger", "unchanged"; empty where one of them is missing."""
    if before is None or after is None or before <= 0 or after <= 0:
        return ""
    factor = before / after
    if 0.995 < factor < 1.005:
        return "unchanged"
    text = f"{max(factor, 1 / factor):.3g}" if max(factor, 1 / factor) >= 10 else f"{max(factor, 1 / factor):.2f}"
    return f"{text}\u00a0×\u00a0{better if factor > 1 else worse}"  # no line break inside
