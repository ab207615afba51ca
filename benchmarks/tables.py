"""Writes docs/results.md from the newest rows in benchmarks/results.   python benchmarks/tables.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from page import Rows, ms, table, unique
from rows import Row, newest
from tables_families import SECTIONS
from tables_zoo import every_step, pruned_zoo, zoo

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs/results.md"


def measured(rows: list[dict[str, Any]], archive: bool = False) -> list[str]:
    head = ["", "score", "MACs (M)", "params (k)", "file (kB)", *(["archive (kB)"] if archive else []),
            "ms, batch 1 (quartiles)"]
    lines = [[r["step"], f"{r['score']:.2f}", f"{r['macs'] / 1e6:.1f}", f"{r['params'] / 1e3:.0f}",
              f"{r['file_bytes'] / 1e3:.0f}", *([f"{r['archive_bytes'] / 1e3:.0f}"] if archive else []),
              ms(r["latency"])] for r in rows]
    return table(head, lines)


def cifar(rows: Rows) -> list[str]:
    networks = [row for row in rows.values() if "score" in row]
    return ["## CIFAR-10 ResNets", "", "`make bench-cifar CHECKPOINTS=FOLDER`. Score: test top-1 in % of the file "
            f"that ONNX Runtime runs, one thread. {unique(rows, 'machine')}.", *measured(networks),
            *same_rounds(rows.get("same rounds", {}).get("latency", {}))]


def same_rounds(data: dict[str, Any]) -> list[str]:
    rows = [[name, f"{t['median_ms']:.2f} ({t['q1_ms']:.2f} to {t['q3_ms']:.2f})", f"{t['faster']:.2f}"]
            for name, t in data.items()]
    return ["The ResNet-56 files timed in the same interleaved rounds:",
            *table(["", "ms, batch 1 (quartiles)", "times faster"], rows)] if rows else []


def families(data: dict[str, Any]) -> list[str]:
    final = data["final"]
    ends = [{**final["before"], "step": "test split: original"}, {**final["after"], "step": "test split: compressed"}]
    return ["## Every family in one recipe: ResNet-20", "",
            "`featherweight compress examples/cifar10_resnet56/all_families.toml`, killed in the middle of the "
            "training and called again. The trail is scored on 5,000 training images that fine-tuning did not see (the "
            "given weights were trained on them, so the first row runs high); the last two rows on the test split.",
            *measured([*data["trail"], *ends], archive=True)]


def runtimes(arms: Rows) -> list[str]:
    """Float, the runtime's own int8 and ours, a row for each model and runtime."""
    lines = []
    for name, row in arms.items():
        for runtime in ("onnxruntime", "openvino"):
            of = {kind: row.get(f"{runtime} {kind}") for kind in ("float", "theirs", "ours")}
            ratio = row.get(f"{runtime} theirs_to_ours")
            lines.append([f"{name.split()[0]}, {runtime}", *(f"{m['median_ms']:.2f}" if m else "" for m in of.values()),
                          f"{ratio:.3f}" if ratio else "",
                          *(f"{m['relative_error']:.3f}" if m else "" for m in list(of.values())[1:]),
                          *(f"{m['bytes'] / 1e6:.1f}" if m else "" for m in of.values())])
    rows = list(arms.values())
    about = sorted({f"{r['machine']['processor']} ({r['machine']['instructions']}, {'no ' * r['saturates']}VNNI), "
                    f"{r['rounds']} rounds, {r['threads']} thread; "
                    + ", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in rows})
    return ["## Int8 in ONNX Runtime and OpenVINO, beside each runtime's own quantizer", "",
            "`python benchmarks/int8_runtimes.py`. Medians in ms of interleaved rounds in one process, batch 1; "
            "theirs: `quantize_static`, `nncf.quantize`; floats in float32 in OpenVINO too "
            "(`INFERENCE_PRECISION_HINT=f32`), plain sessions (rows of processors without VNNI are older, of "
            "sessions with exact sums where these load a file). theirs / ours: the median of the rounds' ratios, above "
            "1 where ours is faster. error: of the outputs, relative to the float network's, on images not calibrated "
            "on. Random "
            f"weights. {'; '.join(about)}.",
            *table(["", "float", "theirs", "ours", "theirs / ours", "error theirs", "error ours", "float (MB)",
                    "theirs (MB)", "ours (MB)"], lines)]


def plain(rows: Rows) -> list[str]:
    """Top-1 of every file on both kinds of processor."""
    kinds = ("with VNNI", "without VNNI")
    files = dict.fromkeys(name.removesuffix(f" {kind}") for name in rows for kind in kinds if name.endswith(f" {kind}"))
    lines = [[name, *(f"{row['top1']:.2f}" if (row := rows.get(f"{name} {kind}")) else "" for kind in kinds)]
             for name in files]
    return ["## Int8 files in plain sessions, on processors with VNNI and without", "",
            "`python benchmarks/plain_sessions.py --checkpoints FOLDER`, and the same through "
            "`python benchmarks/without_vnni`, which answers the runtimes' CPUID as a processor with AVX2 alone would. "
            "CIFAR-10 test top-1 in %; the default and `Quantize(device=\"vnni\")`.",
            *table(["", *(f"top-1 {kind}" for kind in kinds)], lines)]


def depth(rows: Rows) -> list[str]:
    timed = rows.get("same rounds", {}).get("latency", {})
    lines = []
    for name, row in rows.items():
        who, _, when = name.partition(", ")
        if "score" in row:
            t = timed.get(who)
            lines.append([who, when or "as it is", f"{row['score']:.2f}", f"{row['macs'] / 1e6:.1f}",
                          f"{row['params'] / 1e3:.0f}", f"{t['median_ms']:.2f} ({t['q1_ms']:.2f} to {t['q3_ms']:.2f})"
                          if t else "", f"{timed['original']['median_ms'] / t['median_ms']:.2f}" if t else ""])
    plans = [f"{n.removeprefix('plan: ')}: {r['summary']}" for n, r in rows.items() if n.startswith("plan: ")]
    machine = ", ".join(f"{k} {v}" for k, v in next(iter(rows.values()))["machine"].items())
    return ["## Depth against width: ResNet-56 on CIFAR-10", "",
            "`python benchmarks/depth.py --checkpoints FOLDER --epochs 3`. A third of the blocks dropped (by what they "
            "change in the output), beside channels cut inside the blocks (by L1, not compensated) to the same "
            "latency: test top-1 in % of the file that ONNX Runtime runs, and its milliseconds for one image on one "
            f"thread, all files in the same rounds. {machine}.", "",
            *(f"- {p}" for p in plans),
            *table(["", "", "top-1 %", "MACs (M)", "params (k)", "ms (quartiles)", "times faster"], lines)]


def beside(rows: Rows) -> list[str]:
    """Channels cut by us and by Torch-Pruning: a row a point, then what was trained."""
    points = {(n.split()[0], float(n.split()[-1][:-1])): None for n in rows if n.endswith("x")}
    kinds = ("ours", "theirs uniform", "theirs global")
    lines = [[f"{net}, {fewer:g}x fewer MACs", *(f"{r['top1']:.2f} ({r['fewer_macs']:.2f}x)" if r else "" for r in (
        rows.get(f"{net} {kind} {fewer:.1f}x") for kind in kinds))] for net, fewer in sorted(points)]
    trained = [[name, f"{r['top1']:.2f}", f"{r['fewer_macs']:.2f}x", str(r["epochs"])]
               for name, r in sorted(rows.items()) if "epochs" in r]
    about = sorted({f"torch {r['machine']['torch']}, {r['machine']['threads']} thread" for r in rows.values()})
    return ["## Channels beside Torch-Pruning", "", "`python benchmarks/beside_torch_pruning.py --checkpoints FOLDER`. "
            "Test top-1 in %, 91.73 and 93.39 before. No retraining; 1,024 training images, by which Torch-Pruning's "
            "L1 re-estimates batch norm, and ours chooses and refits the weights that remain (score reconstruction, "
            f"allocation sensitivity, least squares). Cut inside the blocks on both sides. {'; '.join(about)}.",
            *table(["", *kinds], lines), "After training (SGD, one cycle to 0.02, flips and shifts, bf16):",
            *table(["", "top-1", "fewer MACs", "epochs"], trained)]


def sparse(rows: Rows) -> list[str]:
    """Single weights: zeros, test error, and the packed network."""
    lines = [[name, f"{r['sparsity']:.2%}", f"{r['weights'] - r['zeros']:,}", f"{r['error']:.2f}",
              f"{r['archive_bytes'] / 1e3:.1f}", str(r["seed"]), r.get("how", "")] for name, r in rows.items()]
    machines = [r["machine"] for r in rows.values()]
    about = {f"{m['processor']}, torch {m['torch']}, {m['threads']} thread" for m in machines}
    return ["## Single weights", "", "`python benchmarks/sparse_weights.py --checkpoints FOLDER lenet300 lenet5 "
            "oneshot resnet20`. Zeros among the weights of convolutions and linear layers; error on the test split in "
            f"% of the file that ONNX Runtime runs; archive: float32, entropy-coded. {'; '.join(sorted(about))}.",
            *table(["", "zeros", "weights left", "test error", "archive (kB)", "seed", "how"], lines)]


def post_training(rows: Rows) -> list[str]:
    lines = [[name, f"{r['top1']:.2f}", f"{r.get('file_bytes', r.get('network_bytes', 0)) / 1e3:.0f}",
              f"{r['processor_s']:.0f}"] for name, r in sorted(rows.items())]
    return ["## Quantized after training: ResNet-20 and ResNet-56", "",
            "`python benchmarks/post_training.py --checkpoints FOLDER`. Test top-1 in %; 1,024 training images to "
            "calibrate on. 8 bits: the file, run by ONNX Runtime (NNCF's by OpenVINO); fewer: weights/values, "
            "simulated exactly, bytes of the `.fw` file; seconds of one core to quantize.",
            *table(["", "top-1", "kB", "seconds"], lines)]


def low_bits(rows: Rows) -> list[str]:
    lines = [[name, f"{r['top1']:.2f}", f"{r['wanted']:.1f}", f"{r['network_bytes'] / 1e3:.0f}"]
             for name, r in sorted(rows.items())]
    about = sorted({f"torch {r['machine']['torch']}, {r['machine']['threads']} thread" for r in rows.values()})
    return ["## Trained in few bits", "", "`python benchmarks/low_bit_training.py --checkpoints FOLDER resnet20 "
            "lenet5`. Test top-1 in % of the network as it is stored. "
            f"{'; '.join(about)}.",
            *table(["", "top-1", "asked for", ".fw (kB)"], lines)]


def wrecked(rows: Rows) -> list[str]:
    lines = [[name, f"{r['top1']:.2f}", f"{r['file_bytes'] / 1e3:.0f}"] for name, r in rows.items()]
    plan = rows.get("ladder", {}).get("plan", [])
    climb = [line for line in plan if not line.startswith("  left alone")]
    return ["## A network that plain W8A8 wrecks", "", "`python benchmarks/ladder.py`. Test top-1 in % of the file in "
            "ONNX Runtime. Below: what the ladder tried, by its score on validation images.",
            *table(["", "top-1", "file (kB)"], lines), *(["```", *climb, "```", ""] if climb else [])]


def taught(rows: Rows) -> list[str]:
    """Arms over their seeds: mean, deviation where there are several, and how many."""
    arms: dict[str, list[Row]] = {}
    for name, row in rows.items():
        arms.setdefault(name.rpartition(", seed ")[0], []).append(row)
    lines = []
    for arm, found in arms.items():
        scores = [row["top1"] for row in found]
        spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
        lines.append([arm, f"{np.mean([row['validation'] for row in found]):.2f}", f"{np.mean(scores):.2f}{spread}",
                      str(len(scores)), str(found[0]["epochs"])])
    return ["## Distillation", "", "`benchmarks/distillation.py` on CIFAR-10. resnet8: taught by ResNet-56 on 2,560 "
            "images mirrored at random. resnet20: channels cut, retrained on all images with the original as teacher. "
            "What validation images the trained checkpoints have seen is no measure of them.",
            *table(["", "validation %", "test %", "seeds", "epochs"], lines)]


def low_rank(rows: Rows) -> list[str]:
    lines = [[name, f"{row['top1']:.2f}", f"{row['params'] / 1e3:.0f}",
              f"{row['macs'] / 1e6:.1f}" if "macs" in row else "not counted"]
             for name, row in rows.items() if "top1" in row]
    return ["## Low rank: ResNet-20 on CIFAR-10", "", "`benchmarks/low_rank.py`; no retraining, but where epochs "
            "are named.",
            *table(["", "test %", "params (k)", "MACs (M)"], lines)]


def main() -> None:
    lines = ["# Measured", "", "Made by `python benchmarks/tables.py` from the files in `benchmarks/results/`.", ""]
    sections = {"cifar_resnets": cifar, "all_families": families, "int8_runtimes": runtimes, "plain_sessions": plain,
                "zoo_capture": zoo, "beside_torch_pruning": beside, "depth": depth, "sparse_weights": sparse,
                "post_training": post_training, "low_bit_training": low_bits, "ladder": wrecked,
                "distillation": taught, "low_rank": low_rank, "zoo": pruned_zoo, "zoo_steps": every_step}
    for name, make in (*sections.items(), *SECTIONS.items()):
        file = RESULTS / f"{name}.json"
        if file.exists():
            lines += make(json.loads(file.read_text()) if make is families else newest(file))
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
