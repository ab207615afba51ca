"""Writes docs/results.md from the JSON files in benchmarks/results.   python benchmarks/tables.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs/results.md"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are figures."""
    return ["", "| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|",
            *("| " + " | ".join(r) + " |" for r in rows), ""]


def ms(latency: dict[str, Any] | None) -> str:
    if not latency:
        return ""
    return f"{latency['median_s'] * 1e3:.2f} ({latency['q1_s'] * 1e3:.2f} to {latency['q3_s'] * 1e3:.2f})"


def measured(rows: list[dict[str, Any]], archive: bool = False) -> list[str]:
    head = ["", "score", "MACs (M)", "params (k)", "file (kB)", *(["archive (kB)"] if archive else []),
            "ms, batch 1 (quartiles)"]
    lines = [[r["step"], f"{r['score']:.2f}", f"{r['macs'] / 1e6:.1f}", f"{r['params'] / 1e3:.0f}",
              f"{r['file_bytes'] / 1e3:.0f}", *([f"{r['archive_bytes'] / 1e3:.0f}"] if archive else []),
              ms(r["latency"])] for r in rows]
    return table(head, lines)


def cifar(data: dict[str, Any]) -> list[str]:
    machine = ", ".join(f"{k} {v}" for k, v in data["machine"].items())
    return ["## CIFAR-10 ResNets", "", "`make bench-cifar CHECKPOINTS=FOLDER`. Score: test top-1 in % of the file "
            f"that ONNX Runtime runs, one thread. {machine}.", *measured(list(data["rows"].values())),
            *same_rounds(data.get("same_rounds", {}))]


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


def speed(data: dict[str, Any]) -> list[str]:
    rows = [[name, *(f"{m[who]['median_ms']:.2f}" for who in ("float", "theirs", "ours")),
             f"{m['ratio_theirs_to_ours']:.3f}", f"{m['theirs']['bytes'] / 1e6:.2f}", f"{m['ours']['bytes'] / 1e6:.2f}"]
            for name, m in data["models"].items()]
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    return ["## Int8 against ONNX Runtime's own static quantizer", "",
            f"`make bench-int8`. Medians of {data['rounds']} interleaved rounds in one process, {data['threads']} "
            f"thread, batch 1, 224 px, random weights. {data['device']}; {versions}.",
            *table(["", "float (ms)", "theirs (ms)", "ours (ms)", "theirs / ours", "theirs (MB)", "ours (MB)"],
                   rows)]


def zoo(data: dict[str, Any]) -> list[str]:
    rows = [[name, "yes" if m["ok"] else "**no**", f"{m['seconds']:.1f}", str(m["nodes"]), f"{m['max_difference']:.0e}",
             "yes" if m["loaded_equal"] else "**no**", "free" if m["dynamic_batch"] else "fixed",
             ", ".join(m["parts"]) or "whole"] for name, m in data["models"].items()]
    head = ["", "captured", "seconds", "nodes", "difference", "loaded", "batch", "parts"]
    return ["## Capture of one model of each torchvision family", "", "`make zoo`. Largest relative difference to the "
            "model's own outputs over the examples, other batch sizes and (detectors) other image sizes; loaded: "
            "saved, loaded, equal bit for bit.", *table(head, rows)]


def main() -> None:
    lines = ["# Measured", "", "Made by `python benchmarks/tables.py` from the files in `benchmarks/results/`.", ""]
    sections = {"cifar_resnets": cifar, "all_families": families, "int8_speed": speed, "zoo_capture": zoo}
    for name, make in sections.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            lines += make(json.loads(file.read_text()))
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
