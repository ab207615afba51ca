"""Draws the figures of the documentation and writes what the pages say beside them.   python benchmarks/figures.py

A page has a place ``<!-- measured: NAME -->`` ... ``<!-- end -->``; what stands between is written anew from the newest
rows in ``benchmarks/results``, and a picture goes to ``docs/figures/NAME.svg``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from rows import RESULTS, Row, newest
from tables import table

DOCS = Path(__file__).parents[1] / "docs"
STYLE = ("text{font:13px system-ui,sans-serif;fill:#22272e}.q{fill:#59636e}.bar{fill:#9aa5b1}.ours{fill:#3f51b5}"
         ".p{fill:#fff}")
#: a picture's width, where bars begin, and the longest one
WIDTH, LEFT, LONGEST = 680, 270, 320


@dataclass(frozen=True)
class Bar:
    """One row of a picture; ``ours`` is drawn in the accent's colour."""

    name: str
    value: float
    shown: str
    ours: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture of bars from ``low``, what it shows, and a table or list below it."""

    title: str
    bars: Sequence[Bar]
    low: float
    lines: Sequence[str]

    def svg(self) -> str:
        height = 24 * len(self.bars) + 34
        top = max(bar.value for bar in self.bars)
        parts = [f'<text class="q" x="0" y="16">{escape(self.title)}</text>']
        for i, bar in enumerate(self.bars):
            y, length = 24 * i + 30, max(2.0, (bar.value - self.low) / (top - self.low) * LONGEST)
            parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(bar.name)}</text>'
                         f'<rect class="{"ours" if bar.ours else "bar"}" x="{LEFT}" y="{y}" width="{length:.1f}" '
                         f'height="17" rx="2"/><text x="{LEFT + length + 6:.1f}" y="{y + 13}">{escape(bar.shown)}'
                         "</text>")
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -6 {WIDTH} {height + 12}" role="img" '
                f'aria-label="{escape(self.title)}"><style>{STYLE}</style><rect class="p" x="-10" y="-6" width="100%" '
                f'height="100%" rx="6"/>{"".join(parts)}</svg>\n')


def rows(name: str) -> dict[str, Row]:
    return newest(RESULTS / f"{name}.json")


# ---- one function a place
def pruning() -> Figure:
    found, bars, lines = rows("beside_torch_pruning"), [], []
    kinds = {"ours": "featherweight", "theirs uniform": "Torch-Pruning, uniform",
             "theirs global": "Torch-Pruning, global"}
    for fewer in (1.5, 2.1, 3.0):
        for kind, name in kinds.items():
            row = found[f"resnet56 {kind} {fewer:.1f}x"]
            bars.append(Bar(f"{fewer:g}x fewer MACs, {name}", row["top1"], f"{row['top1']:.1f} %", kind == "ours"))
    for net, kind, fewer in (("resnet20", "ours", 2.1), ("resnet20", "ours", 3.0), ("resnet20", "theirs uniform", 2.1),
                             ("resnet20", "theirs uniform", 3.0)):
        seeds = [r["top1"] for n, r in found.items() if n.startswith(f"{net} {kind} {fewer}x taught")]
        if seeds:
            lines.append([f"ResNet-20, {fewer:g}x fewer MACs, {kinds[kind]}", f"{np.mean(seeds):.2f}", str(len(seeds))])
    depth = rows("depth")
    timed = depth["same rounds"]["latency"]
    lines += [[f"ResNet-56, {who}, {timed['original']['median_ms'] / timed[who]['median_ms']:.2f}x faster",
               f"{depth[f'{who}, 3 epochs']['score']:.2f}", "1"] for who in ("depth", "channels in 8s")]
    return Figure("ResNet-56 on CIFAR-10, channels cut without any retraining: test top-1 (93.4 % before)", bars, 0.0,
                  ["After some epochs of training with the original as teacher:",
                   *table(["", "test top-1 %", "seeds"], lines)])


def quantization() -> Figure:
    found, lines = rows("post_training"), []
    for net in ("resnet20", "resnet56"):
        for arm, name in (("float", "float"), ("int8/uint8 min-max", "8 bits, nearest"),
                          ("int4/uint8 gptq", "4 / 8 bits, GPTQ"), ("int4/uint4 gptq", "4 / 4 bits, GPTQ"),
                          ("int3/uint8 gptq", "3 / 8 bits, GPTQ")):
            row = found.get(f"{net} {arm}")
            if row:
                size = row.get("file_bytes", row.get("network_bytes", 0))
                lines.append([f"{net}, {name}", f"{row['top1']:.2f}", f"{size / 1e3:.0f}", f"{row['processor_s']:.0f}"])
    trained = {n: r for n, r in rows("low_bit_training").items() if n.startswith("resnet20")}
    lines += [[f"{n.partition(',')[0]} in training", f"{r['top1']:.2f}", f"{r['network_bytes'] / 1e3:.0f}",
               f"{r['processor_s']:.0f}"] for n, r in sorted(trained.items(), key=lambda i: -i[1]["top1"])
              if "SGD" not in n]
    bars = []
    for name, row in rows("int8_runtimes").items():
        base = row.get("onnxruntime float")
        if base is not None:
            for kind, said in (("ours", "featherweight"), ("theirs", "quantize_static")):
                if row.get(f"onnxruntime {kind}"):
                    faster = base["median_ms"] / row[f"onnxruntime {kind}"]["median_ms"]
                    bars.append(Bar(f"{name.split()[0]}, {said}", faster, f"{faster:.1f} x", kind == "ours"))
    return Figure("8 bits in ONNX Runtime: times faster than float, one thread, batch 1", bars, 0.0,
                  ["Weights / activations, CIFAR-10 test top-1 in %, kilobytes, seconds of one core:",
                   *table(["", "top-1", "kB", "seconds"], lines)])


def distillation() -> Figure:
    arms: dict[str, list[float]] = {}
    for name, row in rows("distillation").items():
        if name.startswith("resnet8 "):
            arms.setdefault(name.rpartition(", seed ")[0].removeprefix("resnet8 "), []).append(row["top1"])
    means = sorted(((float(np.mean(v)), len(v), k) for k, v in arms.items() if len(v) > 1), reverse=True)
    bars = [Bar(f"{arm}", mean, f"{mean:.1f} %", arm != "no teacher") for mean, _, arm in means]
    best = means[0]
    plain = next(m for m in means if m[2] == "no teacher")
    return Figure("ResNet-8 on 2,560 images of CIFAR-10, taught by ResNet-56: test top-1, means of 3 seeds", bars, 40.0,
                  [f"Without a teacher {plain[0]:.1f} %, with {best[2]} {best[0]:.1f} %. Bars begin at 40 %.", ""])


def low_rank() -> Figure:
    found = rows("low_rank")
    kinds = {"auto, data": "auto, fit to data", "auto": "auto", "tucker2 by energy": "Tucker-2 by energy",
             "svd by energy": "SVD by energy", "Channels at its MACs": "channels instead, same MACs",
             "tensorly-torch, cp": "tensorly-torch, CP", "tensorly-torch, tucker": "tensorly-torch, Tucker"}

    def line(name: str, row: Row) -> list[str]:
        return [name, f"{row['top1']:.2f}", f"{row['params'] / 1e3:.0f}",
                f"{row['macs'] / 1e6:.1f}" if "macs" in row else "not counted"]

    bars, lines = [], []
    for params in (0.83, 0.7):
        for kind, name in kinds.items():
            row = found[f"resnet20 params={params} {kind}"]
            bars.append(Bar(f"{params:.0%} of params, {name}", row["top1"], f"{row['top1']:.1f} %", "data" in kind))
            lines.append(line(f"{params:.0%} of params, {name}", row))
    for name, row in found.items():
        if "epochs" in row:
            lines.append(line(name.removeprefix("resnet20 "), row))
    whole = found["resnet20"]["top1"]
    return Figure(f"ResNet-20 on CIFAR-10, no retraining: test top-1 ({whole:.1f} % before)", bars, 0.0,
                  table(["", "test top-1 %", "params (k)", "MACs (M)"], lines)[1:])


def compact() -> Figure:
    arms = rows("low_rank")["linear 1024 onnxruntime"]["arms"]
    bars = [Bar(name, arm["median_s"] * 1e6, f"{arm['median_s'] * 1e6:.0f} µs", name.startswith("Structured"))
            for name, arm in arms.items()]
    lines = [[name, f"{arm['params'] / 1e3:.0f}", f"{arm['macs'] / 1e3:.0f}", f"{arm['median_s'] * 1e6:.0f}"]
             for name, arm in arms.items()]
    return Figure("A linear layer of 1024 x 1024 in ONNX Runtime, one row, one thread", bars, 0.0,
                  table(["", "params (k)", "MACs (k)", "µs"], lines)[1:])


#: LeNet-5 in the longest trainings, three seeds
LENET_5 = "lenet_5 longest, fewer kept"


def sharing() -> Figure:
    found, bars, lines = rows("deep_compression"), [], []
    for net in ("lenet_300_100", "lenet_5", LENET_5):
        seeds = [r for n, r in found.items() if n.startswith(f"{net} seed")]
        ratio = float(np.mean([r["ratio"] for r in seeds]))
        bars.append(Bar(net, ratio, f"{ratio:.0f} x", True))
        lines.append([net, f"{np.mean([r['bytes'] for r in seeds]) / 1e3:.1f}", f"{ratio:.0f}",
                      f"{np.mean([r['whole_test_error'] for r in seeds]):.2f}",
                      f"{np.mean([r['test_error'] for r in seeds]):.2f}"])
    for name, row in found.items():
        if name.startswith(("resnet20", "resnet56")):
            bars.append(Bar(name, row["ratio"], f"{row['ratio']:.0f} x", True))
            lines.append([name, f"{row['bytes'] / 1e3:.1f}", f"{row['ratio']:.0f}", f"{row['whole_test_error']:.2f}",
                          f"{row['test_error']:.2f}"])
    return Figure("Archives of whole networks: times smaller than float32", bars, 0.0,
                  table(["", "archive (kB)", "times smaller", "error before %", "error after %"], lines)[1:])


def summary() -> Figure:
    """What a person wants to know, one line each; the picture is the quantized ResNets' and the pruned ones'."""
    cifar, post = rows("cifar_resnets"), rows("post_training")
    timed = cifar["same rounds"]["latency"]
    faster = {name: timed["float"]["median_ms"] / row["median_ms"] for name, row in timed.items()}
    bars = [Bar(name, value, f"{value:.2f} x", name != "float") for name, value in faster.items()]
    int8 = [(r["onnxruntime float"]["median_ms"] / r["onnxruntime ours"]["median_ms"], n.split()[0])
            for n, r in rows("int8_runtimes").items() if r.get("onnxruntime ours")]
    beside = rows("beside_torch_pruning")
    teach: dict[str, list[float]] = {}
    for name, row in rows("distillation").items():
        teach.setdefault(name.rpartition(", seed ")[0], []).append(row["top1"])
    deep = [r for n, r in rows("deep_compression").items() if n.startswith(f"{LENET_5} seed")]
    ratio, whole, small = (np.mean([r[key] for r in deep]) for key in ("ratio", "whole_test_error", "test_error"))
    holds = [m["ok"] for m in rows("zoo").values() if "ok" in m]
    f20, q20, q4 = (post[f"resnet20 {k}"] for k in ("float", "int8/uint8 min-max", "int4/uint4 gptq"))
    ours, theirs, taught = (beside[f"resnet56 {arm}"]["top1"] for arm in (
        "ours 2.1x", "theirs uniform 2.1x", "ours 2.1x, 20 epochs, taught"))
    thin = rows("low_rank")["resnet20 params=0.83 auto, data"]["top1"]
    (slow, slowest), (fast, fastest) = min(int8), max(int8)
    alone, two = (np.mean(teach[f"resnet8 {arm}"]) for arm in ("no teacher", "dist and attention"))
    found, fixed = (rows("search")[f"ResNet-20, {arm}"] for arm in ("fast trained", "fixed"))
    lines = [
        f"- **The balance, found.** ResNet-20, at most half a point, 12 epochs: {found['faster']:.2f} times faster in "
        f"ONNX Runtime at {found['test']:.2f} % of {found['test_before']:.2f} % ({found['recipe']}); the fixed recipe "
        f"of the README, so trained, {fixed['faster']:.2f} times at {fixed['test']:.2f} %.",
        f"- **8 bits, no training.** ResNet-20: {f20['top1']:.2f} to {q20['top1']:.2f} %, "
        f"{f20['file_bytes'] / 1e3:.0f} to {q20['file_bytes'] / 1e3:.0f} kB. In ONNX Runtime {slow:.1f} times "
        f"({slowest}) to {fast:.1f} times ({fastest}) as fast as float.",
        f"- **4 bits, no training.** ResNet-20 with GPTQ: {q4['top1']:.2f} %, {q4['network_bytes'] / 1e3:.0f} kB.",
        f"- **Channels.** ResNet-56 with 2.1x fewer MACs, no training: {ours:.1f} %, Torch-Pruning {theirs:.1f} "
        f"%; after 20 taught epochs {taught:.2f} % of {post['resnet56 float']['top1']:.2f} %.",
        f"- **Low rank.** ResNet-20 at 83 % of its parameters, no training: {thin:.1f} % of {f20['top1']:.1f} %.",
        f"- **Teachers.** ResNet-8 on few images: {alone:.1f} % alone, {two:.1f} % taught by two objectives.",
        f"- **Archives.** LeNet-5 {ratio:.0f} times smaller than float32, test error {whole:.2f} before, {small:.2f} % "
        "after.",
        f"- **Any model.** {sum(holds)} of {len(holds)} architectures of torchvision, timm and transformers are "
        "captured, cut, trained and exported, with outputs equal to the zeroed network's.", ""]
    return Figure("ResNet-56 on CIFAR-10 in ONNX Runtime: times faster than float, same rounds", bars, 0.0, lines)


#: place -> the page that it is in and what is drawn and said there
PLACES: dict[str, tuple[str, Callable[[], Figure]]] = {
    "pruning": ("techniques/pruning.md", pruning), "quantization": ("techniques/quantization.md", quantization),
    "distillation": ("techniques/distillation.md", distillation), "low-rank": ("techniques/low-rank.md", low_rank),
    "compact-filters": ("techniques/compact-filters.md", compact), "sharing": ("techniques/sharing.md", sharing),
    "summary": ("measured.md", summary)}


def written() -> dict[Path, str]:
    """Every file that is made -> its text."""
    found: dict[Path, str] = {}
    for name, (where, make) in PLACES.items():
        page, figure = DOCS / where, make()
        up = "../" * where.count("/")
        said = [f"![{figure.title}]({up}figures/{name}.svg)", "", *figure.lines]
        place = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = "\n".join(said).rstrip("\n") + "\n"
        found[page] = place.sub(lambda m, text=text: m[1] + text + m[2], page.read_text(), count=1)
        found[DOCS / f"figures/{name}.svg"] = figure.svg()
    return found


def main() -> None:
    for path, text in written().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
