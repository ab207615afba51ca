"""Tables of low rank, filters, distillation beyond classification, sharing and the archive, for ``tables.py``.

``SECTIONS``: result file -> what makes its lines of Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from page import table
from rows import Row

Rows = dict[str, Row]


def faster(arms: Rows, arm: str) -> str:
    """How many times faster than the first arm: by the processor's seconds, else by those of the lower quartiles."""
    key = "processor_s" if "processor_s" in arms[arm] else "q1_s"
    return f"{next(iter(arms.values()))[key] / arms[arm][key]:.2f}"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def low_rank_speed(rows: Rows) -> list[str]:
    """One line an arm; predicted: what the table of layers says that the network saves, beside what was measured."""
    lines = []
    for name, row in rows.items():
        whole, calls = next(iter(row["arms"].values())), row.get("calls_s")
        for arm, one in row["arms"].items():
            said = ""
            if calls and "latency" in arm:
                said = f"{1 / (1 - (calls['whole'] - calls['fast']) / whole['processor_s']):.2f}"
            lines.append([f"{name}: {arm}", f"{one['params'] / 1e6:.2f}", f"{one['macs'] / 1e6:.0f}",
                          ms(one.get("processor_s", one["q1_s"])), faster(row["arms"], arm), said])
    return ["## Low rank: speed of whole networks", "", "`benchmarks/low_rank_speed.py`; one thread, batch 1, the "
            "processor's milliseconds, all arms in turn. Times faster: measured, and as predicted, the convolution and "
            "linear calls saving what the table of layers says and the rest staying. Random weights with falling "
            "spectra: no score is told.",
            *table(["", "params (M)", "MACs (M)", "ms", "times faster", "predicted"], lines)]


def dense(rows: Rows) -> list[str]:
    """The linear layers of low_rank.json."""
    found = {name: row for name, row in rows.items() if name.startswith("linear ")}
    lines = [[f"{name.removeprefix('linear ')}: {arm}", f"{one['params'] / 1e3:.0f}",
              ms(one.get("processor_s", one["q1_s"])), faster(row["arms"], arm)]
             for name, row in found.items() for arm, one in row["arms"].items()]
    scratch = [[name.removeprefix("resnet20 from scratch, "), str(row["epochs"]), f"{row['seconds_an_epoch']:.1f}",
                f"{row['processor_s']:.0f}", f"{row['validation']:.2f}", f"{row['top1']:.2f}"]
               for name, row in rows.items() if "seconds_an_epoch" in row]
    return ["## Low rank: dense layers", "", "`benchmarks/low_rank.py dense`; the processor's "
            "milliseconds, or lower quartiles of those on the wall where these were not kept.",
            *table(["", "params (k)", "ms", "times faster"], lines),
            *(["`benchmarks/low_rank.py scratch`: ResNet-20 from fresh weights on 5,000 images.",
               *table(["", "epochs", "s an epoch", "processor s", "validation %", "test %"], scratch)]
              if scratch else [])]


def filters(rows: Rows) -> list[str]:
    lines = [[name, f"{row['params'] / 1e3:.1f}", f"{row['macs'] / 1e3:.0f}", f"{row['archive_bytes'] / 1e3:.1f}",
              ms(row["onnxruntime_s"]), ms(row["openvino_s"]),
              *(f"{row[k]:.3f}" if k in row else "" for k in ("output_error", "output_error_fitted")),
              f"{row['test_error_at_once']:.2f}", f"{row['test_error']:.2f}"] for name, row in rows.items()]
    return ["## Structured matrices and filters", "", "`benchmarks/filters.py` on MNIST; errors of outputs are squared "
            "and relative, of one layer, as projected and after 60 steps on it; test errors as projected and after one "
            "epoch. For scale: HashedNets has 1.45 % at 1/8 (Chen et al. 2015).",
            *table(["", "params (k)", "MACs (k)", "archive (kB)", "ms ORT", "ms OpenVINO", "output error", "fitted",
                    "test error at once %", "test error %"], lines)]


def beyond(rows: Rows) -> list[str]:
    """Detection, segmentation, text: means over the seeds."""
    arms: dict[str, list[Row]] = {}
    for name, row in rows.items():
        arms.setdefault(name.rpartition(", seed ")[0] or name, []).append(row)
    lines = []
    for arm, found in arms.items():
        tests = [row["test"] for row in found]
        spread = f" ± {np.std(tests, ddof=1):.2f}" if len(tests) > 1 else ""
        lines.append([arm, f"{np.mean([row['validation'] for row in found]):.2f}", f"{np.mean(tests):.2f}{spread}",
                      str(len(found)), f"{found[0]['params'] / 1e3:.0f}"])
    return ["## Distillation beyond classification", "", "`benchmarks/distillation_beyond.py`: mAP at an IoU of 0.5, "
            "mean IoU, right answers, each in %.", *table(["", "validation", "test", "seeds", "params (k)"], lines)]


def costs(rows: Rows) -> list[str]:
    lines = [[name, f"{row['time_ratio']:.2f}", f"{row['memory_ratio']:.2f}"] for name, row in rows.items()
             if "time_ratio" in row]
    said = [f"A cache of the teacher's outputs, images {name.removeprefix('cache, ')}: {row['hit_rate']:.0%} of the "
            f"samples were there over {row['epochs']} epochs, {row['file_bytes'] / 1e3:.0f} kB for {row['images']} "
            f"images; an epoch takes {row['seconds_an_epoch']['cached']:.1f} s of the processor, without "
            f"{row['seconds_an_epoch']['asked anew']:.1f} s." for name, row in rows.items() if "hit_rate" in row]
    return ["## Distillation: time and memory", "", "`benchmarks/distillation.py costs`: ResNet-8 taught by ResNet-56, "
            "as ratios to plain training.", *table(["", "time", "peak memory"], lines), *said, ""]


def compressed(rows: Rows) -> list[str]:
    lines = [[name, f"{row['bytes'] / 1e3:.1f}", f"{row['ratio']:.1f}", f"{row['test_error']:.2f}",
              f"{row['whole_test_error']:.2f}"] for name, row in rows.items()]
    return ["## Deep Compression", "", "`benchmarks/deep_compression.py`: bytes of the archive, graph and codebooks "
            "included; the score is that of the decoded network. For scale: Deep Compression 40x at 1.58 % "
            "(LeNet-300-100) and 39x at 0.74 % (LeNet-5).",
            *table(["", "archive (kB)", "ratio", "test error %", "before %"], lines)]


def searched(rows: Rows) -> list[str]:
    lines = [[name, row["recipe"], f"{row['test_before']:.2f}", f"{row['test']:.2f}",
              f"{row['macs'] / row['macs_before']:.3f}" if "macs_before" in row else f"{row['shares']['macs']:.3f}",
              f"{row['file_bytes_before'] / row['archive_bytes']:.1f}", f"{row['faster']:.2f}",
              str(row.get("trials", "")), f"{row['seconds'] / 60:.0f}"] for name, row in rows.items()]
    return ["## The search", "", "`benchmarks/search.py`, `search_beyond.py`. macs 2.1: so many times fewer asked, no "
            "training, the score's drop minimized; small, fast: at most half a point lost on the images that "
            "combinations are tried on; trained: 12 epochs after the cut where no row says another number, tried on "
            "one half of the test images and scored on the other; fixed: the README's recipe, so trained. Arms share "
            "their trials: later ones take less time.",
            *table(["", "chosen", "before %", "test %", "MACs", "times smaller", "times faster", "trials", "minutes"],
                   lines)]


def peers(rows: Rows) -> list[str]:
    lines = [[name, f"{row['top1']:.2f}", f"{1 / row['latency']:.2f}", f"{row['bytes'] / 1e3:.0f}"]
             for name, row in rows.items()]
    return ["## The search beside peers", "",
            "`benchmarks/search_peers.py`: ResNet-20 in OpenVINO beside NNCF and in ONNX Runtime beside Olive, whose "
            "default file is slower than float there; of Torch-Pruning the mildest cut with which it and the peer take "
            "no longer than what `fw.search` found, or the hardest tried. Nothing is trained.",
            *table(["", "test %", "times faster", "file (kB)"], lines)]


def budgets(rows: Rows) -> list[str]:
    def off(ratios: Sequence[float]) -> str:
        return f"{100 * max(abs(ratio - 1) for ratio in ratios):.0f}"

    lines = [[name, f"{row['kept']} of {row['budgets']}", off(row["trial_over_shipped"]),
              off(list(row["told_over_measured"].values())), str(len(row["told_over_measured"]))]
             for name, row in rows.items()]
    return ["## Random budgets", "", "`benchmarks/search_budgets.py`: twenty budgets that some combination is known to "
            "keep, no training, ONNX Runtime. Kept: the shipped file is inside all limits. Furthest off in %: the "
            "latency of a trial from that of the file as shipped, and what was told of a combination before it was "
            "tried from what was measured.",
            *table(["", "kept", "trial off %", "told off %", "combinations told"], lines)]


#: result file -> its tables
SECTIONS: dict[str, Callable[[Rows], list[str]]] = {
    "low_rank_speed": low_rank_speed, "low_rank": dense, "filters": filters, "distillation_beyond": beyond,
    "distillation_costs": costs, "deep_compression": compressed, "search": searched, "search_peers": peers,
    "search_budgets": budgets}
