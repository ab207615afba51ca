"""``render``: one self-contained HTML page from the dict of ``result.json``. No script, nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template
from typing import Any

from featherweight.report import charts, tables, units
from featherweight.report.modules import modules
from featherweight.report.roads import roads
from featherweight.report.taught import brought

Row = Mapping[str, Any]

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$headline · featherweight</title><style>$style</style></head>
<body><main>
<header><h1>$headline</h1>$about$verdict</header>
$flags$tiles$final$charts$trail$roads$steps$layers$curves$losses$taught$skipped$notes$recipe$footer
</main></body></html>
""")
SPECTRUM, SILENCED = "spectrum", "share of the group's channels that is silenced"
#: kind of curve -> labels below and beside a chart
LABELS = {"loss": (SILENCED, "rise of the loss"), "output": (SILENCED, "relative change of the outputs"),
          SPECTRUM: ("share of the full rank", "singular value, part of the largest")}
#: title and hint of the charts of sensitivity, and of those of spectra
CURVES = (("Sensitivity", "One line a group of channels, all others whole; the steepest are the most sensitive."),
          ("Singular values", "One line a layer that was split; what falls early is of low rank."))

#: what the markers of the trade-offs mean
LEGEND = '<p class="legend quiet">' + "".join(f'<span><i class="key {kind}"></i>{said}</span>' for kind, said in (
    ("first", "original"), ("", "after a step"), ("last", "result"), ("low", "far below the others"))) + "</p>"


def render(result: Row, beside: Sequence[Row] = ()) -> str:
    """The report of one compression job, as the text of one HTML file (under 1 MB, also for large networks).

    result: what ``result.json`` holds: trail, plans, layers, recipe, machine, versions, notes, flags, final. Anything
    that is missing or None is shown as not measured or left out; all text is escaped. beside: results of the same
    recipe without a teacher: the page says what distillation brought.

    Example:
        >>> page = fw.report.render(result.to_dict())             # of what compress gave
        >>> page.lower().startswith("<!doctype html>")
        True
    """
    measured: list[Row] = list(result.get("trail") or [])
    first, last = _ends(measured, result)
    return PAGE.substitute(
        style=resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"),
        headline=escape(_titled(result, _headline(first, last))), about=_about(result, last),
        verdict=_verdict(first, last, result), flags=_flags(result),
        tiles=_tiles(first, last) if measured else "", final=_final(result.get("final")),
        charts=_charts(measured), curves=_curves(result.get("plans") or []),
        losses=_losses(result.get("losses") or {}),
        roads=_section("What the search tried", roads(result.get("search") or {})),
        taught=_section("What distillation brought", brought(result, beside)),
        steps=_steps(measured, result),
        trail=_trail(measured, result), layers=_layers(result),
        skipped=_section("What was not compressed, and why", tables.skipped(result.get("plans") or [])),
        notes=_notes(result), recipe=_recipe(result), footer=_footer(result, last))


def _ends(measured: Sequence[Row], result: Row) -> tuple[Row, Row]:
    """The two ends of the trail; latencies as timed in the same rounds, of the final measurement or else the last."""
    first, last = (measured[0], measured[-1]) if measured else ({}, {})
    for timed in ((result.get("final") or {}).get("after") or {}, last):
        original = (timed.get("beside") or {}).get("original")
        if original and timed.get("latency"):
            return {**first, "latency": original}, {**last, "latency": timed["latency"]}
    return first, last


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _headline(first: Row, last: Row) -> str:
    size = units.ratio(first.get("file_bytes"), last.get("file_bytes"))
    speed = tables.speed(first, last)
    known = [t for t in (size, speed) if t and t not in ("unchanged", units.SAME)]
    return ", ".join(known) if known else "nothing became smaller or faster"


def _titled(result: Row, headline: str) -> str:
    name = str(result.get("model") or "")
    return f"{name}: {headline}" if name else headline


def _about(result: Row, last: Row) -> str:
    """The score, the runtime and the day, under the title."""
    score = f"{last.get('score_name')} {units.score(last['score'])}" if last.get("score") is not None else ""
    ended = (result.get("seconds") or {}).get("ended")
    when = datetime.fromtimestamp(ended, UTC) if ended else None
    day = f"{when.day} {when:%B %Y}" if when else ""
    said = [score, str(result.get("target") or ""), day]
    known = " · ".join(escape(s) for s in said if s)
    return f"<p class=quiet>{known}</p>" if known else ""


def _verdict(first: Row, last: Row, result: Row) -> str:
    parts = []
    if first.get("file_bytes") and last.get("file_bytes"):
        parts.append(f"The deployed file went from {units.amount('bytes', first['file_bytes'])} to "
                     f"<b>{units.amount('bytes', last['file_bytes'])}</b>")
    if tables.latency_s(first) and tables.latency_s(last):
        parts.append(f"one sample takes <b>{units.amount('seconds', tables.latency_s(last))}</b> instead of "
                     f"{units.amount('seconds', tables.latency_s(first))}")
    if first.get("score") is not None and last.get("score") is not None:
        split = f" on the {escape(str(last['split']))} split" if last.get("split") else ""
        parts.append(f"{escape(str(last.get('score_name')))} is <b>{units.score(last['score'])}</b> "
                     f"({units.difference(first['score'], last['score'])}){split}")
    else:
        parts.append("no score was measured")
    target = f" Runtime: {escape(str(result['target']))}." if result.get("target") else ""
    text = "; ".join(parts)
    return f'<p class="verdict">{text[:1].upper()}{text[1:]}.{target}</p>'


def _flags(result: Row) -> str:
    flags = list(result.get("flags") or [])
    if not flags:
        return ""
    items = "".join(f"<li>{escape(str(f))}</li>" for f in flags)
    return f'<div class="flags" role="alert"><b>Look at this first</b><ul>{items}</ul></div>'


def _tiles(first: Row, last: Row) -> str:
    """Before and after, one tile a measure; measures that are missing on either side are left out."""
    tiles = []
    for title, kind, before, after, change in tables.changes(first, last):
        if after is not None:
            was = units.amount(kind, before) if before is not None else ""
            grew = before is not None and after > before * 1.005
            tiles.append(_tile(title, units.amount(kind, after), was, change, grew))
    if last.get("score") is not None:
        before = first.get("score")
        tiles.append(_tile(f"{last.get('score_name')}, {last.get('split')}", units.score(last["score"]),
                           units.score(before) if before is not None else "",
                           f"{units.difference(before, last['score'])} points", False))
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _tile(title: str, after: str, before: str, change: str, bad: bool) -> str:
    said = f'<b class="{"bad" if bad else "good"}">{escape(change)}</b>' if "×" in change else escape(change)
    was = f"was {escape(before)}" if before else ""
    return (f'<div class="tile"><dt>{escape(title)}</dt><dd>{escape(after)}</dd>'
            f"<dd>{'<br>'.join(t for t in (was, said) if t)}</dd></div>")


def _final(final: Row | None) -> str:
    """The test split, read once, at the end."""
    if not final or not final.get("after"):
        return ""
    before, after = final.get("before") or {}, final["after"]
    if after.get("score") is None:
        return ""
    name = escape(str(after.get("score_name")))
    was = f" (before: {units.score(before['score'])}, {units.difference(before['score'], after['score'])} points)" \
        if before.get("score") is not None else ""
    return (f"<p>On the test split, which no choice was made from, the deployed file's {name} is "
            f"<b>{units.score(after['score'])}</b>{was}.</p>")


def _charts(measured: Sequence[Row]) -> str:
    """Trade-offs against the score; plain bars where there is no score."""
    if not measured:
        return ""
    names = [tables.step_name(m, i) for i, m in enumerate(measured)]
    sizes = [m.get("file_bytes") for m in measured]
    times = [tables.latency_s(m) for m in measured]
    figures, heading = [], "Size and speed"
    for title, kind, values in (("File size", "bytes", sizes), ("Latency", "seconds", times)):
        if all(v is None for v in values):
            continue
        scale, unit = units.unit(kind, values)
        points = [charts.Marker(v / scale, float(m["score"]), i, names[i])
                  for i, (m, v) in enumerate(zip(measured, values, strict=True))
                  if v is not None and m.get("score") is not None]
        axis = f"{title.lower()} ({unit})"
        if len(points) > 1:
            score_name = str(measured[points[-1].number].get("score_name"))
            title, heading = f"{title} against {score_name}", "Trade-offs"
            drawing = charts.scatter(points, axis, score_name, title)
        else:
            title = f"{title} after every step"
            drawing = charts.bars(names, [None if v is None else v / scale for v in values], axis, title)
        figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>")
    return _section(heading, f'<div class="charts">{"".join(figures)}</div>{LEGEND}' if figures else "")


def _trail(measured: Sequence[Row], result: Row) -> str:
    if not measured:
        return _section("Every step, measured", "<p>Nothing was measured.</p>")
    plans = "".join(
        f"<li><b>{escape(str(p.get('step')))} {escape(str(p.get('kind')))}</b>: {escape(str(p.get('summary') or ''))}"
        f"{_seconds(p.get('seconds'))}</li>" for p in result.get("plans") or [])
    uncounted = list(dict.fromkeys(u for m in measured for u in m.get("uncounted") or ()))
    caution = (f"<p class=quiet>MACs are a lower bound; not counted: {escape(', '.join(uncounted[:20]))}"
               f"{' …' if len(uncounted) > 20 else ''}.</p>" if uncounted else "")
    hint = ("<p class=quiet>Small figures: ratio to the original (score: difference), and for latency the quartiles. "
            "Zeros in a dense file save no time by themselves.</p>")
    return _section("Every step, measured", tables.trail(measured) + hint + caution
                    + (f'<ul class="notes">{plans}</ul>' if plans else ""))


def _steps(measured: Sequence[Row], result: Row) -> str:
    took = (result.get("seconds") or {}).get("took") or []
    return _section("What each step took and gave", tables.steps(measured, result.get("plans") or [], took))


def _curves(plans: Sequence[Row]) -> str:
    """What the steps that measured sensitivity saw, and the spectra of layers that were split; one chart a step."""
    found = [(plan, [c for c in plan.get("curves") or [] if (c.get("kind") == SPECTRUM) == spectrum])
             for spectrum in (False, True) for plan in plans]
    charted = [(_curve_chart(plan, mine), bool(mine) and mine[0].get("kind") == SPECTRUM) for plan, mine in found]
    sections = []
    for spectrum, (title, hint) in enumerate(CURVES):
        figures = "".join(figure for figure, of in charted if of == bool(spectrum))
        sections.append(_section(title, f'<div class="charts">{figures}</div><p class=quiet>{hint}</p>' if figures
                                 else ""))
    return "".join(sections)


def _curve_chart(plan: Row, mine: Sequence[Row]) -> str:
    """The curves of one step, all of one kind."""
    lines = [charts.Line(str(c["group"]), tuple(zip(c["shares"], c["changes"], strict=True))) for c in mine]
    title, kind = f"{plan.get('step')} {plan.get('kind')}", next((str(c.get("kind")) for c in mine), "")
    below, beside = LABELS.get(kind, (SILENCED, kind))
    drawing = charts.curves(lines, below, beside, title, origin=kind != SPECTRUM)
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>" if drawing else ""


def _losses(losses: Row) -> str:
    """What the loss of each training was the sum of, one chart a training of several epochs."""
    figures = []
    for step, terms in losses.items():
        lines = [charts.Line(str(name), tuple((i, float(y)) for i, y in enumerate(values, 1)))
                 for name, values in terms.items() if len(values) > 1]
        title = f"step {step}: the loss and its terms"
        drawing = charts.curves(lines, "epoch", "mean over the epoch", title, origin=False)
        if drawing:
            figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>")
    return _section("Training", f'<div class="charts">{"".join(figures)}</div>' if figures else "")


def _seconds(value: float | None) -> str:
    return "" if value is None else f' <span class="quiet">({float(value):.1f} s)</span>'


def _layers(result: Row) -> str:
    layers, seconds = result.get("layers") or {}, result.get("seconds") or {}
    if not (layers.get("before") or layers.get("after")):
        return ""
    hint = "<p class=quiet>Bars: before (grey) and after. Struck through: removed.</p>"
    return _section("Module by module", modules(layers.get("before") or [], layers.get("after") or [],
                                                seconds.get("between") or ()) + hint)


def _notes(result: Row) -> str:
    notes = "".join(f"<li>{escape(str(n))}</li>" for n in result.get("notes") or [])
    return _section("Notes", f'<ul class="notes">{notes}</ul>' if notes else "")


def _recipe(result: Row) -> str:
    text = str(result.get("recipe_toml") or "").strip()
    if not text:
        return ""
    how = "<p>Save it as <code>recipe.toml</code> and run <code>featherweight compress recipe.toml</code>.</p>"
    return _section("The recipe, to reproduce", f"{how}<pre>{escape(text)}</pre>")


def _footer(result: Row, last: Row) -> str:
    lines = []
    latency = last.get("latency") or {}
    if latency:
        floats = f" (floats in {escape(str(latency['precision']))})" if latency.get("precision") else ""
        rounds, batch, threads, runtime = (
            escape(str(latency.get(key))) for key in ("rounds", "batch", "threads", "runtime"))
        lines.append(f"Latency: median of {rounds} rounds, batch {batch} on {threads} thread(s) of {runtime}{floats}, "
                     "loaded file, data in memory.")
    lines.append("MACs count products of weighted sums and matrix products, per sample; file sizes are those of files "
                 "that were written, loaded and run; 1 kB = 1000 bytes.")
    if result.get("machine"):
        lines.append(f"Machine: {tables.pairs(result['machine'])}.")
    versions = {"featherweight": result.get("featherweight"), **(result.get("versions") or {}),
                **(latency.get("versions") or {})}
    lines.append(f"Versions: {tables.pairs({k: v for k, v in versions.items() if v})}.")
    return f"<footer>{''.join(f'<p>{line}</p>' for line in lines)}</footer>"
