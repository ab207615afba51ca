"""report/: the page holds what was measured, holds nothing else, and survives whatever is missing."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.report import charts, compared, render, units
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


# ---- what distillation brought

def job(scores: list[float], *steps: dict[str, Any]) -> dict[str, Any]:
    """A result whose recipe has these steps, with a score after each."""
    names = ["original", *(str(step["kind"]) for step in steps)]
    trail = [measurement(name, 500, 4000, 2e-3, score) for name, score in zip(names, scores, strict=True)]
    tested = measurement("end", 500, 4000, 2e-3, scores[-1] - 1, split="test")
    return result(recipe=list(steps), trail=trail, final={"before": trail[0], "after": tested})


CUT, TRAIN = {"kind": "prune.Channels", "macs": 0.5}, {"kind": "recover.Train", "epochs": 2}
LOGITS, MASKS = {"kind": "distill.Logits", "temperature": 4.0}, {"kind": "prune.Weights", "sparsity": 0.5}


@pytest.mark.parametrize("teacher", [{"distill": LOGITS}, {"beside": [MASKS, LOGITS]}])
def test_the_same_job_without_a_teacher_says_what_that_brought(teacher):
    plain = {"beside": [MASKS]} if "beside" in teacher else {}
    ours = job([90.0, 40.0, 89.5, 89.0], CUT, TRAIN | teacher, {"kind": "quantize.Quantize"})
    theirs = job([90.0, 40.0, 88.25, 88.5], CUT, TRAIN | plain, {"kind": "quantize.Quantize"})
    text = re.sub(r"<[^>]+>", " ", render(ours, [theirs]).split("What distillation brought")[1].split("</section>")[0])
    assert " ".join(text.split()) == (
        "step split with a teacher without difference recover.Train validation 89.50 88.25 +1.25 "
        "quantize.Quantize validation 89.00 88.50 +0.50 at the end test 88.00 87.50 +0.50")


def test_jobs_that_differ_otherwise_are_not_compared():
    ours = job([90.0, 89.5], TRAIN | {"distill": LOGITS})
    for other in (ours, job([90.0, 88.0], TRAIN | {"epochs": 3}), job([90.0, 88.0, 80.0], TRAIN, CUT),
                  job([90.0, 88.0], TRAIN | {"beside": [MASKS]})):
        assert "What distillation brought" not in render(ours, [other])
    assert "What distillation brought" not in render(job([90.0, 88.0], TRAIN), [ours])


def test_spectra_of_split_layers_are_drawn_by_themselves():
    torch.manual_seed(0)
    wide = fw.capture(nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50)), torch.zeros(2, 40))
    plan = fw.factorize.LowRank(energy=0.5).plan(wide, fw.Task())
    assert [one.group for one in plan.spectra] == [split.weight for split in plan.splits] == ["0.weight", "2.weight"]
    for one in plan.spectra:
        values = np.linalg.svd(wide.tensor(one.group).detach().numpy(), compute_uv=False)
        wanted = [values[round(share * len(values)) - 1] / values[0] for share in one.shares]
        np.testing.assert_allclose(one.changes, wanted, rtol=1e-4)
    decided = {"step": 1, "kind": "factorize.LowRank", "curves": [dataclasses.asdict(c) for c in plan.spectra]}
    sensed = {"step": 2, "kind": "prune.Channels", "curves": [
        {"group": "g", "shares": [0.1, 0.5], "changes": [0.0, 0.2], "kind": "output", "channels": 8}]}
    page = render(result(plans=[decided, sensed]))
    own = {title: page.split(f"<h2>{title}</h2>")[1].split("</section>")[0] for title in ("Singular values",
                                                                                          "Sensitivity")}
    assert "0.weight" in own["Singular values"]
    assert "share of the full rank" in own["Singular values"]
    points = [line.split() for line in re.findall(r'<polyline class="curve" points="([^"]*)"', own["Singular values"])]
    assert {len(line) for line in points} == {len(one.shares) for one in plan.spectra}, "they begin at no origin"
    assert "share of the group" in own["Sensitivity"]
    assert "0.weight" not in own["Sensitivity"]
    assert "Singular values" not in render(result(plans=[sensed]))


# ---- what a person sees

def boxes(svg: str) -> list[tuple[float, float, float, float, str]]:
    """(left, top, right, bottom, text) of every text of a chart, from its own coordinates, at 6.4 a character."""
    found = []
    for attributes, text in re.findall(r"<text([^>]*)>([^<]*)</text>", svg):
        given = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
        x, y, wide = float(given["x"]), float(given["y"]), 6.4 * len(text)
        left = x - {"middle": wide / 2, "end": wide}.get(given.get("text-anchor", "start"), 0.0)
        box = (left, y - 10, left + wide, y + 2)
        if "transform" in given:  # turned upwards about (x, y)
            box = (x - 10, y - wide / 2, x + 2, y + wide / 2)
        found.append((*box, text))
    return found


def overlapping(svg: str) -> list[tuple[str, str]]:
    return [(a[4], b[4]) for a, b in itertools.combinations(boxes(svg), 2)
            if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]


@pytest.mark.parametrize("seed", range(40))
def test_no_label_lies_on_a_label(seed: int) -> None:
    import random

    r = random.Random(seed)
    names = ["original", "prune.Channels", "recover.Train", "quantize.Quantize", "factorize.LowRank", "share.Codebook"]
    close = r.random() < 0.5
    points = [Marker(r.uniform(90, 100) if close else r.uniform(1, 1000), r.choice([10.0, 91.0, 92.0]) + r.random() / 5,
                     i, names[i % 6]) for i in range(r.randrange(2, 12))]
    chart = scatter(points, "file size (kB)", "top-1 %", "t")
    assert overlapping(chart) == []
    assert chart.count("<title>") == len(points), "what has no label says its name where the pointer rests"
    lines = [charts.Line(f"layer{i}.conv", tuple((x / 5, r.random() * (i + 1)) for x in range(1, 6))) for i in range(8)]
    assert overlapping(charts.curves(lines, "share", "rise of the loss", "t")) == []
    assert overlapping(bars(names, [r.random() for _ in names], "kB", "t")) == []


def test_the_page_says_model_score_runtime_and_day() -> None:
    page = Page(render(result(model="torchvision:resnet18", seconds={"ended": 1795867200})))
    text = page.text.replace("\u00a0", " ")
    assert "torchvision:resnet18: 8.00 × smaller, 4.00 × faster" in text
    assert "top1 91.00 · onnxruntime · 28 November 2026" in text
    for said in ("original", "after a step", "result", "far below the others"):
        assert said in text


def test_what_each_step_took_and_gave_is_beside_the_step_before() -> None:
    rows = Page(render(result())).rows
    head = next(i for i, r in enumerate(rows) if r[:2] == ["step", "took"])
    assert rows[head] == ["step", "took", "top1", "file", "MACs", "params", "latency"]
    first, second, third = ([cell.replace("\u00a0", " ") for cell in r] for r in rows[head + 1:head + 4])
    assert first[1:] == ["500 ms", "−52.00", "2.00 × smaller", "2.00 × fewer", "2.00 × fewer", "2.00 × faster"]
    assert second[1:3] == ["–", "+51.50"]
    assert third[3:] == ["4.00 × smaller", "unchanged", "unchanged", "2.00 × faster"]


def test_layers_have_their_latency_and_folded_norms_are_counted() -> None:
    before = [{**layer("stem", [8, 3, 3, 3], 216), "seconds": 4e-6}, {**layer("old", [4], 4), "seconds": 1e-6},
              *({**layer(f"bn{i}", [8], 16), "operator": "aten.batch_norm.default"} for i in range(3))]
    after = [{**layer("stem", [4, 3, 3, 3], 108, "int8"), "seconds": 1e-6}]
    page = Page(render(result(layers={"before": before, "after": after},
                              seconds={"between": [2e-6, 5e-6]})))
    head = next(r for r in page.rows if r[0] == "module")
    row = next(r for r in page.rows if r[0] == "stem")
    assert row[head.index("latency (µs)")].endswith("4.00 → 1.00")
    assert "3 batch norms were folded" in page.text
    assert not any(r[0].startswith("bn") for r in page.rows)
    assert "2.00 → 5.00 µs" in page.text
    wide = [a["style"] for t, a in page.tags if t == "i" and a.get("style")]
    assert wide[:2] == ["width:100%", "width:25%"]
    assert "latency (µs)" not in Page(render(result())).text.partition("Module by module")[2]


def test_jobs_are_compared_on_one_page() -> None:
    other = result(model="<b>mine</b>", flags=["<i>slow</i>"], machine={"processor": "another"})
    page = Page(compared({"a": result(), "<b>": other}))
    text = page.text.replace("\u00a0", " ")
    assert "2 jobs: a, <b>" in text
    assert [r[0].split()[0] for r in page.rows[1:3]] == ["1", "2"]
    assert "8.00 × smaller" in page.rows[1][2].replace("\u00a0", " ")
    assert "flag: <i>slow</i>" in text
    assert "different processors: A <fast> one, another" in text
    assert page.count("svg") == 2
    for svg in re.findall(r"<svg.*?</svg>", compared({"a": result(), "b": other})):
        assert overlapping(svg) == []
    empty = Page(compared({"a": {}, "b": missing(result(), {"score"})}))
    assert "None" not in empty.text
