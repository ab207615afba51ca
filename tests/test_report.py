"""report/: the page holds what was measured, holds nothing else, and survives whatever is missing."""

from __future__ import annotations

import copy
import itertools
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from featherweight.report import render, units
from featherweight.report.charts import Marker, bars, scatter, ticks

VOID = {"meta", "br", "circle", "line", "rect", "polyline", "path"}


class Page(HTMLParser):
    """Checks that tags close in order; keeps text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
            if self.rows and ("td" in self.open or "th" in self.open):
                self.rows[-1][-1] += data

    def count(self, tag):
        return sum(t == tag for t, _ in self.tags)


def measurement(step: str, params: int, size: int, seconds: float, score: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "params": params, "nonzeros": params // 2, "macs": params * 100, "uncounted": [],
            "network_bytes": size + 10, "file_bytes": size, "archive_bytes": size // 2, "target": "onnxruntime",
            "latency": {"median_s": seconds, "q1_s": seconds * 0.9, "q3_s": seconds * 1.1, "rounds": 99, "threads": 1,
                        "batch": 1, "runtime": "onnxruntime", "versions": {"onnxruntime": "1.0"}},
            "memory_bytes": None, "score": score, "score_name": "top1", "split": "validation",
            "agreement": {"max_abs": 1e-6, "max_rel": 2e-6, "ok": True, "tolerance": 1e-3}, "beside": {}, **more}


def layer(path: str, shape: list[int] | None, params: int, dtype: str | None = "float32") -> dict[str, Any]:
    return {"path": path, "operator": "aten.conv2d.default", "weight": f"{path}.weight", "shape": shape,
            "params": params, "nonzeros": params, "macs": 10 * params, "bytes": 4 * params, "dtype": dtype,
            "output": [1, 4, 8, 8], "node": path}


def result(**changes: Any) -> dict[str, Any]:
    base = {
        "format": 1, "featherweight": "0.1.0", "machine": {"processor": "A <fast> one", "cores": 2},
        "versions": {"torch": "2.13.0"}, "target": "onnxruntime", "recipe": [],
        "recipe_toml": '[[steps]]\nkind = "prune.Channels"\nmacs = 0.5\n',
        "trail": [measurement("original", 1000, 8000, 4e-3, 92.0), measurement("prune.Channels", 500, 4000, 2e-3, 40.0),
                  measurement("recover.Train", 500, 4000, 2e-3, 91.5),
                  measurement("quantize.Quantize", 500, 1000, 1e-3, 91.0)],
        "final": {"before": measurement("original", 1000, 8000, 4e-3, 90.25, split="test"),
                  "after": measurement("compressed", 500, 1000, 1e-3, 89.5, split="test")},
        "plans": [{"step": 1, "kind": "prune.Channels", "summary": "cut 8 channels", "seconds": 0.5, "grows": [],
                   "skipped": [{"path": "head", "reason": "network output"},
                               {"path": "a.b", "reason": "network output"},
                               {"path": "c", "reason": "one channel only"}]}],
        "layers": {"before": [layer("stem", [8, 3, 3, 3], 216), layer("bn", [8], 16), layer("old", [4], 4)],
                   "after": [layer("stem", [4, 3, 3, 3], 108, "int8"), layer("bn", [8], 16)]},
        "notes": ["a note"], "flags": []}
    return copy.deepcopy(base) | changes


def test_the_page_is_whole_and_fetches_nothing():
    html = render(result())
    page = Page(html)
    assert len(html.encode()) < 1_000_000
    assert not page.count("script")
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object")
        assert not {"src", "href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert page.count("svg") == 2


def test_the_verdict_says_the_ratios_and_the_test_split():
    page = Page(render(result()))
    text = page.text.replace("\u00a0", " ")
    assert "8.00 × smaller, 4.00 × faster" in text
    assert "from 8.00 kB to 1.00 kB" in text
    assert "1.00 ms instead of 4.00 ms" in text
    assert "91.00 (−1.00) on the validation split" in text
    assert "top1 is 89.50 (before: 90.25, −0.75 points)" in text


def test_a_page_names_its_model_score_and_day():
    named = result(date="2026-01-31 12:00", recipe_toml='[model]\nfactory = "nets:<small>"\n' + result()["recipe_toml"])
    html = render(named)
    title = re.search("<title>(.*)</title>", html)
    assert title is not None
    assert title[1].replace("\u00a0", " ") == \
        "nets:&lt;small&gt; · 8.00 × smaller, 4.00 × faster · top1 91.00 · 2026-01-31"
    assert "<header><p class=quiet>nets:&lt;small&gt;, 2026-01-31 12:00</p><h1>" in html
    for text in ("no [toml", "model = 3", "[model]\nfactory = 3", "a = " + 10_000 * "["):
        assert "<title>" in render(result(recipe_toml=text))
    assert "<title>featherweight · nothing became smaller or faster</title>" in render({})


def test_the_ends_are_compared_in_the_same_rounds_where_they_were_timed_so():
    timed = result()
    timed["final"]["after"]["beside"] = {"original": {**timed["trail"][0]["latency"], "median_s": 3e-3}}
    assert "3.00 × faster" in Page(render(timed)).text.replace("\u00a0", " ")


def test_what_got_worse_is_called_so():
    worse = result()
    worse["trail"][-1] = measurement("quantize.Quantize", 500, 16000, 8e-3, 91.0)
    text = Page(render(worse)).text.replace("\u00a0", " ")
    assert "2.00 × larger, 2.00 × slower" in text
    assert 'class="bad"' in render(worse)


def test_the_trail_has_one_row_a_step_with_units_in_the_head():
    rows = Page(render(result())).rows
    trail = rows[:5]
    assert trail[0] == ["step", "top1", "file (kB)", "latency (ms)", "MACs (k)", "params", "zeros", "archive (kB)",
                        "file vs PyTorch"]
    assert [r[0].split()[-1] for r in trail[1:]] == ["original", "prune.Channels", "recover.Train", "quantize.Quantize"]
    assert trail[4][1:4] == ["91.00−1.00", "1.008.00 ×", "1.004.00 × · 0.900…1.10"]
    assert trail[4][6] == "50.0 %"


def test_layers_are_joined_by_module():
    page = Page(render(result()))
    rows = {r[0]: r for r in page.rows[5:]}
    assert rows["stem"][2] == "8 × 3 × 3 × 3 float32 → 4 × 3 × 3 × 3 int8"
    assert rows["stem"][3].endswith("216 → 108")
    assert "→" not in rows["bn"][2]
    assert 'class="gone"' in render(result())


def test_what_was_left_alone_is_grouped_by_reason():
    text = Page(render(result())).text
    assert re.search(r"network output prune.Channels, 2head, a\.b", text)
    assert re.search(r"one channel only prune.Channels, 1c", text)
    assert "No step left anything alone" in Page(render(result(plans=[]))).text


def test_flags_stand_ahead_of_the_figures():
    html = render(result(flags=["step 1 (x) made it slower"]))
    assert html.index("made it slower") < html.index('class="tiles"')
    assert 'role="alert"' not in render(result())


@pytest.mark.parametrize("field", ["flags", "notes", "machine", "recipe_toml", "plans", "layers", "target", "trail"])
def test_everything_is_escaped(field):
    nasty = '<script>alert("x")</script><!-- & -->'
    values = {
        "flags": [nasty], "notes": [nasty], "machine": {nasty: nasty}, "recipe_toml": nasty, "target": nasty,
        "plans": [{"step": 1, "kind": nasty, "summary": nasty, "seconds": 1,
                   "skipped": [{"path": nasty, "reason": nasty}]}],
        "layers": {"before": [layer(nasty, [3], 3, nasty)], "after": []},
        "trail": [measurement(nasty, 10, 10, 1e-3, 9, score_name=nasty, uncounted=[nasty], split=nasty)] * 2}
    page = Page(render(result(**{field: values[field]})))
    assert not page.count("script")
    assert "alert" in page.text or field == "machine"


def missing(values: Any, keys: set[str]) -> Any:
    if isinstance(values, dict):
        return {k: None if k in keys else missing(v, keys) for k, v in values.items()}
    return [missing(v, keys) for v in values] if isinstance(values, list) else values


@pytest.mark.parametrize("keys", [
    {"score"}, {"latency"}, {"archive_bytes", "memory_bytes"}, {"agreement"}, {"score", "latency"}, {"final"},
    {"file_bytes"}, {"macs"}, {"shape", "dtype", "output"}, {"layers", "plans", "notes", "flags"},
    {"seconds", "summary"}, {"machine", "versions"}, {"nonzeros"}, {"trail"}])
def test_what_is_none_is_no_error(keys):
    page = Page(render(missing(result(), keys)))
    assert "None" not in page.text
    assert "nan" not in page.text


def test_an_empty_or_single_result_is_still_a_page():
    assert "Nothing was measured" in Page(render({})).text
    single = Page(render(result(trail=result()["trail"][:1])))
    assert "nothing became smaller or faster" in single.text
    without_score = missing(result(), {"score"})
    assert Page(render(without_score)).count("rect") == 8  # bars instead of a trade-off


def test_a_large_network_stays_under_a_megabyte():
    rows = [layer(f"encoder.layers.{i}.attention.projection", [768, 768, 1, 1], 10_000 + i) for i in range(3000)]
    plans = [{"step": i, "kind": "prune.Channels", "summary": "x" * 100, "seconds": 1.0,
              "skipped": [{"path": f"block.{j}.conv{i}", "reason": f"reason {i}"} for j in range(3000)]}
             for i in range(10)]
    html = render(result(layers={"before": rows, "after": rows}, plans=plans))
    assert len(html.encode()) < 1_000_000
    assert "and 2400 more modules" in html
    assert "and 2880 more" in html


def test_it_takes_what_json_gives_back():
    assert render(json.loads(json.dumps(result()))) == render(result())


# ---- charts and units

def test_scatter_puts_points_where_they_belong():
    points = [Marker(4.0, 90.0, 0, "a"), Marker(2.0, 89.0, 1, "b"), Marker(1.0, 89.5, 2, "c")]
    found = re.findall(r'circle cx="([\d.]+)" cy="([\d.]+)"', scatter(points, "x", "y", "t"))
    places = [(float(x), float(y)) for x, y in found]
    (ax, ay), (bx, by), (cx, cy) = places
    assert ax > bx > cx
    assert ay < cy < by  # higher scores are higher up
    assert (ax - bx) / (bx - cx) == pytest.approx(2, rel=0.01)
    assert cy - ay == pytest.approx(by - cy, rel=0.01)


def test_a_collapse_before_retraining_does_not_flatten_the_chart():
    chart = scatter([Marker(4, 92.0, 0, "a"), Marker(2, 10.0, 1, "b"), Marker(2, 91.0, 2, "c"),
                     Marker(1, 90.5, 3, "d")],
                    "x", "y", "t")
    heights = [float(y) for y in re.findall(r'circle cx="[\d.]+" cy="([\d.]+)"', chart)]
    assert len(heights) == 3
    assert max(heights) - min(heights) > 80
    assert "b: 10.0" in chart


def test_equal_scores_make_a_chart():
    assert "nan" not in scatter([Marker(2, 90.0, 0, "a"), Marker(1, 90.0, 1, "b")], "x", "y", "t")
    assert scatter([], "x", "y", "t") == ""
    assert "not measured" in bars(["a", "b"], [1.0, None], "x", "t")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (88.1, 91.9), (0, 1234), (-3, 5), (0.00012, 0.00031), (7, 7)])
def test_ticks_enclose_and_are_even(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    gaps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
    assert gaps == {1.0}
    assert 2 <= len(found) <= 9


@pytest.mark.parametrize(("kind", "value", "text"), [
    ("bytes", 165_400, "165 kB"), ("bytes", 1_102_000, "1.10 MB"), ("bytes", 12, "12 B"),
    ("seconds", 0.000195, "195 µs"),
    ("seconds", 0.0152, "15.2 ms"), ("count", 40_551_040, "40.6 M"), ("count", 7, "7"), ("count", 0, "0"),
    ("count", None, "–"), ("bytes", 999_999, "1.00 MB")])
def test_amounts(kind, value, text):
    assert units.amount(kind, value) == text


def test_ratios_say_their_direction():
    assert units.ratio(4, 2).split() == ["2.00", "×", "smaller"]
    assert units.ratio(2, 4).split() == ["2.00", "×", "larger"]
    assert units.ratio(100, 8, "faster", "slower").split() == ["12.5", "×", "faster"]
    assert units.ratio(100, 100.2) == "unchanged"
    assert units.ratio(None, 2) == units.ratio(2, 0) == ""
