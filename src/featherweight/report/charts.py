"""Charts as inline SVG, drawn from numbers; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

#: what a chart is drawn for: the width that a page of 400 px leaves it, so that its text is read there at its own size
WIDTH, HEIGHT = 372, 290
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 16, 46
#: width of a character of the labels, for keeping them apart
CHARACTER = 6.4
#: the cost of a label's place from which on it lies on something
COVERED = 20.0


@dataclass(frozen=True)
class Marker:
    """One measured network: where it lies, its number in the trail, its name."""

    x: float
    y: float
    number: int
    name: str


@dataclass(frozen=True)
class Line:
    """One curve: (x, y) of its points, x rising, and its name."""

    name: str
    points: tuple[tuple[float, float], ...]


Box = tuple[float, float, float, float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values from at or below ``low`` to at or above ``high``."""
    span = max(high - low, 1e-6 * max(abs(high), 1e-6))
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def scatter(points: Sequence[Marker], x_label: str, y_label: str, title: str, joined: bool = True) -> str:
    """Points joined in the order of the trail (or not: then all are alike), numbered and named. The x axis starts at
    zero.

    A point far below the first and the last (a step before its retraining) lies on the floor as a triangle, with its
    value in its label, so that the rest can be told apart.
    """
    if not points:
        return ""
    xs = ticks(0.0, max(p.x for p in points) * 1.02)
    low, high = min(points[0].y, points[-1].y), max(p.y for p in points)
    floor = low - 2 * max(high - low, 1.0)
    low = min(p.y for p in points if p.y >= floor)
    pad = max((high - low) * 0.12, 0.25 if high - low < 1 else 0.0)
    ys = ticks(low - pad, high + pad)

    def place(p: Marker) -> tuple[float, float]:
        return (LEFT + (p.x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - max(p.y - ys[0], 0.0) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM))

    places = [place(p) for p in points]
    parts = [_frame(xs, ys, x_label, y_label)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    if joined:
        parts.append(f'<polyline class="trail" points="{path}"/>')
    for p, (x, y) in zip(points, places, strict=True):
        kind = "dot last" if not joined else "dot first" if p is points[0] else "dot last" if p is points[-1] else "dot"
        tip = f"{p.number} {p.name}: {_tick(p.x)} {x_label}, {p.y:.2f} {y_label}"
        shape = f'circle cx="{x:.1f}" cy="{y:.1f}" r="5"' if p.y >= floor else \
            f'path d="M{x - 6:.1f},{y - 9:.1f} h12 l-6,9 z"'
        parts.append(f'<{shape} class="{kind}"><title>{escape(tip)}</title></{shape.split()[0]}>')
    named = [p if p.y >= floor else replace(p, name=f"{p.name}: {p.y:.1f}") for p in points]
    parts.extend(_labels(named, [(x, y if p.y >= floor else y - 5) for p, (x, y) in zip(points, places, strict=True)]))
    return _svg(parts, HEIGHT, title)


def bars(names: Sequence[str], values: Sequence[float | None], label: str, title: str) -> str:
    """One horizontal bar per step, its value written at its end."""
    top = max((v for v in values if v is not None), default=0.0) or 1.0
    height = 26 * len(names) + 30
    parts = [f'<text class="axis" x="0" y="14">{escape(label)}</text>']
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y = 26 * i + 26
        length = 0.0 if value is None else value / top * (WIDTH - 240)
        kind = "bar last" if i == len(names) - 1 else "bar"
        parts.append(f'<text class="name" x="0" y="{y + 14}">{escape(_short(f"{i} {name}", 24))}</text>')
        parts.append(f'<rect class="{kind}" x="165" y="{y + 2}" width="{length:.1f}" height="16" rx="2"/>')
        text = "not measured" if value is None else _tick(value)
        parts.append(f'<text class="value" x="{171 + length:.1f}" y="{y + 14}">{escape(text)}</text>')
    return _svg(parts, height, title)


def curves(lines: Sequence[Line], x_label: str, y_label: str, title: str, origin: bool = True) -> str:
    """Lines, from the origin if they all begin there.

    Each is named where the pointer rests; the highest few are named at their ends too.
    """
    if not any(line.points for line in lines):
        return ""
    heights = [y for line in lines for _, y in line.points]
    xs, ys = ticks(0.0, max(x for line in lines for x, _ in line.points)), ticks(min(0.0, *heights), max(heights))

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM))

    parts = [_frame(xs, ys, x_label, y_label)]
    taken: list[float] = []
    for line in sorted(lines, key=lambda line: -line.points[-1][1] if line.points else 0.0):
        places = [place(x, y) for x, y in (*([(0.0, 0.0)] if origin else []), *line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="curve" points="{path}"><title>{escape(line.name)}</title></polyline>')
        x, y = places[-1]
        if len(taken) < 4 and all(abs(y - other) > 13 for other in taken):
            taken.append(y)
            parts.append(f'<text class="name" x="{x - 4:.1f}" y="{y - 4:.1f}" text-anchor="end">'
                         f"{escape(_short(line.name, 26))}</text>")
    return _svg(parts, HEIGHT, title)


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
            f'{"".join(parts)}</svg>')


def _frame(xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str) -> str:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for x in xs:
        at = LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (right - LEFT)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor}"/>'
                     f'<text class="tick" x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{_tick(x)}</text>')
    for y in ys:
        at = floor - (y - ys[0]) / (ys[-1] - ys[0]) * (floor - TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_tick(y)}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
                 f'{escape(x_label)}</text>')
    middle = (TOP + floor) / 2
    parts.append(f'<text class="axis" x="12" y="{middle:.0f}" text-anchor="middle" '
                 f'transform="rotate(-90 12 {middle:.0f})">{escape(y_label)}</text>')
    return "".join(parts)


def _labels(points: Sequence[Marker], places: Sequence[tuple[float, float]]) -> list[str]:
    """A label at every point: its number and name where there is room, else its number, kept off dots and labels."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    labels = []
    ends = sorted(range(len(points)), key=lambda i: i not in (0, len(points) - 1))  # both ends get their place first
    for index in ends:
        p, (x, y) = points[index], places[index]
        others = [box for i, box in enumerate(taken) if i != index]
        best: tuple[float, str, str, float, float, Box] | None = None
        for weight, text in ((0.0, _short(f"{p.number} {p.name}", 26)), (5.0, str(p.number))):
            width = CHARACTER * len(text)
            for rank, (dx, dy, anchor) in enumerate((
                    (9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 19, "middle"),
                    (8, -11, "start"), (8, 20, "start"), (-8, -11, "end"), (-8, 20, "end"))):
                left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
                box = (left, y + dy - 11, left + width, y + dy + 3)
                outside = left < LEFT or box[2] > WIDTH or box[1] < 0 or box[3] > HEIGHT - BOTTOM + 5
                cost = weight + 0.1 * rank + 100 * outside + 20 * sum(_overlap(box, b) for b in others)
                if best is None or cost < best[0]:
                    best = (cost, text, anchor, x + dx, y + dy, box)
        assert best is not None
        cost, text, anchor, tx, ty, box = best
        if cost >= COVERED:
            continue  # no room: the marker says its name where the pointer rests
        taken.append(box)
        labels.append(f'<text class="name" x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{escape(text)}</text>')
    return labels


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")
