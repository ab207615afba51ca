"""The page in headless Chromium, where there is one: light, dark, 400 px, print; labels that lie on labels, text that
is too small or cut off. The measuring script stands in the copy that is looked at; the page itself holds none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest

from featherweight.report import compared, render
from test_report import CUT, LOGITS, TRAIN, layer, measurement, result

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
               None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")]
SMALLEST = 10.0  #: px of a text that is read
#: of the page in its frame: how far it is too wide, texts of charts that lie on each other, the smallest text
LOOK = """<script>
window.onload = () => {
  const frame = document.querySelector("iframe").contentDocument, root = frame.documentElement, on = [], cut = [];
  let least = 99;
  for (const svg of frame.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    const whole = svg.getBoundingClientRect();
    for (const [name, a] of texts) {
      const turned = a.height > a.width && name.length > 2;
      least = Math.min(least, (turned ? a.width : a.height) / 1.2);
      if (a.left < whole.left - 1 || a.right > whole.right + 1) cut.push(name);
      for (const [other, b] of texts)
        if (name < other && a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 2 && b.top < a.bottom - 2)
          on.push([name, other]);
    }
  }
  const ground = frame.defaultView.getComputedStyle(frame.body).backgroundColor;
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").textContent = JSON.stringify(
    {wide: root.scrollWidth - root.clientWidth, on: on, cut: cut, least: least, ground: ground});
};
</script>"""


def everything() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A result with every section that the page has, and one of the same job without a teacher."""
    names = ["original", "prune.Channels", "recover.Train", "factorize.LowRank", "quantize.Quantize", "share.Codebook"]
    trail = [measurement(name, 1000 - 150 * i, 8000 - 1300 * i, (4 - 0.55 * i) * 1e-3, score)
             for i, (name, score) in enumerate(zip(names, (92.0, 41.0, 91.5, 91.4, 91.2, 90.9), strict=True))]
    shares = [i / 8 for i in range(1, 8)]
    curve = [{"group": f"stage{i}.conv.weight", "shares": shares, "changes": [s ** 2 * (i + 1) for s in shares],
              "kind": "loss", "channels": 32} for i in range(6)]
    spectrum = [{"group": f"fc{i}.weight", "shares": shares, "changes": [(1 - s) ** (i + 1) for s in shares],
                 "kind": "spectrum", "channels": 0} for i in range(3)]
    plans = [{"step": 1, "kind": "prune.Channels", "summary": "cut 8 channels", "seconds": 0.5, "grows": [],
              "curves": curve, "skipped": [{"path": "head", "reason": "it is the network's output"}]},
             {"step": 3, "kind": "factorize.LowRank", "summary": "split 3 layers", "seconds": 0.2, "grows": [],
              "curves": spectrum, "skipped": []}]
    before = [{**layer(f"stage{i}.conv", [32, 16, 3, 3], 4608), "seconds": (9 - i) * 1e-6} for i in range(6)]
    after = [{**layer(f"stage{i}.conv", [16, 16, 3, 3], 2304, "int8"), "seconds": 2e-6} for i in range(6)]
    trial = {"what": "channels 0.5, int8", "drop": 0.4, "shares": {"latency": 0.3, "file_bytes": 0.2}}
    front = [{**trial, "drop": drop, "shares": {"latency": s}} for s, drop in ((0.2, 3.0), (0.3, 0.4), (0.6, 0.1))]
    search = {"chosen": trial, "alone": {"channels": {**trial, "what": "channels 0.5"}}, "trials": [trial] * 9,
              "missed": {"latency": "0.30 of the original's; asked for 0.25"}, "minimize": "latency", "front": front}
    losses = {"2": {"total": [2.0, 1.2, 0.9, 0.8], "task": [1.5, 0.9, 0.6, 0.5],
                    "distill.Logits": [0.5, 0.3, 0.3, 0.3]}}
    recipe = [CUT, TRAIN | {"distill": LOGITS}, {"kind": "factorize.LowRank"}, {"kind": "quantize.Quantize"},
              {"kind": "share.Codebook"}]
    held = result(model="torchvision:resnet18", trail=trail, plans=plans, layers={"before": before, "after": after},
                  recipe=recipe, search=search, losses=losses, flags=["step 3 (factorize.LowRank) made it slower"],
                  seconds={"took": [0.5, 61.0, 0.2, 3.0, 1.0], "between": [2e-6, 3e-6], "ended": 1795867200})
    plain = [{**row, "score": row["score"] - 0.3} for row in trail]
    return held, [{**held, "trail": plain, "recipe": [CUT, TRAIN, *recipe[2:]]}]


def page(kind: str) -> str:
    held, others = everything()
    return render(held, others) if kind == "report" else compared({"first": held, "second": others[0], "third": held})


def seen(html: str, width: int, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """What LOOK finds in the page, shown ``width`` px wide."""
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    frame = f'<iframe srcdoc="{escape(open_page)}" style="width:{width}px;height:4000px;border:0"></iframe>'
    file = tmp_path / "frame.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}{LOOK}</body>", encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1400,1200", *flags, "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    told: dict[str, Any] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return told


def test_it_has_every_section() -> None:
    heads = re.findall(r"<h2>(.*?)</h2>", page("report"))
    for title in ("Trade-offs", "Every step, measured", "What the search tried", "What each step took and gave",
                  "Module by module", "Sensitivity", "Singular values", "Training", "What distillation brought",
                  "What was not compressed, and why", "Notes", "The recipe, to reproduce"):
        assert title in heads


@pytest.mark.parametrize("kind", ["report", "compared"])
@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_overlaps_nor_is_cut_off(kind: str, width: int, tmp_path: Path) -> None:
    told = seen(page(kind), width, tmp_path)
    assert told["on"] == []
    assert told["cut"] == []
    assert told["wide"] <= 0, "the page is no wider than the window; tables scroll by themselves"
    assert told["least"] >= SMALLEST


def test_the_ground_is_dark_where_dark_is_preferred(tmp_path: Path) -> None:
    light = seen(page("report"), 1200, tmp_path)["ground"]
    dark = seen(page("report"), 1200, tmp_path, "--blink-settings=preferredColorScheme=0")["ground"]
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 600
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150


def test_it_prints(tmp_path: Path) -> None:
    file, out = tmp_path / "page.html", tmp_path / "page.pdf"
    file.write_text(page("report"), encoding="utf-8")
    assert BROWSER is not None
    subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                    f"--print-to-pdf={out}", file.as_uri()], capture_output=True, timeout=120, check=True)
    pages = len(re.findall(rb"/Type\s*/Page\b", out.read_bytes()))
    assert 2 <= pages <= 8
